"""What is traced of one rank, how much of it, and the file that it becomes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hpcsgd
from hpcsgd import HpcsgdError, World
from hpcsgd.diagnostics import trace, trace_file
from hpcsgd.diagnostics.activity import Status
from hpcsgd.diagnostics.trace import Off, Trace
from hpcsgd.diagnostics.traffic import Traffic

ABOUT = {"rank": 0, "host": "here", "at": 0.0, "offset": 0.0, "error": 0.0}


class Rank:
    """A trace whose threads are told apart by name."""

    def __init__(self, folder: Path) -> None:
        trace_file.clear(folder)
        self.folder, self.traffic = folder, Traffic()
        file = trace_file.part_of(folder, 0).open("wb", buffering=0)
        self.trace = Trace(
            file, ABOUT, self.traffic, Status(), lambda: threading.current_thread().name == "other"
        )

    def elsewhere(self, job: Any) -> None:
        thread = threading.Thread(target=job, name="other")
        thread.start()
        thread.join()

    def events(self) -> list[dict[str, Any]]:
        self.trace.end({**ABOUT, "at": 1.0})
        return [e for e in read(self.folder)["traceEvents"] if e["ph"] == "X"]


@pytest.fixture
def rank(tmp_path: Path) -> Rank:
    return Rank(tmp_path)


@pytest.fixture
def alone() -> Iterator[Any]:
    from mpi4py import MPI

    comm = MPI.COMM_SELF.Dup()
    yield comm
    comm.Free()


def read(folder: Path) -> dict[str, Any]:
    trace: dict[str, Any] = json.loads(trace_file.merge(folder).read_text())
    return trace


def test_a_wait_in_a_wait_is_one_and_a_wait_in_communication_is_its_part(rank: Rank) -> None:
    trace = rank.trace
    with trace.span("outer", "wait"), trace.span("inner", "wait"):
        pass
    with trace.span("all-reduce of bucket 3 at step 17", "communication"), trace.span("its", "wait"):
        pass
    events = rank.events()
    assert [event["name"] for event in events] == ["outer", "its", "all-reduce"]
    assert events[2]["args"] == {"step": 17, "bucket": 3, "bytes_sent": 0, "bytes_shared": 0}
    assert events[2]["ts"] <= events[1]["ts"]
    assert events[1]["ts"] + events[1]["dur"] <= events[2]["ts"] + events[2]["dur"] + 2e-3


def test_bytes_belong_to_the_innermost_span_of_the_thread(rank: Rank) -> None:
    trace, traffic = rank.trace, rank.traffic

    def job() -> None:
        with trace.span("job", "communication"):
            traffic.sent += 1
            with trace.span("a wait", "wait"):
                traffic.sent += 10
                with trace.span("service", "service"):
                    traffic.shared += 100
            traffic.sent += 1000

    traffic.sent += 5
    rank.elsewhere(job)
    with trace.span("inline", "communication"):
        traffic.sent += 7
    found = {e["name"]: e for e in rank.events()}
    bytes_of = {n: (e["args"].get("bytes_sent"), e["args"].get("bytes_shared")) for n, e in found.items()}
    assert bytes_of == {
        "job": (1011, 0),
        "a wait": (None, None),
        "service": (0, 100),
        "inline": (7, 0),
    }
    assert {name: e["tid"] for name, e in found.items()} == {"job": 1, "a wait": 1, "service": 1, "inline": 0}
    assert read(rank.folder)["otherData"]["ranks"][0]["bytes_sent_elsewhere"] == 5


def test_bytes_of_two_threads_at_once_are_counted_once(rank: Rank) -> None:
    trace, traffic = rank.trace, rank.traffic

    def service() -> None:
        with trace.span("service", "service"):
            traffic.sent += 20

    with trace.span("job", "communication"):
        traffic.sent += 3
        rank.elsewhere(service)
        traffic.sent += 400
    found = {e["name"]: e["args"]["bytes_sent"] for e in rank.events()}
    assert found == {"job": 403, "service": 20}


def test_calls_of_services_that_do_nothing_are_left_out(rank: Rank) -> None:
    for _ in range(50):
        with rank.trace.span("service", "service"):
            pass
    assert len(rank.events()) < 10  # but those that the machine has held up


def test_a_trace_has_an_end_and_says_so(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "LIMIT", 7)
    for step in range(10):
        rank.trace.end_step(step)
    assert [e["args"]["step"] for e in rank.events()] == list(range(7))
    assert read(rank.folder)["otherData"]["ranks"][0]["events_left_out"] == 3


def test_memory_is_bounded_and_events_reach_the_file_meanwhile(rank: Rank) -> None:
    for step in range(3 * trace._UNWRITTEN):
        rank.trace.end_step(step)
        assert len(rank.trace._events) < trace._UNWRITTEN
    events = [e for e in read(rank.folder)["traceEvents"] if e["ph"] == "X"]
    assert len(events) >= 2 * trace._UNWRITTEN


def test_a_line_that_was_cut_off_is_left_out(rank: Rank) -> None:
    rank.trace.end_step(0)
    rank.trace.flush()
    with trace_file.part_of(rank.folder, 0).open("ab") as file:
        file.write(b'[[0, "step", "st')
    trace = read(rank.folder)
    assert [e["name"] for e in trace["traceEvents"] if e["ph"] == "X"] == ["step"]
    assert not trace["otherData"]["ranks"][0]["complete"]


def test_an_earlier_trace_is_kept(rank: Rank) -> None:
    for step in range(3):
        rank.trace.end_step(step)
        rank.trace.flush()
        rank = Rank(rank.folder)
    for step in range(3):
        trace = json.loads((rank.folder / f"trace-{step + 1}.json").read_text())
        assert [e["args"]["step"] for e in trace["traceEvents"] if e["ph"] == "X"] == [step]
    assert not rank.events()


def test_a_trace_does_not_end_a_run(rank: Rank) -> None:
    rank.trace._file.close()
    rank.trace._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    rank.trace.end_step(0)
    with pytest.warns(RuntimeWarning, match="the trace ends here"):
        rank.trace.flush()
    rank.trace._file.close()


def test_where_there_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(HpcsgdError, match="there is no trace"):
        trace_file.merge(tmp_path)
    trace_file.clear(tmp_path)
    trace_file.part_of(tmp_path, 0).write_text("{}\n")
    with pytest.raises(HpcsgdError, match="not a part of a trace"):
        trace_file.merge(tmp_path)


def train(world: World, steps: int) -> None:
    model = torch.nn.Linear(3, 2)
    run = hpcsgd.Run(model, torch.optim.SGD(model.parameters(), 0.1), comm=world)
    for x in run.batches([torch.ones(4, 3)] * steps):
        run.zero_grad()
        model(x).sum().backward()
        run.step()
    run.close()


def test_one_rank_and_a_script_of_ones_own(
    alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCSGD_TRACE", str(tmp_path))
    with World(alone, device="cpu") as world:
        train(world, 3)
    events = [e for e in read(tmp_path)["traceEvents"] if e["ph"] == "X" and e["tid"] == 0]
    names = [e["name"] for e in sorted(events, key=lambda e: (e["ts"], -e["dur"])) if e["cat"] != "wait"]
    assert names[:15] == ["step", "batch", "forward", "backward", "update"] * 3
    assert [e["args"]["step"] for e in events if e["cat"] == "step"] == [0, 1, 2]
    assert not (tmp_path / "trace-parts").exists()


def test_a_trace_that_cannot_be_merged_does_not_end_a_run(alone: Any, tmp_path: Path) -> None:
    with World(alone, device="cpu") as world:
        world.trace_into(tmp_path)
        (tmp_path / "trace.partial").mkdir()
        with pytest.warns(RuntimeWarning, match="stay apart"):
            world.close()
    (tmp_path / "trace.partial").rmdir()
    assert read(tmp_path)["otherData"]["ranks"][0]["complete"]


def test_without_a_trace_nothing_is_written(alone: Any, tmp_path: Path) -> None:
    with World(alone, device="cpu") as world:
        assert type(world.trace) is Off and not world.trace.on
        train(world, 2)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(alone: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with World(alone, device="cpu") as world:
        with pytest.raises(HpcsgdError, match="file"):
            world.trace_into(tmp_path / "file")
        assert not world.trace.on
