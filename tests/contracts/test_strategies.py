"""Every strategy: its recursion, plain training on one rank, resuming, uneven batches, scaling."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpcsgd import BadOption, HpcsgdError, LocalSGD, TensorGroup, collectives
from hpcsgd.strategies import STRATEGIES
from tests.support import strategy_rows as s
from tests.support.devices import Random

each_row = pytest.mark.parametrize("row", s.ROWS, ids=str)
each_row_in_step = pytest.mark.parametrize("row", [row for row in s.ROWS if row.make().synchronous], ids=str)
Losses = Callable[[nn.Module], torch.Tensor]


def test_every_strategy_has_a_row() -> None:
    assert {row.name for row in s.ROWS} == set(STRATEGIES)


@pytest.mark.mpi
@each_row
@pytest.mark.parametrize("layout", [(0, True), (2, True), (0, False)], ids=str)
def test_models_obey_the_recursion(
    world_of: Callable[..., Any], layout: tuple[int, bool], row: s.Row
) -> None:
    world = world_of(*layout)
    with s.start(row, world) as run:
        for steps in range(1, 8):
            s.train(run, s.batches_of(world.rank, 1, steps - 1))
            expected = s.simulate(row, world.size, steps, lambda _: [True] * world.size, lambda _: s.LR)
            np.testing.assert_allclose(s.models_of(run), expected, rtol=1e-11)


@pytest.mark.mpi
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_allreduce_is_one_process_with_a_larger_batch(world: Any, momentum: float) -> None:
    single, model = s.regression(), s.regression()
    plain = torch.optim.SGD(single.parameters(), s.LR, momentum=momentum)
    optimizer = torch.optim.SGD(model.parameters(), s.LR, momentum=momentum)
    with s.Run(model, optimizer, comm=world) as run:
        s.train(run, s.batches_of(world.rank, 6))
    for step in range(6):
        x, y = zip(*(s.batch(rank, step) for rank in range(world.size)), strict=True)
        plain.zero_grad()
        nn.functional.mse_loss(single(torch.cat(x)), torch.cat(y)).backward()
        plain.step()
    np.testing.assert_allclose(s.vector(model), s.vector(single), rtol=1e-11)


class WithUnused(nn.Module):
    """A parameter that only odd calls use, and one that none uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.sometimes, self.never = nn.Linear(8, 8), nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(8)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.norm(torch.relu(self.first(x)))
        return self.second(self.sometimes(x) if self.calls % 2 else x)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "decay": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
}


