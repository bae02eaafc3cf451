"""The benchmark of the trace: it runs, and its confidence intervals have the nominal coverage."""

from __future__ import annotations

import numpy as np
import pytest
from mpi4py import MPI

from hpcsgd.commands.bench import trace
from hpcsgd.commands.bench.options import TraceOptions


@pytest.mark.mpi
def test_a_table_of_steps_with_and_without_a_trace(capfd: pytest.CaptureFixture[str]) -> None:
    trace.main(TraceOptions("logistic", batch=2, repeats=2, steps=2))
    printed = capfd.readouterr().out
    assert ("events" in printed) == (MPI.COMM_WORLD.rank == 0)


def test_the_bounds_hold_the_median_in_95_of_100_samples() -> None:
    random, held = np.random.default_rng(0), 0
    for _ in range(2000):
        median, low, high = trace._median(np.sort(random.lognormal(size=40)))
        assert low <= median <= high
        held += low <= 1 <= high
    assert 0.93 < held / 2000 <= 1
