"""Methods whose results depend on time are marked; bytes count in the step that waits for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hpcsgd import ADPSGD, LASGD, BackupWorkers, ParameterServer, Run, Strategy
from hpcsgd.strategies.step_work import StepWork
from tests.support import strategy_rows as s

IN_TIME: list[Callable[[], Strategy]] = [
    LASGD,
    lambda: ADPSGD("star"),
    lambda: BackupWorkers("complete"),
    lambda: ParameterServer("async"),
    lambda: ParameterServer("elastic", max_staleness=0),
]


@pytest.mark.mpi
@pytest.mark.parametrize("make", IN_TIME)
def test_a_method_whose_results_depend_on_time_is_not_deterministic(
    world: Any, make: Callable[[], Strategy]
) -> None:
    model, strategy = s.regression(), make()
    with Run(model, torch.optim.SGD(model.parameters(), s.LR), strategy, comm=world):
        assert strategy.deterministic == (world.size == 1)


def test_bytes_of_step_work_count_once_and_when_it_is_waited_for(alone: Any) -> None:
    traffic, gate = alone.traffic, threading.Event()
    before, total = traffic.of_steps(), traffic.shared

    def job() -> None:
        traffic.count(shared=1)
        assert gate.wait(30)
        traffic.count(shared=2)

    work = StepWork(alone, "a job", job)
    traffic.count(shared=10)  # by the other thread, meanwhile
    gate.set()
    alone.progress.drain()
    assert traffic.shared == total + 13
    assert [now.shared - then.shared for now, then in zip(traffic.of_steps(), before, strict=True)] == [10, 0]
    for _ in range(2):
        work.wait()
        found = [now.shared - then.shared for now, then in zip(traffic.of_steps(), before, strict=True)]
        assert found == [10, 3]