def train_with_all(model: nn.Module, optimizer: Any, run: Any) -> None:
    """Two micro-batches a step, clipped, with a schedule; `run` is None for plain training."""
    random = Random(3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for number in range(6):
        optimizer.zero_grad(set_to_none=number % 2 == 0)
        x, y = random.normal(2, 6, 4), random.integers(3, 2, 6)
        if run is None:
            nn.functional.cross_entropy(model(x[0]), y[0]).backward()
        else:
            with run.accumulate():
                nn.functional.cross_entropy(model(x[0]), y[0]).backward()
        nn.functional.cross_entropy(model(x[1]), y[1]).backward()
        if run is not None:
            run.synchronize()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        (optimizer if run is None else run).step()
        schedule.step()


@each_row
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_rank_is_plain_training_bit_for_bit(alone: Any, row: s.Row, optimizer: str) -> None:
    plain, model = WithUnused(), WithUnused()
    make = OPTIMIZERS[optimizer]
    reference, own = make(plain.parameters()), make(model.parameters())
    train_with_all(plain, reference, None)
    with warnings.catch_warnings(), s.Run(model, own, row.make(), comm=alone) as run:
        warnings.simplefilter("error")
        train_with_all(model, own, run)
        assert run.consensus_distance() == 0
        state = copy.deepcopy(model.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value), name
        assert torch.equal(model.state_dict()[name], value), f"{name} after close()"


@pytest.mark.mpi
@each_row
def test_save_resume_and_go_on_is_identical(world: Any, row: s.Row) -> None:
    def begin(seed: int) -> Any:
        model = s.regression()
        nn.init.constant_(model.bias, seed)
        optimizer = torch.optim.SGD(model.parameters(), s.LR, momentum=0.9)
        return s.Run(model, optimizer, row.make(), comm=world)

    with begin(1) as straight:
        s.train(straight, s.ByIteration(straight, 7))
        expected = s.vector(straight.model)
    with begin(1) as first:
        before = first.steps
        s.train(first, s.ByIteration(first, 4))
        state = copy.deepcopy(first.state_dict())
        s.train(first, s.ByIteration(first, 2, 50))
    with begin(9) as second:
        second.load_state_dict(state)
        assert second.steps == before + 4
        s.train(second, s.ByIteration(second, 3, 4))
        assert second.steps == before + 7
        assert second.strategy.deterministic
        np.testing.assert_array_equal(s.vector(second.model), expected)
        assert not row.make().options() or "strategy" in state


@pytest.mark.mpi
def test_states_of_different_steps_are_rejected(world: Any) -> None:
    with s.start(s.ROWS[0], world) as run:
        state = run.state_dict()
        state["steps"] += world.rank
        if world.size > 1:
            with pytest.raises(HpcsgdError, match="number of steps in the state"):
                run.load_state_dict(state)


@pytest.mark.mpi
@each_row
def test_averaged_is_the_mean_and_restores_each_model(world: Any, row: s.Row) -> None:
    with s.start(row, world) as run:
        for steps in (1, 2, 5):
            before = run.steps
            s.train(run, s.batches_of(world.rank, steps))
            own, every = s.vector(run.model), s.models_of(run)
            weights = row.weights(world.size, before + steps)
            mean = weights @ every
            distance = np.sqrt(weights @ np.sum((every - mean) ** 2, axis=1))
            np.testing.assert_allclose(run.consensus_distance(), distance, rtol=1e-9, atol=1e-15)
            with run.averaged():
                np.testing.assert_allclose(s.vector(run.model), mean, rtol=1e-12)
                assert s.same_everywhere(world, run.model)
            np.testing.assert_array_equal(s.vector(run.model), own)
            with pytest.raises(KeyError), run.averaged():
                raise KeyError
            np.testing.assert_array_equal(s.vector(run.model), own)


def unsized(batches: list[Any]) -> Iterator[Any]:
    yield from batches


@pytest.mark.mpi
@each_row_in_step
@pytest.mark.parametrize("loader", [list, unsized])
@pytest.mark.parametrize("uneven", ["join", "stop"])
def test_uneven_batches(world: Any, row: s.Row, loader: Callable[..., Any], uneven: str) -> None:
    ranks = world.size
    with s.start(row, world, uneven=uneven) as run:
        taken = s.train(run, loader(s.batches_of(world.rank, 3 + 2 * world.rank)))
        steps = 3 if uneven == "stop" else 1 + 2 * ranks
        assert world.gather(taken) == [steps] * ranks
        expected = s.simulate(
            row, ranks, steps, lambda t: [t < 3 + 2 * r for r in range(ranks)], lambda _: s.LR
        )
        np.testing.assert_allclose(s.models_of(run), expected, rtol=1e-11)
        assert s.train(run, loader(s.batches_of(world.rank, 1))) == 1  # the next epoch is complete


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("loader", [list, unsized])
def test_a_rank_without_any_batch_is_named(world: Any, loader: Callable[..., Any]) -> None:
    with s.start(s.ROWS[0], world) as run:
        with pytest.raises(HpcsgdError, match="rank 1: the loader has no batch"):
            s.train(run, loader(s.batches_of(world.rank, int(world.rank != 1))))
        assert s.train(run, loader([])) == 0


class WrongLength(list[Any]):
    def __init__(self, batches: list[Any], length: int) -> None:
        super().__init__(batches)
        self._length = length

    def __len__(self) -> int:
        return self._length


@pytest.mark.mpi
@pytest.mark.parametrize(("length", "found"), [(3, "got:      2"), (1, "more than 1")])
def test_a_wrong_length_is_an_error_where_ranks_depend_on_it(world: Any, length: int, found: str) -> None:
    loader = WrongLength(s.batches_of(world.rank, 2), length)
    with s.start(s.ROWS[1], world) as run:
        if world.size == 1:
            assert s.train(run, loader) == 2
        else:
            with pytest.raises(HpcsgdError, match=found):
                s.train(run, loader)


@pytest.mark.mpi
@each_row
def test_accumulated_halves_are_the_whole_batch(world: Any, row: s.Row) -> None:
    with s.start(row, world) as run:
        for x, y in run.batches(s.ByIteration(run, 4)):
            run.zero_grad()
            with run.accumulate():
                (nn.functional.mse_loss(run.model(x[:3]), y[:3]) / 2).backward()
            (nn.functional.mse_loss(run.model(x[3:]), y[3:]) / 2).backward()
            run.step()
        expected = s.simulate(row, world.size, 4, lambda _: [True] * world.size, lambda _: s.LR)
        np.testing.assert_allclose(s.models_of(run), expected, rtol=1e-11)


@pytest.mark.mpi
@each_row
def test_a_schedule_changes_the_rate(world: Any, row: s.Row) -> None:
    with warnings.catch_warnings(), s.start(row, world) as run:
        warnings.simplefilter("error")
        if not row.make().synchronous:
            # A peer that has not been scheduled yet follows the schedule without a step of its own.
            warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step", UserWarning)
        schedule = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.5)
        for step in range(4):
            s.train(run, s.batches_of(world.rank, 1, step))
            schedule.step()
        everyone = [True] * world.size
        expected = s.simulate(row, world.size, 4, lambda _: everyone, lambda t: s.LR * 0.5**t)
        np.testing.assert_allclose(s.models_of(run), expected, rtol=1e-11)


