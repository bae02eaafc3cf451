"""Loops over batches: their steps, loops inside of others, one-shot and stateful loaders, kinds of data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    SequentialSampler,
    TensorDataset,
)

from hpcsgd import DSGD, LASGD, AllReduce, BadOption, HpcsgdError, LocalSGD, Run
from hpcsgd.training.identity_map import IdentityMap
from tests.support import strategy_rows as s
from tests.support.devices import normal


def batches(count: int, seed: int = 0) -> list[torch.Tensor]:
    return list(normal(count, 3, 2, seed=seed))


def start(world: Any, strategy: Any = None, **options: Any) -> Run:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    return Run(model, torch.optim.SGD(model.parameters(), 0.1), strategy, comm=world, **options)


def step(run: Any, x: torch.Tensor) -> None:
    run.zero_grad()
    run.model(x).square().mean().backward()
    run.step()


def sharded(run: Any, loader: Any, shard: bool | None = None) -> Any:
    return run._loops.sharding.shard(loader, shard)


@pytest.mark.mpi
def test_each_loop_over_kept_batches_begins_anew(world: Any) -> None:
    own = batches(5, world.rank)
    with start(world) as run:
        kept, seen = run.batches(own), []
        for _ in range(2):
            seen.append([step(run, x) or x for x in kept])  # type: ignore[func-returns-value]
        for x in kept:
            step(run, x)
            break
        first = next(kept)
        step(run, first)
        seen.append([first, *[step(run, x) or x for x in kept]])  # type: ignore[func-returns-value]
    assert all(torch.equal(torch.stack(each), torch.stack(own)) for each in seen) and run.steps == 16


@pytest.mark.mpi
@pytest.mark.parametrize("strategy", [AllReduce, lambda: LocalSGD(2)], ids=["allreduce", "local"])
def test_steps_end_the_loop_on_all_ranks(world: Any, strategy: Callable[[], Any]) -> None:
    with start(world, strategy()) as run:
        loader = batches(9, world.rank)
        for x in run.batches(loader, steps=4):
            step(run, x)
        assert run.steps == 4
        for number, x in enumerate(run.batches(loader, steps=3)):  # two batches a step
            run.model(x).square().mean().backward()
            if number % 2:
                run.step()
                run.zero_grad()
        assert (number, run.steps) == (5, 7)
        assert len(list(run.batches(loader, steps=5))) == 5  # no gradient: as in evaluation
        assert len(list(run.batches(loader, steps=50))) == 9
        stream = iter(loader)
        for x in run.batches(stream, steps=2):
            step(run, x)
        assert len(list(stream)) == 7, "no batch is fetched in vain"


@pytest.mark.mpi
def test_a_loop_of_evaluation_inside_one_of_training(world: Any) -> None:
    with start(world, LocalSGD(50)) as run:
        for x in run.batches(batches(4, world.rank)):
            step(run, x)
            with torch.no_grad():
                for y in run.batches(batches(2, world.rank)):
                    run.model(y)
        for x in run.batches(batches(4, world.rank)):
            with torch.no_grad():
                for y in run.batches(batches(2, world.rank)):
                    run.model(y)
            step(run, x)
        assert run.steps == 8


@pytest.mark.mpi
@pytest.mark.parametrize(
    "strategy", [AllReduce, lambda: LocalSGD(2), LASGD], ids=["allreduce", "local", "lasgd"]
)
def test_each_sample_is_evaluated_once(world: Any, strategy: Callable[[], Any]) -> None:
    data = TensorDataset(torch.arange(13.0)[:, None])
    with start(world, strategy()) as run:
        for _ in range(2):
            with run.averaged(), torch.no_grad():
                seen = [x for (batch,) in run.batches(DataLoader(data, 2)) for x in batch.flatten().tolist()]
            assert sorted(x for rank in world.gather(seen) for x in rank) == list(range(13))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("strategy", [AllReduce, LASGD], ids=["allreduce", "lasgd"])
def test_a_step_in_a_loop_without_gradients_is_an_error(world: Any, strategy: Callable[[], Any]) -> None:
    run = start(world, strategy())
    with torch.no_grad(), pytest.raises(HpcsgdError, match="began under"):
        for x in run.batches(batches(3, world.rank)):
            with torch.enable_grad():
                step(run, x)


@pytest.mark.mpi
def test_gradients_accumulate_over_the_end_of_a_loader(world: Any) -> None:
    with start(world, LASGD()) as run, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = batches(5, world.rank)
        for _ in range(3):
            for number, x in enumerate(run.batches(loader), 1):
                with run.accumulate() if number % 4 else nullcontext():
                    run.model(x).square().mean().backward()
                if number % 4 == 0:
                    run.step()


@pytest.mark.host("loaders that shuffle, by a generator of the host")
@pytest.mark.mpi
@pytest.mark.parametrize("shuffle", [False, True])
def test_fewer_batches_than_ranks(world: Any, shuffle: bool) -> None:
    """A loader of one batch, as full-batch methods have, trains as in one process."""
    x = normal(5, 2, seed=3)
    with start(world) as run:
        loader = DataLoader(TensorDataset(x), 5, shuffle=shuffle)
        weights = [run.weight for (batch,) in run.batches(loader) if step(run, batch) is None]
        assert weights == [int(world.rank == 0)] and run.steps == 1
    with start(world) as other:
        step(other, x)
    torch.testing.assert_close(run.model.weight, other.model.weight)


class Changing(Dataset[Any]):
    """A random generator of its own, and a file that is opened with the first sample."""

    def __init__(self) -> None:
        self.generator, self.file = torch.Generator(), None
        self.generator.seed()

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        self.file = self.file or open(__file__)  # noqa: SIM115
        return torch.rand(2, generator=self.generator)


@pytest.mark.host("loaders with generators of the host")
@pytest.mark.mpi(min_size=2)
def test_which_loaders_are_sharded(world: Any) -> None:
    one = TensorDataset(torch.ones(8, 1), torch.ones(8))
    numbers = [float(n) for n in range(8)]
    order = BatchSampler(SequentialSampler(numbers), 2, drop_last=False)
    changing = Changing()
    with start(world) as run:
        for plain in (
            DataLoader(one),
            DataLoader(numbers),
            DataLoader(["a", "b", "c", "d"] * 2),
            DataLoader([object() for _ in range(8)], collate_fn=list),
            DataLoader(changing),
            DataLoader(numbers, batch_sampler=order),
            DataLoader(TensorDataset(torch.arange(24))),
        ):
            part = sharded(run, plain)
            assert len(part) == len(range(world.rank, len(plain), world.size))
            assert sharded(run, plain) is part, "persistent workers live on"
        assert changing.file is None
        for other in (
            DataLoader(numbers, batch_sampler=[[0, 1], [2, 3]]),
            DataLoader(numbers, sampler=[3, 2, 1]),
            DataLoader(numbers, batch_size=1 + world.rank),
            DataLoader([world.rank]),
            numbers,
        ):
            assert sharded(run, other) is other
        with pytest.raises(BadOption, match=r"shard of run\.batches differs"):
            sharded(run, DataLoader(numbers), None if world.rank else True)
        with pytest.raises(BadOption, match=r"rank 1: .*cannot shard"):
            sharded(run, numbers if world.rank == 1 else DataLoader(numbers), True)


class WithEpoch(list[Any]):
    """A data set of Hugging Face's kind; `sampler` is what `Epochs` looks for."""

    epoch = 0

    def __init__(self, *values: Any) -> None:
        super().__init__(values)
        self.dataset, self.calls = self, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.calls = epoch, self.calls + 1


