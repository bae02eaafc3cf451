"""`consensus_distance` changes no model, whichever peer each rank has in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpcsgd import DSGD, Run
from tests.support.devices import normal

pytestmark = pytest.mark.mpi

EACH, FEATURES = 3, 8000  # larger than the buffers of small messages


@pytest.mark.parametrize("shared", [True, False])
def test_consensus_distance_with_different_current_peers(world_of: Any, shared: bool) -> None:
    world = world_of(shared=shared)
    model = torch.nn.Linear(FEATURES, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Run(model, optimizer, DSGD(topology="ring"), comm=world, virtual_nodes=EACH * world.size) as run:
        own = {peer: normal(FEATURES + 1, seed=peer) for peer in run.peers}
        for peer in run.each_peer():
            with torch.no_grad():
                model.weight.copy_(own[peer][:-1]), model.bias.copy_(own[peer][-1:])
        everyone = torch.stack([normal(FEATURES + 1, seed=peer) for peer in range(EACH * world.size)])
        expected = float((everyone - everyone.mean(0)).square().sum(1).mean().sqrt())
        current = world.rank % EACH
        for index, _ in enumerate(run.each_peer()):
            if index == current:  # this peer stays in place
                break
        assert run.consensus_distance() == pytest.approx(expected, rel=1e-5)
        for peer in run.each_peer():
            assert torch.equal(torch.nn.utils.parameters_to_vector(model.parameters()), own[peer])
