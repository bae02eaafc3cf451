"""Every strategy: parameters that moved to other memory, the model after the close, and a default device."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpcsgd import DSGD, HpcsgdError, Teleportation
from tests.support import strategy_rows as s
from tests.support.devices import restore_default_device

pytestmark = pytest.mark.mpi
each_row = pytest.mark.parametrize("row", s.ROWS, ids=str)


def move(model: nn.Module) -> None:
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()), model.parameters())


@each_row
def test_moved_parameters_are_trained_on_and_the_close_leaves_the_consensus(world: Any, row: s.Row) -> None:
    run = s.start(row, world)
    for steps in range(1, 4):
        for x, y in run.batches(s.batches_of(world.rank, 1, steps - 1)):
            run.optimizer.zero_grad()
            nn.functional.mse_loss(run.model(x), y).backward()
            if steps == 2:
                move(run.model)
            run.step()
    expected = s.simulate(row, world.size, 3, lambda _: [True] * world.size, lambda _: s.LR)
    np.testing.assert_allclose(s.models_of(run), expected, rtol=1e-11)
    move(run.model)
    run.close()
    assert s.same_everywhere(world, run.model)
    np.testing.assert_allclose(s.vector(run.model), row.weights(world.size, 3) @ expected, rtol=1e-11)


@pytest.mark.parametrize("name", ["local", "lasgd", "dsgd"])
def test_another_dtype_is_an_error_in_that_step(world: Any, name: str) -> None:
    run = s.start(next(row for row in s.ROWS if row.name == name), world)
    run.model.float()
    if world.size == 1:  # plain training
        run.strategy.check_memory()
        return
    with pytest.raises(HpcsgdError, match=r"parameter weight has(.|\n)*float64 of shape(.|\n)*float32"):
        run.strategy.check_memory()


def test_the_consensus_of_virtual_nodes_at_the_close(world: Any) -> None:
    model = s.regression()
    total = 2 * world.size
    run = s.Run(
        model, torch.optim.SGD(model.parameters(), s.LR), DSGD("ring"), comm=world, virtual_nodes=total
    )
    vectors = []
    for peer in run.each_peer():
        with torch.no_grad():
            model.bias.fill_(float(peer))
        vectors.append(s.vector(model))
    run.close()
    mean = np.mean([v for of_rank in world.gather(vectors) for v in of_rank], axis=0)
    np.testing.assert_allclose(s.vector(model), mean)
    assert s.same_everywhere(world, model)


def test_teleportation_can_be_closed_after_an_early_exit(world: Any) -> None:
    model = s.regression()
    run = s.Run(model, torch.optim.SGD(model.parameters(), s.LR), Teleportation(topology="ring"), comm=world)
    for x, y in run.batches(s.batches_of(world.rank, 6), steps=6):
        run.optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        run.step()
        if run.steps >= 3:
            break
    run.close()
    assert s.same_everywhere(world, model) and np.isfinite(s.vector(model)).all()


@pytest.mark.parametrize("name", ["allreduce", "local", "lasgd", "dsgd", "ps"])
def test_a_default_device_of_the_user_changes_nothing(world: Any, name: str) -> None:
    row = next(row for row in s.ROWS if row.name == name)
    model, batches = s.regression(), s.batches_of(world.rank, 3)
    torch.set_default_device("meta")
    try:
        with s.start(row, world, model) as run:
            s.train(run, batches)
            with run.averaged():
                pass
            run.consensus_distance()
    finally:
        restore_default_device()
    expected = s.simulate(row, world.size, 3, lambda _: [True] * world.size, lambda _: s.LR)
    mean = row.weights(world.size, 3) @ expected
    np.testing.assert_allclose(s.vector(model), mean, rtol=1e-11)


@each_row
def test_an_average_that_is_swapped_in_for_an_evaluation_is_swapped_back(world: Any, row: s.Row) -> None:
    def train(run: s.Run, evaluates: bool) -> None:
        for steps in range(1, 4):
            s.train(run, s.batches_of(world.rank, 1, steps - 1))
            if not evaluates:
                continue
            own = [(p, p.data, p.detach().clone()) for p in run.model.parameters()]
            for p, data, _ in own:
                p.data = torch.full_like(data, float(steps))
            if run.strategy.synchronous or world.size == 1:
                with run.averaged():
                    values = run.world.gather(s.vector(run.model))
                assert all(np.array_equal(values[0], each) for each in values)
                run.consensus_distance()
            run.state_dict()
            assert all(float(p.flatten()[0]) == steps for p in run.model.parameters())
            for p, data, value in own:
                p.data = data
                assert torch.equal(p, value)

    models = []
    for evaluates in (False, True):
        with s.start(row, world) as run:
            train(run, evaluates)
            models.append(s.models_of(run))
    np.testing.assert_array_equal(*models)


class Replacing(torch.optim.SGD):
    """Writes new tensors in its step: `p.data = p.data - ...`."""

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.data = p.data - self.param_groups[0]["lr"] * p.grad


@pytest.mark.parametrize("row", [row for row in s.ROWS if row.name != "ps"], ids=str)
def test_an_optimizer_may_replace_the_parameters_data(world: Any, row: s.Row) -> None:
    model = s.regression()
    with s.Run(model, Replacing(model.parameters(), s.LR), row.make(), comm=world) as run:
        for step in range(3):
            s.train(run, s.batches_of(world.rank, 1, step))
        expected = s.simulate(row, world.size, 3, lambda _: [True] * world.size, lambda _: s.LR)
        np.testing.assert_allclose(s.models_of(run), expected, rtol=1e-11)


@each_row
def test_on_one_rank_views_made_before_the_run_follow_it(alone: Any, row: s.Row) -> None:
    model = s.regression()
    before = model.state_dict()
    with s.start(row, alone, model) as run:
        s.train(run, s.batches_of(0, 3))
        after = s.vector(model)
    assert not np.array_equal(after, s.vector(s.regression()))
    if row.name != "ps":
        np.testing.assert_array_equal(
            np.concatenate([v.flatten().numpy(force=True) for v in before.values()]), after
        )


@pytest.mark.filterwarnings("error")
def test_views_made_before_the_run_are_a_warning(world: Any) -> None:
    row = next(row for row in s.ROWS if row.name == "local")
    model = nn.utils.spectral_norm(s.regression())  # keeps a view beside the parameter
    s.start(row, world, model).close()
    if world.size == 1:
        return
    model = s.regression()
    views = model.state_dict()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        s.start(row, world, model).close()
    assert len(views) == 2
    assert [str(w.message)[:60] for w in caught] == [
        "a tensor made before Run shares the memory of weight, as tho"
    ] * (world.rank == 0)
