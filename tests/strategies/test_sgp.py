"""Weights of push-sum, and the mean of the models, which SGP preserves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpcsgd import SGP, Run, topology
from hpcsgd.strategies.push_sum import PushSumWeights

SPECS = ("ring", "star", "exponential", "one-peer-exponential", "base", "random-regular:degree=3", "torus")


@pytest.mark.parametrize("size", [1, 2, 3, 6, 8, 49])
@pytest.mark.parametrize("name", ["ring", "exponential", "one-peer-exponential", "complete"])
def test_weights_stay_exactly_one_with_as_many_readers_as_sources(name: str, size: int) -> None:
    weights = PushSumWeights(topology.build(name, size))
    for step in range(50):
        weights.push(step)
        assert np.all(weights.local == 1) and not np.any(weights.in_flight)


@pytest.mark.parametrize("delay", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_weights_add_up_to_the_number_of_peers(name: str, delay: bool) -> None:
    weights = PushSumWeights(topology.build(name, 8))
    for step in range(50):
        (weights.push_with_delay if delay else weights.push)(step)
        assert np.all(weights.local > 0) and np.all(weights.in_flight >= -1e-15)
        np.testing.assert_allclose(weights.local.sum() + weights.in_flight.sum(), 8, rtol=1e-14)
    assert np.any(weights.in_flight > 0) == delay


@pytest.mark.mpi
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", ["star", "one-peer-exponential"])
def test_without_steps_all_models_become_the_mean(world: Any, name: str, overlap: bool) -> None:
    model = nn.Linear(3, 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    with Run(model, optimizer, SGP(name, overlap), comm=world) as run:
        start = model.weight.detach().clone()
        for step in range(80):
            for parameter in model.parameters():
                # A step of size 1 away from the common start, then none.
                parameter.grad = torch.full_like(parameter, -world.rank if step == 0 else 0.0)
            run.step()
        mean = (world.size - 1) / 2
        np.testing.assert_allclose((model.weight.detach() - start).numpy(force=True), mean, atol=1e-6)
        assert run.consensus_distance() < 1e-6
