"""Events and bytes of a traced rank, their limits, and the merged file."""

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
from hpcsgd.commands.report.timeline import timeline
from hpcsgd.diagnostics import trace, trace_file
from hpcsgd.diagnostics.activity import ActivityRecord
from hpcsgd.diagnostics.trace import NullTracer, Tracer
from hpcsgd.diagnostics.traffic import Traffic

HEADER = {"rank": 0, "host": "here", "at": 0.0, "offset": 0.0, "error": 0.0}


class Rank:
    """A tracer that distinguishes threads by name."""

    def __init__(self, folder: Path) -> None:
        trace_file.clear(folder)
        self.folder, self.traffic = folder, Traffic()
        file = trace_file.part_of(folder, 0).open("wb", buffering=0)
        self.tracer = Tracer(
            file, HEADER, self.traffic, ActivityRecord(), lambda: threading.current_thread().name == "other"
        )

    def in_other_thread(self, job: Any) -> None:
        thread = threading.Thread(target=job, name="other")
        thread.start()
        thread.join()

    def events(self) -> list[dict[str, Any]]:
        self.tracer.end({**HEADER, "at": 1.0})
        return [e for e in read(self.folder)["traceEvents"] if e["ph"] == "X"]


@pytest.fixture
def rank(tmp_path: Path) -> Rank:
    return Rank(tmp_path)


@pytest.fixture
def single() -> Iterator[Any]:
    from mpi4py import MPI

    comm = MPI.COMM_SELF.Dup()
    yield comm
    comm.Free()


def read(folder: Path) -> dict[str, Any]:
    trace: dict[str, Any] = json.loads(trace_file.merge(folder).read_text())
    return trace


def test_nested_waits_are_one_event_and_a_wait_in_communication_is_nested(rank: Rank) -> None:
    tracer = rank.tracer
    with tracer.span("outer", "wait"), tracer.span("inner", "wait"):
        pass
    with tracer.span("all-reduce of bucket 3 at step 17", "communication"), tracer.span("its", "wait"):
        pass
    events = rank.events()
    assert [event["name"] for event in events] == ["outer", "its", "all-reduce"]
    assert events[2]["args"] == {"step": 17, "bucket": 3, "bytes_sent": 0, "bytes_shared": 0}
    assert events[2]["ts"] <= events[1]["ts"]
    assert events[1]["ts"] + events[1]["dur"] <= events[2]["ts"] + events[2]["dur"] + 2e-3


def test_bytes_belong_to_the_innermost_span_of_the_thread(rank: Rank) -> None:
    tracer, traffic = rank.tracer, rank.traffic

    def job() -> None:
        with tracer.span("job", "communication"):
            traffic.count(sent=1)
            with tracer.span("a wait", "wait"):
                traffic.count(sent=10)
                with tracer.span("service", "service"):
                    traffic.count(shared=100)
            traffic.count(sent=1000)

    traffic.count(sent=5)
    rank.in_other_thread(job)
    with tracer.span("inline", "communication"):
        traffic.count(sent=7)
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
    tracer, traffic = rank.tracer, rank.traffic

    def service() -> None:
        with tracer.span("service", "service"):
            traffic.count(sent=20)

    with tracer.span("job", "communication"):
        traffic.count(sent=3)
        rank.in_other_thread(service)
        traffic.count(sent=400)
    found = {e["name"]: e["args"]["bytes_sent"] for e in rank.events()}
    assert found == {"job": 403, "service": 20}


def test_short_steps_of_idle_services_are_not_recorded(rank: Rank) -> None:
    for _ in range(50):
        with rank.tracer.span("service", "service"):
            pass
    assert len(rank.events()) < 10  # except calls that the machine has delayed


def test_a_trace_is_limited_and_counts_the_omitted_events(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "EVENT_LIMIT", 7)
    for step in range(10):
        rank.tracer.end_step(step)
    assert [e["args"]["step"] for e in rank.events()] == list(range(7))
    assert read(rank.folder)["otherData"]["ranks"][0]["events_left_out"] == 3


