"""Virtual nodes: several peers on a rank have the bits of as many ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hpcsgd import BadOption, Run, World
from hpcsgd.strategies import STRATEGIES
from hpcsgd.training import rng_state
from tests.support import strategy_rows as s

#: One row of each gossip method at least.
ROWS = [row for row in s.ROWS if row.make().accepts_virtual_nodes]
OTHERS = [row for row in s.ROWS if row not in ROWS]


class Noisy(nn.Module):
    """A module with dropout, running statistics, and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.Sequential(
            nn.Linear(s.FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1)
        )
        self.never = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def begin(row: s.Row, world: World, virtual_nodes: int | None) -> Run:
    model = Noisy()
    optimizer = torch.optim.SGD(model.parameters(), s.LR, momentum=0.9)
    run = Run(model, optimizer, row.make(), comm=world, virtual_nodes=virtual_nodes)
    for peer in run.each_peer():
        rng_state.seed(100 + peer)
    return run


def train(run: Run, first: int, steps: int) -> None:
    loaders = [
        [(x.float(), y.float()) for x, y in s.batches_of(peer, steps, first)][: steps - (peer == 1)]
        for peer in run.peers
    ]
    for x, y in run.batches(loaders if len(loaders) > 1 else loaders[0], steps=steps):
        run.zero_grad()
        nn.functional.mse_loss(run.model(x), y).backward()
        run.step()


def everything(run: Run) -> dict[int, dict[str, torch.Tensor]]:
    """Return parameters and buffers of all peers."""
    own = {peer: copy.deepcopy(run.model.state_dict()) for peer in run.each_peer()}
    return {peer: state for states in run.world.gather(own) for peer, state in states.items()}


def same(some: dict[int, Any], others: dict[int, Any]) -> None:
    assert sorted(some) == sorted(others)
    for peer, state in some.items():
        for name, value in state.items():
            assert torch.equal(value, others[peer][name]), f"{name} of peer {peer}"


@pytest.mark.mpi
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_peers_have_the_bits_of_ranks_wherever_they_live(
    world: Any, world_of: Callable[..., Any], alone: Any, row: s.Row
) -> None:
    def final(where: World, virtual_nodes: int | None) -> dict[int, dict[str, torch.Tensor]]:
        with begin(row, where, virtual_nodes) as run:
            train(run, 0, 3)
            train(run, 3, 2)
            return everything(run)

    real = final(world, None)
    double = final(world, 2 * world.size)
    same(double, final(world_of(2, False), 2 * world.size))
    if world.rank == 0:  # All have the states of all; one simulates them, and has the cores.
        same(real, final(alone, world.size))
        same(double, final(alone, 2 * world.size))


@pytest.mark.mpi
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_save_resume_and_go_on_with_virtual_nodes(world: Any, row: s.Row) -> None:
    nodes = 2 * world.size
    with begin(row, world, nodes) as straight:
        train(straight, 0, 3)
        state = copy.deepcopy(straight.state_dict())
        train(straight, 3, 3)
        expected = everything(straight)
    with begin(row, world, nodes) as second:
        train(second, 7, 2)
        second.load_state_dict(state)
        train(second, 3, 3)
        same(expected, everything(second))


@pytest.mark.mpi
@pytest.mark.parametrize("row", OTHERS, ids=str)
def test_other_methods_reject_virtual_nodes(world: Any, row: s.Row) -> None:
    with pytest.raises(BadOption, match="no virtual nodes"):
        begin(row, world, 2 * world.size)


@pytest.mark.mpi(min_size=2)
def test_numbers_of_nodes_that_ranks_do_not_divide_are_rejected(world: Any) -> None:
    with pytest.raises(BadOption, match=f"multiple of the number of ranks, {world.size}"):
        begin(ROWS[0], world, world.size + 1)


@pytest.mark.mpi
def test_each_virtual_node_has_a_loader(world: Any) -> None:
    with begin(ROWS[0], world, 2 * world.size) as run:
        for wrong in ([], [[]], iter("ab")):
            with pytest.raises(BadOption, match="need a loader each"):
                run.batches(wrong)  # type: ignore[arg-type]


def test_every_method_either_has_or_rejects_virtual_nodes() -> None:
    assert {row.name for row in ROWS} | {row.name for row in OTHERS} == set(STRATEGIES)