@pytest.mark.mpi
@each_row
def test_an_infinite_gradient_on_one_rank(world: Any, row: s.Row) -> None:
    with s.start(row, world, s.regression().float()) as run:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scales, before = [], run.steps
        for x, y in run.batches(s.ByIteration(run, 5)):
            step = run.steps - before
            run.zero_grad()
            loss = nn.functional.mse_loss(run.model(x.float()), y.float())
            scaler.scale(loss * float("inf") if step == 2 and world.rank == 0 else loss).backward()
            own = s.vector(run.model)
            scaler.step(run)
            scaler.update()
            scales.append(scaler.get_scale())
            if row.name == "allreduce" and step == 2:
                np.testing.assert_array_equal(s.vector(run.model), own)
        assert np.all(np.isfinite(s.models_of(run)))
        assert world.gather(run.steps - before) == [5] * world.size
        if row.name == "allreduce":
            assert world.gather(scales) == [[1024, 1024, 512, 512, 512]] * world.size
            assert s.same_everywhere(world, run.model)


@pytest.mark.mpi
def test_a_scaled_gradient_is_the_gradient(world: Any) -> None:
    def final(scaler: Any) -> np.ndarray:
        with s.start(s.ROWS[0], world, s.regression().float()) as run:
            for x, y in s.batches_of(world.rank, 3):
                run.zero_grad()
                scaler.scale(nn.functional.mse_loss(run.model(x.float()), y.float())).backward()
                if scaler.is_enabled():
                    nn.utils.clip_grad_norm_(run.param_groups[0]["params"], 1e9)
                scaler.step(run)
                scaler.update()
            return s.vector(run.model)

    plain = final(torch.amp.GradScaler("cpu", enabled=False))
    # Powers of two change no bits.
    np.testing.assert_array_equal(final(torch.amp.GradScaler("cpu", init_scale=2.0**10)), plain)


@pytest.mark.mpi
@each_row
def test_autocast(world: Any, row: s.Row) -> None:
    with s.start(row, world, s.regression().float()) as run:
        losses = []
        for x, y in run.batches(s.ByIteration(run, 30)):
            run.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.mse_loss(run.model(x.float()).float(), y.float())
            loss.backward()
            run.step()
            losses.append(float(loss.detach()))
        assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5]) if losses else world.rank >= run.workers
        with run.averaged():
            assert s.same_everywhere(world, run.model)


@pytest.mark.mpi
@each_row
@pytest.mark.parametrize("layout", [(0, True), (2, True), (0, False)], ids=str)
def test_bytes_equal_the_formula(world_of: Callable[..., Any], layout: tuple[int, bool], row: s.Row) -> None:
    world = world_of(*layout)

    def moved(action: Callable[[], object]) -> np.ndarray:
        before = np.array([world.traffic.sent, world.traffic.shared])
        action()
        world.progress.drain()
        return np.array([world.traffic.sent, world.traffic.shared]) - before

    group = TensorGroup(world, s.regression().named_parameters())
    once = moved(lambda: collectives.allreduce(group))
    reads = [row.reads(peer, world.size, 7) for peer in range(world.size)]
    here = set(world.local.members) if layout[1] else set()
    sent = sum(r.count(world.rank) for peer, r in enumerate(reads) if peer not in here)
    shared = sum(source in here for source in reads[world.rank])
    with s.start(row, world) as run:

        def steps() -> None:
            for x, y in run.batches(s.ByIteration(run, 7)):
                run.zero_grad()
                nn.functional.mse_loss(run.model(x), y).backward()
                run.step()

        sent += row.sends(world.rank, world.size, 7)
        expected = row.reductions(7) * once + np.array([sent, shared]) * group.nbytes
        np.testing.assert_array_equal(moved(steps), expected)


@pytest.mark.mpi
@each_row
def test_all_ranks_begin_with_the_model_of_rank_0(world: Any, row: s.Row) -> None:
    model = s.regression()
    nn.init.constant_(model.bias, world.rank + 3)
    with s.start(row, world, model) as run:
        assert s.same_everywhere(world, run.model) and s.vector(model)[-1] == 3


@pytest.mark.mpi
def test_a_run_counts_its_own_steps(world: Any) -> None:
    for _ in range(2):
        with s.start(s.ROWS[0], world) as run:
            s.train(run, s.batches_of(world.rank, 3))
            assert run.steps == 3


@pytest.mark.parametrize("period", [0, -1])
def test_a_period_is_positive(period: int) -> None:
    with pytest.raises(BadOption, match="period"):
        LocalSGD(period)
