"""`hpcsgd train --trace`: the events of several methods, and the file after a rank was killed."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hpcsgd import BadOption, HpcsgdError
from hpcsgd.commands.cli import cli
from hpcsgd.diagnostics import trace_file
from tests.support.launch import CLI, launch
from tests.support.train_jobs import records, trained

Event = dict[str, Any]
Trace = dict[str, Any]

RANKS = 2
RUNS = {
    "allreduce": "--epochs 0.5 --bucket-mib 0.05",
    "compressed": "--epochs 0.3 --bucket-mib 0.05 --compress maxnorm:bits=4 --algorithm ring",
    "lasgd": "--epochs 0.5 --strategy lasgd:period=4",
    "dsgd": "--epochs 0.3 --strategy dsgd:topology=ring",
    "ps": "--epochs 0.5 --strategy ps:mode=async",
}
UNTRACED = "untraced"

#: Clocks that are hours apart and go wrong; and what was moved while the trace was on.
PRELUDE = """
import json, time
from hpcsgd.mpi import launcher
from hpcsgd.mpi.world import World

RIGHT, RANK = time.perf_counter, launcher.rank()
time.perf_counter = lambda: 5000.0 * RANK + RIGHT() * (1 + 1e-4 * RANK)
traced, untraced = World.start_trace, World._end_trace

def start_trace(world, folder):
    traced(world, folder)
    world.before = world.traffic.sent, world.traffic.shared

def end_trace(world):
    if world.tracer.on:
        moved = world.traffic.sent - world.before[0], world.traffic.shared - world.before[1]
        (world.trace_folder / f"moved-{RANK}.json").write_text(json.dumps(moved))
    untraced(world)

World.start_trace, World._end_trace = start_trace, end_trace
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    commands = [f"--trace --name {name} {options}" for name, options in RUNS.items()]
    trained(folder, RANKS, *commands, f"--name {UNTRACED} --epochs 0.1", prelude=PRELUDE)
    return folder


pytestmark = pytest.mark.together


def read(folder: Path) -> Trace:
    trace: Trace = json.loads((folder / "trace.json").read_text())
    return trace


def spans(trace: Trace, **wanted: object) -> list[Event]:
    """The complete events, by start."""
    found = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    found = [e for e in found if all(e[key] == value for key, value in wanted.items())]
    return sorted(found, key=lambda e: (e["ts"], -e["dur"]))


def check_nesting(events: list[Event]) -> None:
    around: list[float] = []
    for event in events:
        begin, end = event["ts"], event["ts"] + event["dur"]
        while around and around[-1] <= begin + 1e-3:
            around.pop()
        assert not around or end <= around[-1] + 2e-3, event
        around.append(end)


@pytest.mark.timeout(170)
@pytest.mark.parametrize("name", RUNS)
def test_events_lie_in_each_other_or_apart(runs: Path, name: str) -> None:
    trace = read(runs / name)
    assert {e["ph"] for e in trace["traceEvents"]} == {"X", "M"}
    for rank in range(RANKS):
        for lane in (0, 1):
            events = spans(trace, pid=rank, tid=lane)
            serves = name == "ps" and rank == RANKS - 1  # in its compute thread
            assert events or (serves and lane == 1)
            assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in events)
            check_nesting(events)


@pytest.mark.parametrize("name", RUNS)
def test_each_byte_is_counted_once(runs: Path, name: str) -> None:
    trace = read(runs / name)
    for rank, about in enumerate(trace["otherData"]["ranks"]):
        events = [e["args"] for e in spans(trace, pid=rank) if "bytes_sent" in e["args"]]
        found = [sum(args[key] for args in events) for key in ("bytes_sent", "bytes_shared")]
        assert found == json.loads((runs / name / f"moved-{rank}.json").read_text())
        assert about["bytes_sent_elsewhere"] == about["bytes_shared_elsewhere"] == 0
        assert about["complete"] and about["events_left_out"] == 0 and about["rank"] == rank


@pytest.mark.parametrize("name", RUNS)
def test_every_step_is_there_once(runs: Path, name: str) -> None:
    trace, taken = read(runs / name), records(runs / name)[-1]["gradients"]
    for rank in range(RANKS):
        steps = spans(trace, pid=rank, cat="step")
        assert len(steps) == taken[rank]
        if name not in ("lasgd", "ps"):
            assert [e["args"]["step"] for e in steps] == list(range(taken[rank]))
        passes = Counter(e["name"] for e in spans(trace, pid=rank, cat="compute"))
        assert passes["backward"] == taken[rank] <= passes["batch"]