@pytest.mark.host("loaders that shuffle, by a generator of the host")
@pytest.mark.mpi
@pytest.mark.parametrize("strategy", [AllReduce, LASGD], ids=["allreduce", "lasgd"])
def test_epochs_that_the_user_sets_stay(world: Any, strategy: Callable[[], Any]) -> None:
    mine, run_numbers = WithEpoch(*batches(2, world.rank)), WithEpoch(*batches(2, world.rank))
    with start(world, strategy()) as run:
        for epoch in (5, 6):
            mine.set_epoch(epoch)
            for x in run.batches(mine):
                step(run, x)
            assert mine.epoch == epoch
            for x in run.batches(run_numbers):
                step(run, x)
        assert mine.calls == 2
        assert run_numbers.calls == (0 if world.size == 1 else run_numbers.epoch + 1)
        if world.size > 1 and run.strategy.synchronous:
            assert run_numbers.epoch == 1
    sampler = DistributedSampler(range(9), 2, 0)
    inner = DataLoader(range(9), batch_sampler=BatchSampler(sampler, 2, False))
    with start(world) as run:
        for _ in range(2):
            list(run.batches(inner))
    assert sampler.epoch == (world.size > 1)


def one_by_one(values: list[Any]) -> Iterator[Any]:
    yield from values


ASYNCHRONOUS = [row for row in s.ROWS if not row.make().synchronous] + [
    s.Row("lasgd", LASGD, s.allreduce_step)
]


@pytest.mark.mpi
@pytest.mark.parametrize("row", ASYNCHRONOUS, ids=lambda row: row.name)
def test_one_shot_loaders_with_asynchronous_strategies(world: Any, row: s.Row) -> None:
    with start(world, row.make()) as run:
        if run.strategy.synchronous:
            return
        seen, repeated = 0, 0
        for x in run.batches(one_by_one(batches(3 + 2 * world.rank, world.rank)), steps=200):
            seen, repeated = seen + run.weight, repeated + 1 - run.weight
            step(run, x)
        taken = world.gather((seen, run.steps))[: run.workers]
        assert [count for count, _ in taken] == [3 + 2 * rank for rank in range(run.workers)]
        assert len({steps for _, steps in taken}) == 1 and run.steps < 200
        before = run.steps
        for x in run.batches(islice(batches(50, world.rank), 50), steps=3):
            step(run, x)
        assert run.steps == before + 3
        assert list(run.batches(one_by_one([]))) == [] == list(run.batches([], steps=0))
        if run.workers > 1:
            with pytest.raises(HpcsgdError, match="rank 1: the loader has no batch"):
                list(run.batches(one_by_one(batches(int(world.rank != 1)))))


