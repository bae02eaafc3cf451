"""Sums are exact, totals continue across pauses and resumes, the file has each step once."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hpcsgd.commands.train.metrics import FILE, Counters, Meter, MetricsWriter, Sums, counter_fields
from hpcsgd.diagnostics.traffic import Moved, Traffic


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing it takes seconds."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def fake_world() -> Any:
    progress = SimpleNamespace(wait_seconds=5.0, busy_seconds=7.0)
    traffic = Traffic()
    traffic.count(sent=100, shared=200, saved=300)
    return SimpleNamespace(progress=progress, traffic=traffic)


def test_sums_of_parts_give_the_mean_of_the_whole() -> None:
    parts = [Sums(3.0, 2, 4, 4), Sums(5.0, 0, 1, 1), Sums()]
    total = sum(parts, Sums())
    assert total == Sums(8.0, 2, 5, 5)
    assert (total.mean_loss, total.accuracy) == (8 / 5, 2 / 5)


def test_sums_of_nothing_have_no_mean() -> None:
    assert math.isnan(Sums().mean_loss) and math.isnan(Sums().accuracy)


def test_meter_adds_to_the_totals_of_earlier_parts() -> None:
    world = fake_world()
    meter = Meter(world, Counters(10.0, 1.0, 2.0, 30, 40, 50, 60))
    meter.gradients += 4
    world.progress.wait_seconds += 0.25
    world.progress.busy_seconds += 0.5
    world.traffic.count(sent=1, shared=2, saved=3)
    found = meter.read()
    assert 10.0 < found.seconds < 11.0
    assert (found.wait_seconds, found.communication_seconds) == (1.25, 2.5)
    assert (found.bytes_sent, found.bytes_shared, found.bytes_saved) == (31, 42, 53)
    assert found.gradients == meter.gradients == 64


def test_a_meter_leaves_pauses_out() -> None:
    world = fake_world()
    meter = Meter(world, Counters())
    meter.gradients = 3
    before = meter.read()
    with pytest.raises(KeyError), meter.paused():
        world.traffic.count(sent=1000)
        assert meter.read().bytes_sent == before.bytes_sent
        world.progress.wait_seconds += 9.0
        time.sleep(0.2)
        raise KeyError
    world.traffic.count(sent=1)
    after = meter.read()
    assert after.gradients == 3 and after.bytes_sent == before.bytes_sent + 1
    assert after.wait_seconds == before.wait_seconds
    assert 0 < after.seconds - before.seconds < 0.15


def test_bytes_in_flight_count_when_a_step_uses_them_also_in_a_pause() -> None:
    world = fake_world()
    meter, moved = Meter(world, Counters()), Moved()
    with world.traffic.counted_ahead(moved):
        world.traffic.count(shared=40)
        with meter.paused():
            world.traffic.count(shared=2, saved=1)
    assert (world.traffic.shared, meter.read().bytes_shared) == (242, 0)
    with meter.paused():
        world.traffic.use(moved)
        assert meter.read().bytes_shared == 42
    assert (meter.read().bytes_shared, meter.read().bytes_saved) == (42, 1)


def test_computing_is_what_is_not_waiting() -> None:
    found = counter_fields([Counters(3.0, 1.0, 2.0, 5, 6, 13, 3), Counters(3.0, 0.5, 2.5, 7, 8, 26, 4)])
    assert found == {
        "compression_ratio": 2.5,  # (26 moved + 39 saved) / 26
        "bytes_sent": [5, 7],
        "bytes_shared": [6, 8],
        "bytes_saved": [13, 26],
        "compute_seconds": [2.0, 2.5],
        "wait_seconds": [1.0, 0.5],
        "communication_seconds": [2.0, 2.5],
        "gradients": [3, 4],
    }


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / FILE).read_text().splitlines()]


def test_a_record_is_in_the_file_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    for step in (1, 2):
        writer.write({"event": "train", "step": step, "loss": math.nan})
        assert steps(tmp_path)[-1] == step
    writer.close()


def test_resuming_drops_what_will_be_recorded_again(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    for step in (1, 2, 2, 3, 4):
        writer.write({"event": "train", "step": step})
    writer.close()
    with (tmp_path / FILE).open("a") as file:
        file.write('{"event": "train", "st')  # a run that was killed while it wrote
    writer = MetricsWriter(tmp_path, 2)
    assert steps(tmp_path) == [1, 2, 2]
    writer.write({"event": "test", "step": 3})
    writer.close()
    assert steps(tmp_path) == [1, 2, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_tensorboard_gets_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append((folder, purge_step))

        def add_scalar(self, *row: Any) -> None:
            calls.append(row)

        def close(self) -> None:
            calls.append("closed")

    module: Any = ModuleType("tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    writer = MetricsWriter(tmp_path, 0)
    writer.write({"event": "test", "step": 4, "loss": 0.5, "accuracy": 1, "bytes_sent": [1, 2]})
    writer.close()
    assert calls == [(str(tmp_path), 1), ("test/loss", 0.5, 4), ("test/accuracy", 1, 4), "closed"]
