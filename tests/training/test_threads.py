"""Compute threads of a run: a share of the cores, the user's own number, and the former one at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from hpcsgd import Run
from hpcsgd.training import threads


@pytest.fixture
def default(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The number of threads with which torch seems to have begun."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "_defaults", lambda: {7})
    torch.set_num_threads(7)
    yield 7
    torch.set_num_threads(before)


def run_of(world: Any) -> Run:
    model = nn.Linear(2, 1)
    return Run(model, torch.optim.SGD(model.parameters(), 0.1), comm=world)


@pytest.mark.mpi
def test_threads_are_a_share_of_the_cores_until_close(world: Any, default: int) -> None:
    with run_of(world):
        alone = world.local_size == 1
        assert torch.get_num_threads() == (default if alone else world.local.threads)
    assert torch.get_num_threads() == default


@pytest.mark.mpi
def test_a_number_that_the_user_has_set_stays(world: Any, default: int) -> None:
    torch.set_num_threads(3)
    with run_of(world):
        assert torch.get_num_threads() == 3
    torch.set_num_threads(default)
    with run_of(world):
        torch.set_num_threads(3)
    assert torch.get_num_threads() == 3