@pytest.mark.mpi
@pytest.mark.parametrize("row", ASYNCHRONOUS, ids=lambda row: row.name)
def test_a_loop_without_steps_has_each_batch_once(world: Any, row: s.Row) -> None:
    with start(world, row.make()) as run:
        if run.strategy.synchronous:
            return
        count, works = 3 + 2 * world.rank, world.rank < run.workers
        for kind in (list, iter, one_by_one):
            with torch.no_grad():
                assert len(list(run.batches(kind(batches(count))))) == count * works
                assert len(list(run.batches(kind(batches(count)), steps=2))) == 2 * works
        for x in run.batches(batches(count, world.rank), steps=4):
            step(run, x)
        assert run.steps == 4


@pytest.mark.mpi
@pytest.mark.parametrize("steps", [None, 2])
def test_an_asynchronous_loop_that_forgets_its_steps_is_an_error(world: Any, steps: int | None) -> None:
    run = start(world, LASGD())
    if world.size == 1:
        assert len(list(run.batches(batches(3), steps=steps))) == (steps or 3)
        return
    with pytest.raises(HpcsgdError, match=r"without run\.step\(\)"):
        list(run.batches(batches(3), steps=steps))


@pytest.mark.mpi
def test_calls_of_all_ranks_inside_an_asynchronous_loop(world: Any) -> None:
    with start(world, LASGD()) as run:
        for x in run.batches(batches(5, world.rank), steps=5):
            step(run, x)
            for call in (run.check, run.consensus_distance, lambda: list(run.batches([]))):
                if world.size == 1:
                    call()
                    continue
                with pytest.raises(HpcsgdError, match="call it between two loops"):
                    call()
        assert run.steps == 5


@pytest.mark.mpi(min_size=2)
def test_accumulation_in_an_asynchronous_loop_without_steps_is_a_warning(world: Any) -> None:
    with start(world, LASGD(period=2, max_lag=2, trigger="all")) as run:
        loader = batches(4, world.rank)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for number, x in enumerate(run.batches(loader)):
                with run.accumulate() if number % 2 == 0 else nullcontext():
                    run.model(x).square().mean().backward()
                if number % 2:
                    run.step()
        texts = [str(each.message) for each in caught if "steps=2)" in str(each.message)]
        assert len(texts) == (world.rank == 0)


class Stateful(list[Any]):
    position = 0

    def load_state_dict(self, state: Any) -> None: ...

    def __iter__(self) -> Iterator[Any]:
        for self.position, each in enumerate(super().__iter__(), 1):
            yield each


@pytest.mark.mpi
def test_the_position_of_a_loader_is_that_of_its_last_batch(world: Any) -> None:
    """A checkpoint of an asynchronous method has it."""
    loader = Stateful(batches(40, world.rank))
    with start(world, LASGD()) as run:
        taken = 0
        for _ in range(4):
            for x in run.batches(loader, steps=2):
                step(run, x)
                taken += 1
            assert loader.position == taken % 40


@pytest.mark.mpi
def test_streams_of_virtual_nodes(world: Any) -> None:
    def final(nodes: int, kind: Callable[[Any], Any]) -> torch.Tensor:
        with start(world, DSGD("ring"), virtual_nodes=nodes) as run:
            loaders = [kind(batches(2 + peer % 3, peer)) for peer in run.peers]
            for x in run.batches(loaders if nodes > world.size else loaders[0]):
                step(run, x)
            with run.averaged():
                return run.model.weight.detach().clone()

    for nodes in (world.size, 2 * world.size):
        assert torch.equal(final(nodes, list), final(nodes, one_by_one))


def test_an_identity_map_holds_no_keys() -> None:
    class Key(list[int]):
        pass

    found: IdentityMap[str] = IdentityMap()
    a, b, c = Key(), Key(), [1]
    for key, value in ((a, "a"), (b, "b"), (c, "c")):
        found.set(key, value)
    assert [found.get(key) for key in (a, b, c, Key())] == ["a", "b", "c", None]
    del a, key
    assert len(found._entries) == 2


@pytest.mark.mpi
def test_a_repeated_batch_is_as_the_loader_made_it(world: Any) -> None:
    """Loops may take entries out of a batch, as those of Hugging Face's models."""
    own = [{"x": torch.ones(1, 2)} for _ in range(1 if world.rank else 3)]
    with start(world, AllReduce()) as run:
        for batch in run.batches(own):
            step(run, batch.pop("x"))
        assert run.steps == 3 and not own[0]


@pytest.mark.mpi
def test_an_evaluation_with_gradients_that_repeats_batches_is_a_warning(world: Any) -> None:
    with start(world) as run, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x in run.batches(batches(1 if world.rank else 3, world.rank)):
            with torch.no_grad():
                run.model(x)
    texts = [str(w.message) for w in caught if "has had its last batch" in str(w.message)]
    assert len(texts) == (world.rank > 0) and all("batch 2 times more" in text for text in texts)
    assert all(w.filename == __file__ for w in caught)