def test_a_step_holds_its_passes_and_its_communication(runs: Path) -> None:
    trace = read(runs / "allreduce")
    for rank in range(RANKS):
        inside = ("batch", "forward", "backward", "update")
        for step in spans(trace, pid=rank, cat="step"):
            number, end = step["args"]["step"], step["ts"] + step["dur"]
            found = [e for e in spans(trace, pid=rank, tid=0, cat="compute") if step["ts"] <= e["ts"] < end]
            assert tuple(e["name"] for e in found) == inside
            reduced = spans(trace, pid=rank, cat="communication", name="all-reduce")
            reduced = [e for e in reduced if e["args"]["step"] == number and e["tid"] == 1]
            assert [e["args"]["bucket"] for e in reduced] == list(range(len(reduced))) and len(reduced) > 1
            backward, update = found[2], found[3]
            assert all(backward["ts"] < e["ts"] and e["ts"] + e["dur"] < update["ts"] for e in reduced)


def test_nothing_is_reduced_before_all_have_come(runs: Path) -> None:
    """On the clock of rank 0 an all-reduce ends on no rank before it has begun on all."""
    trace = read(runs / "allreduce")
    error = max(about["clock_error_us"] for about in trace["otherData"]["ranks"])
    assert 0 < error < 5e3
    together = defaultdict(list)
    for rank in range(RANKS):
        seen: Counter[tuple[int, int]] = Counter()
        for event in spans(trace, pid=rank, cat="communication", name="all-reduce"):
            key = event["args"]["bucket"], event["args"]["step"]
            seen[key] += 1
            together[*key, seen[key]].append((event["ts"], event["ts"] + event["dur"]))
    assert len(together) > 20
    for parts in together.values():
        assert len(parts) == RANKS
        assert max(begin for begin, _ in parts) <= min(end for _, end in parts) + 2 * error


def test_codecs_work_inside_the_compressed_all_reduce(runs: Path) -> None:
    trace = read(runs / "compressed")
    for rank in range(RANKS):
        codec = spans(trace, pid=rank, cat="codec")
        assert {e["name"] for e in codec} == {"encode", "decode"}
        assert all(e["tid"] == 1 and "bucket" in e["args"] for e in codec)


def test_without_the_option_there_is_no_file(runs: Path) -> None:
    assert (runs / UNTRACED / "metrics.jsonl").exists()
    assert not list((runs / UNTRACED).glob("trace*"))


def test_a_picture_of_some_steps(runs: Path, tmp_path: Path) -> None:
    png, run = tmp_path / "trace.png", str(runs / "allreduce")
    cli.main(["trace", run, "--png", str(png), "--steps", "2:4"], standalone_mode=False)
    assert png.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BadOption, match="steps 0 to") as error:
        cli.main(["trace", run, "--png", str(png), "--steps", "900:901"], standalone_mode=False)
    assert "900 to 901" in str(error.value)
    with pytest.raises(HpcsgdError, match="there is no trace"):
        cli.main(["trace", str(tmp_path)], standalone_mode=False)


KILLED = """
import math, os, signal, time
from torch import nn

class Deadly(nn.Sequential):
    def forward(self, x):
        time.sleep(0.02)
        if os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK")) == "1":
            self.passes = getattr(self, "passes", 0) + 1
            if self.passes == 40:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)

def deadly(shape: tuple[int, ...], classes: int) -> nn.Module:
    return Deadly(nn.Flatten(), nn.Linear(math.prod(shape), classes))

sys.modules["deadly"] = sys.modules["__main__"]
main()
"""


@pytest.mark.long
@pytest.mark.timeout(60)
def test_what_a_killed_rank_has_written_is_merged(tmp_path: Path) -> None:
    options = ("train", "--trace", "--model", "deadly:deadly", "--out", str(tmp_path), "--name", "run")
    job = launch(CLI + KILLED, 2, *options)
    assert job.returncode != 0 and not job.timed_out, job
    trace = json.loads(trace_file.merge(tmp_path / "run").read_text())
    assert not (tmp_path / "run" / "trace-parts").exists()
    assert [about["complete"] for about in trace["otherData"]["ranks"]] == [False, False]
    for rank in range(2):
        steps = [e["args"]["step"] for e in spans(trace, pid=rank, cat="step")]
        assert steps == list(range(len(steps))) and len(steps) > 5
        for lane in (0, 1):
            check_nesting(spans(trace, pid=rank, tid=lane))
    assert all(a["ts"] <= b["ts"] for a, b in pairwise(spans(trace, cat="step")))