def test_the_buffer_is_bounded_and_flushed(rank: Rank) -> None:
    for step in range(3 * trace._BUFFERED_EVENTS):
        rank.tracer.end_step(step)
        assert len(rank.tracer._events) < trace._BUFFERED_EVENTS
    events = [e for e in read(rank.folder)["traceEvents"] if e["ph"] == "X"]
    assert len(events) >= 2 * trace._BUFFERED_EVENTS


def test_a_line_that_is_cut_off_is_omitted(rank: Rank) -> None:
    rank.tracer.end_step(0)
    rank.tracer.flush()
    with trace_file.part_of(rank.folder, 0).open("ab") as file:
        file.write(b'[[0, "step", "st')
    trace = read(rank.folder)
    assert [e["name"] for e in trace["traceEvents"] if e["ph"] == "X"] == ["step"]
    assert not trace["otherData"]["ranks"][0]["complete"]


def test_every_row_names_its_rank(tmp_path: Path) -> None:
    trace_file.clear(tmp_path)
    for number in (0, 3):
        events = [[thread, "step", "step", 0.1, 0.2, 0] for thread in (0, 1)]
        lines = [{**HEADER, "rank": number}, events, {**HEADER, "at": 1.0}]
        trace_file.part_of(tmp_path, number).write_text("".join(json.dumps(line) + "\n" for line in lines))
    trace = read(tmp_path)["traceEvents"]
    rows = {(e["pid"], e["tid"]) for e in trace if e["ph"] == "X"}
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in trace if e["name"] == "thread_name"}
    assert rows == {*names} and len(rows) == 4
    assert all(name.startswith(f"rank {number}: ") for (number, _), name in names.items())
    labels = [label.get_text() for label in timeline(tmp_path / "trace.json").axes[0].get_yticklabels()]
    threads = ("compute", "communication")
    assert labels == [f"rank {number}, here: {thread}" for number in (0, 3) for thread in threads]


def test_an_earlier_trace_is_renamed(rank: Rank) -> None:
    for step in range(3):
        rank.tracer.end_step(step)
        rank.tracer.flush()
        rank = Rank(rank.folder)
    for step in range(3):
        trace = json.loads((rank.folder / f"trace-{step + 1}.json").read_text())
        assert [e["args"]["step"] for e in trace["traceEvents"] if e["ph"] == "X"] == [step]
    assert not rank.events()


def test_a_full_disk_ends_the_trace_with_a_warning(rank: Rank) -> None:
    rank.tracer._file.close()
    rank.tracer._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    rank.tracer.end_step(0)
    with pytest.warns(RuntimeWarning, match="the trace ends here"):
        rank.tracer.flush()
    rank.tracer._file.close()


def test_merge_without_a_trace_is_an_error(tmp_path: Path) -> None:
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


def test_hpcsgd_trace_traces_a_script(single: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCSGD_TRACE", str(tmp_path))
    with World(single, device="cpu") as world:
        train(world, 3)
    events = [e for e in read(tmp_path)["traceEvents"] if e["ph"] == "X" and e["tid"] == 0]
    names = [e["name"] for e in sorted(events, key=lambda e: (e["ts"], -e["dur"])) if e["cat"] != "wait"]
    assert names[:15] == ["step", "batch", "forward", "backward", "update"] * 3
    assert [e["args"]["step"] for e in events if e["cat"] == "step"] == [0, 1, 2]
    assert not (tmp_path / "trace-parts").exists()


def test_a_failed_merge_is_a_warning(single: Any, tmp_path: Path) -> None:
    with World(single, device="cpu") as world:
        world.start_trace(tmp_path)
        (tmp_path / "trace.partial").mkdir()
        with pytest.warns(RuntimeWarning, match="parts of the trace were not merged"):
            world.close()
    (tmp_path / "trace.partial").rmdir()
    assert read(tmp_path)["otherData"]["ranks"][0]["complete"]


def test_without_a_trace_nothing_is_written(single: Any, tmp_path: Path) -> None:
    with World(single, device="cpu") as world:
        assert type(world.tracer) is NullTracer and not world.tracer.on
        train(world, 2)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(single: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with World(single, device="cpu") as world:
        with pytest.raises(HpcsgdError, match="file"):
            world.start_trace(tmp_path / "file")
        assert not world.tracer.on
