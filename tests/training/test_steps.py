"""`run.step`: weights, closures, several optimizers, local parameters, drift."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from hpcsgd import LASGD, AllReduce, BadOption, Disagreement, HpcsgdError, LocalSGD, Run
from tests.support import strategy_rows as s
from tests.support.devices import Random

Model = nn.Module


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def batch(rank: int, step: int, samples: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    random = Random(1000 * rank + step)
    x = random.normal(samples, 4, dtype=torch.float64)
    return x, random.normal(samples, 2, dtype=torch.float64)


def loss_of(model: Model, *ranks_and_steps: tuple[int, int, int]) -> torch.Tensor:
    """The mean loss of one process over the samples of (rank, step, samples)."""
    x, y = zip(*(batch(*each) for each in ranks_and_steps), strict=True)
    return nn.functional.mse_loss(model(torch.cat(x)), torch.cat(y))


def assert_equal(a: Model, b: Model) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def sgd(model: Model, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, **options)


@pytest.mark.mpi
@pytest.mark.parametrize("how", ["step", "synchronize"])
@pytest.mark.parametrize("strategy", [AllReduce, lambda: LocalSGD(1)], ids=["allreduce", "local"])
def test_weights_by_samples_are_the_mean_over_all_samples(
    world: Any, strategy: Callable[[], Any], how: str
) -> None:
    model, plain = net(), net()
    optimizer, counts = sgd(plain), [2 + rank for rank in range(world.size)]
    with Run(model, sgd(model), strategy(), comm=world) as run:
        for step in range(4):
            run.zero_grad()
            optimizer.zero_grad()
            loss_of(model, (world.rank, step, counts[world.rank])).backward()
            loss_of(plain, *((rank, step, n) for rank, n in enumerate(counts))).backward()
            if how == "synchronize" and strategy is AllReduce:
                run.synchronize(weight=counts[world.rank])
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            run.step(weight=counts[world.rank])
            optimizer.step()
        assert_equal(model, plain)


@pytest.mark.mpi(min_size=2)
def test_weights_that_cannot_be_used_are_errors(world: Any) -> None:
    with Run(model := net(), sgd(model), AllReduce(), comm=world) as run:
        loss_of(model, (world.rank, 0, 3)).backward()
        with pytest.raises(BadOption, match="at least 0"):
            run.step(weight=-1)
        with pytest.raises(Disagreement, match=r"use of run\.step\(weight"):
            run.step(weight=1.0 if world.rank else None)
    with Run(model := net(), sgd(model), AllReduce(), comm=world) as run:
        loss_of(model, (world.rank, 0, 3)).backward()
        run.step()
        loss_of(model, (world.rank, 1, 3)).backward()
        with pytest.raises(HpcsgdError, match="every step from the first one"):
            run.step(weight=1.0)
    run = Run(model := net(), sgd(model), LASGD(), comm=world)
    with pytest.raises(BadOption, match="same weight"):
        run.step(weight=1.0)
    run.close()


@pytest.mark.mpi
def test_lbfgs_is_that_of_one_process_on_all_data(world: Any) -> None:
    def optimizer(model: Model) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", max_iter=5)

    model, plain, evaluations = net(), net(), [0, 0]

    def closure(index: int, step: int, *ranks: int) -> Callable[[], torch.Tensor]:
        def evaluate() -> torch.Tensor:
            evaluations[index] += 1
            optimizers[index].zero_grad()
            loss = loss_of((model, plain)[index], *((rank, step, 3) for rank in ranks))
            loss.backward()
            return loss

        return evaluate

    optimizers = [optimizer(model), optimizer(plain)]
    with Run(model, optimizers[0], AllReduce(), comm=world) as run:
        for step in range(3):
            loss = run.step(closure(0, step, world.rank))
            expected = optimizers[1].step(closure(1, step, *range(world.size)))
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
        assert evaluations[0] == evaluations[1]
        assert run.steps == 3 and s.same_everywhere(world, model)


@pytest.mark.mpi
@pytest.mark.parametrize(
    "strategy", [AllReduce, lambda: LocalSGD(1), LASGD], ids=["allreduce", "local", "lasgd"]
)
def test_a_list_of_optimizers_is_one(world: Any, strategy: Callable[[], Any]) -> None:
    def optimizers(model: Any) -> list[Any]:
        matrices = [p for p in model.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if p.ndim < 2]
        return [torch.optim.SGD(matrices, 0.1), torch.optim.AdamW(rest, 0.01)]

    model, plain = net(), net()
    reference = optimizers(plain)
    with Run(model, optimizers(model), strategy(), comm=world) as run:
        for step, (x, y) in enumerate(run.batches([batch(0, step) for step in range(4)], steps=4)):
            run.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            run.step()
            for each in reference:
                each.zero_grad()
            if step < 4:
                loss_of(plain, (0, step, 3)).backward()
                for each in reference:
                    each.step()
        state = run.state_dict()
        run.load_state_dict(state)
        if strategy is AllReduce:
            assert_equal(model, plain)


def test_an_optimizer_that_lacks_a_method_is_an_error(alone: Any) -> None:
    class Half:
        param_groups: ClassVar[list[Any]] = []

        def step(self) -> None: ...

    with pytest.raises(BadOption, match="lacks zero_grad, state_dict, load_state_dict"):
        Run(net(), Half(), comm=alone)


@pytest.mark.mpi
@pytest.mark.parametrize("strategy", [AllReduce, lambda: LocalSGD(2)], ids=["allreduce", "local"])
def test_a_first_step_without_any_gradient_is_a_warning(world: Any, strategy: Callable[[], Any]) -> None:
    model = net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Run(model, sgd(model), strategy(), comm=world) as run:
            run.step()
            run.step()
    texts = [str(each.message) for each in caught if each.category is RuntimeWarning]
    assert len(texts) == (world.size > 1)
    assert all("no parameter of the run has a gradient in its first step" in each for each in texts)


@pytest.mark.mpi
def test_optimizer_step_in_place_of_run_step(world: Any) -> None:
    model = net()
    optimizer = sgd(model)
    with Run(model, optimizer, LocalSGD(2), comm=world):
        loss_of(model, (world.rank, 0, 3)).backward()
        if world.size == 1:
            optimizer.step()
        else:
            with pytest.raises(HpcsgdError, match=r"optimizer\.step\(\) was called instead of run\.step"):
                optimizer.step()
    optimizer.step()  # after close() it is the user's again


@pytest.mark.mpi
@pytest.mark.parametrize("strategy", [AllReduce, lambda: LocalSGD(2)], ids=["allreduce", "local"])
def test_local_parameters_are_those_of_each_rank_alone(world: Any, strategy: Callable[[], Any]) -> None:
    model = net()
    nn.init.constant_(model[2].bias, world.rank)
    with Run(model, sgd(model), strategy(), comm=world, local=["2.*"]) as run:
        for step in range(4):
            run.zero_grad()
            loss_of(model, (world.rank, step, 3)).backward()
            run.step()
        assert len(set(world.gather(float(model[2].weight.sum())))) == world.size
        assert len(set(world.gather(float(model[0].weight.sum())))) == 1
    with pytest.raises(BadOption, match=r"local='head\.\*' matches no parameter"):
        Run(net(), sgd(model), comm=world, local=["head.*"])


def _change_weight(run: Run, rank: int, step: int) -> None:
    if rank == 1 and step == 2:
        run.model[0].weight.data.add_(1e-6)  # type: ignore[index,union-attr,operator]


def _change_rate(run: Run, rank: int, step: int) -> None:
    if rank == 1 and step == 2:
        run.optimizer.param_groups[0]["lr"] = 0.2


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("change", "name"),
    [(_change_weight, r"rank 1: 0\.weight"), (_change_rate, "rank 1: lr of parameter group 0")],
    ids=["weight", "rate"],
)
def test_drift_is_an_error_within_check_every_steps(
    world: Any, change: Callable[[Run, int, int], None], name: str
) -> None:
    run = Run(model := net(), sgd(model), AllReduce(), comm=world, check_every=2)
    with pytest.raises(Disagreement, match=name + r" differs .* at step 4; the ranks were equal at step 2"):
        for step in itertools.count():
            run.zero_grad()
            loss_of(model, (world.rank, step, 3)).backward()
            run.step()
            change(run, world.rank, step)
            assert step < 5
    run.world.progress.drain()


@pytest.mark.mpi(min_size=2)
def test_drift_is_found_when_the_run_ends_or_evaluates(world: Any) -> None:
    for end in ("averaged", "check", "close"):
        run = Run(model := net(), sgd(model), AllReduce(), comm=world)
        loss_of(model, (world.rank, 0, 3)).backward()
        run.step()
        _change_weight(run, world.rank, 2)
        with pytest.raises(Disagreement, match=r"0\.weight"):
            if end == "averaged":
                with run.averaged():
                    pass
            else:
                getattr(run, end)()
        run.world.progress.drain()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("strategy", [AllReduce, lambda: LocalSGD(2)], ids=["allreduce", "local"])
def test_ranks_in_different_steps_are_an_error(world: Any, strategy: Callable[[], Any]) -> None:
    run = Run(model := net(), sgd(model), strategy(), comm=world)
    with pytest.raises(Disagreement, match="number of batches"):
        for step, (x, y) in enumerate(run.batches([batch(world.rank, step) for step in range(9)])):
            if step == 0 and world.rank == 1:
                continue
            run.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            run.step()
    run.world.progress.drain()


@pytest.mark.mpi
def test_two_runs_of_a_gan_share_a_loop(world: Any) -> None:
    def train(generators: list[Model], critics: list[Model], runs: list[Any], ranks: list[int]) -> None:
        (generator,), (critic,) = generators, critics
        for step in range(3):
            runs[1].zero_grad()
            for rank in ranks:
                x, noise = batch(rank, step)[1], batch(rank, step + 50)[0]
                fake = generator(noise)
                ((critic(x).mean() - critic(fake.detach()).mean()) / len(ranks)).backward()
            runs[1].step()
            runs[0].zero_grad()
            for rank in ranks:
                (-critic(generator(batch(rank, step + 50)[0])).mean() / len(ranks)).backward()
            runs[0].step()

    models = [(net(1), nn.Linear(2, 1).double()) for _ in range(2)]
    models[1][1].load_state_dict(models[0][1].state_dict())
    for p, q in zip(models[0][1].parameters(), models[1][1].parameters(), strict=True):
        nn.init.constant_(p, 0.5)
        nn.init.constant_(q, 0.5)
    with (
        Run(models[0][0], sgd(models[0][0]), comm=world) as a,
        Run(models[0][1], sgd(models[0][1]), comm=world) as b,
    ):
        train([models[0][0]], [models[0][1]], [a, b], [world.rank])
    train([models[1][0]], [models[1][1]], [sgd(m) for m in models[1]], list(range(world.size)))
    for own, plain in zip(*models, strict=True):
        assert_equal(own, plain)
    assert np.isfinite(s.vector(models[0][0])).all()


@pytest.mark.mpi
def test_a_layer_added_later_begins_with_the_values_of_rank_0(world: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Run(model, optimizer, comm=world) as run:
        for step in range(4):
            if step == 2:
                torch.manual_seed(world.rank)
                model.append(nn.Linear(4, 2))
                optimizer.add_param_group({"params": list(model[1].parameters())})
                first = model[1].weight.detach().clone()
            run.zero_grad()
            model(torch.full((2, 4), 1.0 + world.rank)).square().sum().backward()
            run.step()
            if step == 2:
                of_rank_0 = world.gather(first)[0] - 0.1 * model[1].weight.grad
                torch.testing.assert_close(model[1].weight.detach(), of_rank_0)
        run.check()


@pytest.mark.mpi
@pytest.mark.parametrize("strategy", [AllReduce, lambda: LocalSGD(1)], ids=["allreduce", "local"])
def test_a_plain_tensor_that_only_the_optimizer_holds_is_trained(world: Any, strategy: Any) -> None:
    model, scale = net(), torch.full((2,), float(world.rank), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([*model.parameters(), scale], 0.1)
    with Run(model, optimizer, strategy(), comm=world) as run:
        for step in range(3):
            run.zero_grad()
            x, y = batch(world.rank, step)
            (nn.functional.mse_loss(model(x), y) * (-scale).exp().sum() + scale.sum()).backward()
            run.step()
    assert len({tuple(each.tolist()) for each in world.gather(scale.detach())}) == 1
    assert scale.is_leaf and not torch.equal(scale.detach(), torch.zeros(2, dtype=torch.float64))


def test_the_state_of_a_wrapper_that_passes_names_on_to_a_compiled_module(alone: Any) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.compile(nn.Linear(2, 2), backend="eager")
            self.scale = nn.Parameter(torch.ones(1))

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

    model = Wrapper()
    with Run(model, torch.optim.SGD(model.parameters(), 0.1), comm=alone) as run:
        names = {name.replace("_orig_mod.", "") for name in run.state_dict()["model"]}
        assert names == {"scale", "inner.weight", "inner.bias"}


@pytest.mark.mpi
@pytest.mark.parametrize("keep", [False, True])
def test_gradients_that_the_loop_sets_after_backward_are_averaged(world: Any, keep: bool) -> None:
    """Of parameters that backward does not reach, such as master weights; unused ones stay without any."""
    models = [nn.Linear(2, 1, bias=False) for _ in range(3)]
    trained, master, unused = models
    optimizer = torch.optim.SGD([p for m in models for p in m.parameters()], 1.0, weight_decay=0.5)
    with Run(nn.ModuleList(models), optimizer, comm=world) as run:
        last = unused.weight.detach().clone()
        for _ in range(3):
            before = master.weight.detach().clone()
            run.optimizer.zero_grad(set_to_none=not keep)
            trained(torch.full((1, 2), world.rank + 1.0)).sum().backward()
            own = torch.full((1, 2), 2.0 * world.rank)
            if keep and master.weight.grad is not None:
                master.weight.grad.add_(own)
            else:
                master.weight.grad = own
            nn.utils.clip_grad_norm_(unused.weight, 1.0)
            run.step()
            torch.testing.assert_close(before * 0.5 - (world.size - 1.0), master.weight.detach())
        if not keep:
            assert torch.equal(unused.weight, last)


@pytest.mark.mpi
def test_a_state_of_local_sgd_from_another_number_of_ranks(world: Any) -> None:
    model = net()
    with Run(model, sgd(model), LocalSGD(2), comm=world) as run:
        state = run.state_dict()
        state["strategy"]["own_steps"] = [0] * (world.size + 1)
        run.load_state_dict(state)
        loss_of(model, (world.rank, 0, 3)).backward()
        run.step()
        state["strategy"]["own_steps"] = [1] * (world.size + 1)
        with pytest.raises(HpcsgdError, match=r"1 steps after an average\n(.*\n)*.*a multiple of 2 steps"):
            run.load_state_dict(state)
        run.step()
    assert s.same_everywhere(world, model)
