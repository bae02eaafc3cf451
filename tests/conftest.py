"""The suite on any number of ranks: tests marked mpi run on all, each other test on one rank.

A test that does not end within its deadline, 60 seconds or its mark `timeout(seconds)`, prints the
stacks of every rank and ends the job.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# Before torch is imported: ranks outnumber cores, and sums must depend on the input only.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.support.devices import reason_to_skip, use_device
from tests.support.rank_runner import Ranks
from tests.support.watchdog import Watchdog
from tests.support.worlds import worlds


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        help="device of models: cpu (default), cuda, or standin, a GPU whose work is late and out of order",
    )
    # Of tests/faults/chaos: pytest reads options of this folder alone before it collects.
    parser.addoption("--chaos-seed", type=int, help="seed of the trial of faults; default: a random one")
    parser.addoption("--chaos-seconds", type=float, help="its length in seconds; default: 60")
    parser.addoption("--chaos-faults", type=int, help="number of its faults at most; default: no limit")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    use_device(config.getoption("--device"))
    ranks = Ranks(Watchdog)
    if ranks.rank:
        # Silenced, not removed: pytest reads its colours when it formats a failure.
        reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
        reporter._tw._file = open(os.devnull, "w")  # noqa: SIM115
    config.pluginmanager.register(ranks, "ranks")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device = config.getoption("--device")
    for item in items:
        reason = reason_to_skip(item, device)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def world() -> Any:
    """A `hpcsgd.World` of all ranks, shared by the tests."""
    return worlds.get()


@pytest.fixture
def world_of() -> Callable[..., Any]:
    """`world_of(per_node=2)`: as if on nodes of so many ranks; `shared=False`: no shared memory."""
    return worlds.get


@pytest.fixture
def alone() -> Iterator[Any]:
    """A world of this rank alone."""
    import torch
    from mpi4py import MPI

    from hpcsgd import World

    with World(MPI.COMM_SELF, timeout=20, device=str(torch.get_default_device())) as world:
        yield world
