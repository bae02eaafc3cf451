"""The load of other programs is what runs now, without the ranks."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace
from typing import cast

import pytest

from hpcsgd.commands.doctor import load
from hpcsgd.commands.doctor.ranks import ExaminedJob
from hpcsgd.diagnostics import procfs

ALONE = cast(ExaminedJob, SimpleNamespace(node_comm=None, leader=True, barrier=lambda: None))


def test_the_load_is_measured_without_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    readings, times = iter([{0: 10.0, 1: 20.0}, {0: 10.3, 1: 20.6}]), iter([100.0, 100.6, 100.6])

    def shares(pids: list[int], seconds: float) -> dict[int, float]:
        assert pids == [7, 8, 9]
        return {7: 0.05, 8: 0.6, 9: 1.2}

    monkeypatch.setattr(procfs, "busy_seconds", lambda: next(readings))
    monkeypatch.setattr(procfs, "processes", lambda: [7, 8, 9, os.getpid()])
    monkeypatch.setattr(procfs, "name", lambda pid: f"program {pid}")
    monkeypatch.setattr(procfs, "load", shares)
    clocks = SimpleNamespace(monotonic=lambda: next(times), process_time=lambda: 0.0)
    monkeypatch.setattr(load, "time", clocks)
    facts = load.collect(ALONE)
    assert facts["busy cores"] == pytest.approx({0: 0.5, 1: 1.0})
    assert facts["programs"] == [("program 9", 9, 1.2), ("program 8", 8, 0.6)]
    assert facts["own cores"] == 0


def test_the_seconds_of_cores_grow_with_what_runs() -> None:
    before, started = procfs.busy_seconds(), time.process_time()
    while time.process_time() < started + 0.2:
        pass
    after = procfs.busy_seconds()
    assert before.keys() == after.keys() and before
    assert sum(after.values()) - sum(before.values()) > 0.1
