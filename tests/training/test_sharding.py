"""Loaders of other people's kind: streams, generators, and plain DataLoaders, which are sharded."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from hpcsgd import LASGD, AllReduce, BadOption, LocalSGD, Run
from hpcsgd.training.digests import digest
from tests.support import strategy_rows as s

pytestmark = pytest.mark.host("loaders of data, which draw from generators of the host")

SAMPLES = 23


def data_set(samples: int = SAMPLES) -> TensorDataset:
    rng = np.random.default_rng(3)
    x = torch.from_numpy(rng.standard_normal((samples, 4)))
    return TensorDataset(x, x.sum(1, keepdim=True))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 1).double()


def train(run: Any, batches: Any, optimizer: Any = None) -> int:
    steps = 0
    for x, y in batches:
        (run.optimizer if optimizer is None else optimizer).zero_grad()
        nn.functional.mse_loss(run.model(x), y).backward()
        run.step()
        steps += 1
    return steps


def start(world: Any, strategy: Any = None, **options: Any) -> Run:
    net = model()
    return Run(net, torch.optim.SGD(net.parameters(), 0.05), strategy, comm=world, **options)


@pytest.mark.mpi
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("own_generator", [False, True])
def test_a_plain_loader_is_sharded_as_one_process_with_larger_batches(
    world: Any, shuffle: bool, own_generator: bool
) -> None:
    data = data_set(24 * world.size)

    def generator() -> torch.Generator | None:
        return torch.Generator().manual_seed(5) if own_generator else None

    with start(world) as run:
        loader = DataLoader(data, batch_size=4, shuffle=shuffle, generator=generator())
        torch.manual_seed(7)
        for _ in range(2):
            assert train(run, run.batches(loader)) == 6
    plain = model()
    optimizer = torch.optim.SGD(plain.parameters(), 0.05)
    torch.manual_seed(7)
    whole = DataLoader(data, batch_size=4 * world.size, shuffle=shuffle, generator=generator())
    for _ in range(2):
        for x, y in whole:
            optimizer.zero_grad()
            nn.functional.mse_loss(plain(x), y).backward()
            optimizer.step()
    torch.testing.assert_close(run.model.weight, plain.weight, rtol=1e-9, atol=1e-12)


@pytest.mark.mpi
@pytest.mark.parametrize("strategy", [AllReduce, LASGD], ids=["allreduce", "lasgd"])
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_every_sample_is_taken_once(world: Any, strategy: Callable[[], Any], batch_size: int | None) -> None:
    loader = DataLoader(torch.arange(SAMPLES), batch_size=batch_size, shuffle=True)
    with start(world, strategy()) as run:
        part = run._loops.sharding.shard(loader, None)
        found = [sample for each in part for sample in torch.as_tensor(each).flatten().tolist()]
    samples = [sample for each in world.gather(found) for sample in each]
    assert sorted(samples) == list(range(SAMPLES))


@pytest.mark.mpi
@pytest.mark.parametrize("strategy", [AllReduce, LASGD], ids=["allreduce", "lasgd"])
@pytest.mark.parametrize("batches", [1, 7, 12])
def test_drop_last_drops_what_one_process_with_larger_batches_drops(
    world: Any, strategy: Callable[[], Any], batches: int
) -> None:
    loader = DataLoader(torch.arange(3 * batches + 2), batch_size=3, drop_last=True)
    with start(world, strategy()) as run:
        part = run._loops.sharding.shard(loader, None)
        counts = world.gather((len(part), len(list(part))))
    if batches >= world.size:
        assert counts == [(batches // world.size,) * 2] * world.size
    else:
        assert sum(drawn for _, drawn in counts) == batches


class AlreadyPart(Dataset[Any]):
    def __init__(self, rank: int, ranks: int) -> None:
        self.values = torch.arange(SAMPLES * ranks)[rank::ranks].double()

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.values[index]


class Augmented(Dataset[Any]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((3,), float(index)) + torch.rand(3) + float(np.random.rand())  # noqa: NPY002


@pytest.mark.mpi(min_size=2)
def test_data_that_the_user_has_sharded_is_left_alone(world: Any) -> None:
    rank, ranks, data = world.rank, world.size, data_set(SAMPLES * world.size)
    with start(world) as run:
        for loader in (
            DataLoader(Subset(data, range(rank, len(data), ranks)), batch_size=2),
            DataLoader(AlreadyPart(rank, ranks), batch_size=2, shuffle=True),
            DataLoader(data_set(SAMPLES + rank), batch_size=2),
            DataLoader(data, sampler=DistributedSampler(data, ranks, rank)),
            [(torch.ones(1), torch.ones(1))],
        ):
            assert run._loops.sharding.shard(loader, None) is loader
        loader = DataLoader(data, batch_size=2)
        assert run._loops.sharding.shard(loader, False) is loader
        torch.manual_seed(rank)
        state = torch.get_rng_state()
        assert len(run._loops.sharding.shard(DataLoader(Augmented()), None)) < SAMPLES
        assert torch.equal(torch.get_rng_state(), state)
        with pytest.raises(BadOption, match="cannot shard"):
            run._loops.sharding.shard([1, 2], True)


@pytest.mark.mpi
def test_epochs_of_a_distributed_sampler_are_numbered_unless_the_user_does(world: Any) -> None:
    data = data_set()
    sampler = DistributedSampler(data, world.size, world.rank)
    loader = DataLoader(data, sampler=sampler, batch_size=4)
    with start(world) as run:
        epochs = []
        for _ in range(3):
            train(run, run.batches(loader))
            epochs.append(sampler.epoch)
        sampler.set_epoch(9)
        train(run, run.batches(loader))
        assert [*epochs, sampler.epoch] == ([0, 1, 2, 9] if world.size > 1 else [0, 0, 0, 9])


@pytest.mark.mpi(min_size=2)
def test_the_same_data_on_all_ranks_is_a_warning(world: Any) -> None:
    data = data_set()
    with start(world) as run, warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for loader in (DataLoader(data, batch_size=4), list(DataLoader(data, batch_size=4))):
            list(run.batches(loader))  # no step: every rank may evaluate on all data
            train(run, run.batches(loader))
            texts = [str(each.message) for each in found if "same first batch" in str(each.message)]
            same = isinstance(loader, list) and world.rank == 0
            assert len(texts) == same, texts
    if world.rank == 0:
        assert f"ranks 0, 1{', 2' * (world.size > 2)}" in texts[0] and "DistributedSampler" in texts[0]


class Stream(IterableDataset[Any]):
    def __init__(self, rank: int, samples: int) -> None:
        self.rank, self.samples = rank, samples

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(self.rank)
        for _ in range(self.samples):
            x = torch.randn(4, generator=generator, dtype=torch.float64)
            yield x, x.sum()[None]


class Sized(Stream):
    def __len__(self) -> int:
        return self.samples + 7  # wrong


STRATEGIES = {
    "allreduce": AllReduce,
    "local": lambda: LocalSGD(2),
    "lasgd": LASGD,
    **{row.name: row.make for row in s.ROWS if row.name in ("dsgd", "adpsgd", "backup", "teleport", "ps")},
}


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["stream", "sized", "generator"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_streams_of_unequal_lengths(world: Any, name: str, kind: str) -> None:
    samples = 12 + 4 * world.rank
    loader: Any = DataLoader((Sized if kind == "sized" else Stream)(world.rank, samples), batch_size=4)
    seen = [0]

    def counted(batches: Any) -> Iterator[Any]:
        for batch in batches:
            seen[0] += 1
            yield batch

    with start(world, STRATEGIES[name]()) as run:
        before = run.steps
        train(run, run.batches(counted(loader) if kind == "generator" else loader))
        assert run.steps > before and len(set(world.gather(run.steps))) == 1
        if kind == "generator" and world.rank < run.workers:
            assert seen[0] == 3 + world.rank, "every batch is taken, and none twice"
        if kind != "generator":
            before = run.steps
            train(run, run.batches(loader, steps=2))
            assert run.steps == before + 2
        with run.averaged():
            assert s.same_everywhere(world, run.model)


def test_digests_depend_on_content_alone() -> None:
    a, b = torch.arange(6.0), {"x": [np.arange(3), "text"], "y": (1, 2.0)}
    assert digest(a) == digest(a.clone()) != digest(a.reshape(2, 3)) != digest(a.double())
    assert digest(b) == digest({"x": [np.arange(3), "text"], "y": (1, 2.0)}) != digest({**b, "y": (1, 3.0)})
    assert digest(a.bfloat16()) is not None and digest([a.to_sparse(), a > 2]) is not None
    for nothing in (torch.zeros(4), torch.zeros(0), np.ones((2, 2)), 3, (), None, [torch.ones(3), 1]):
        assert digest(nothing) is None


@pytest.mark.mpi
@pytest.mark.parametrize("by", ["loader", "rank"])
def test_an_accumulation_by_the_length_of_the_unsharded_loader_is_a_warning(world: Any, by: str) -> None:
    loader = DataLoader(data_set(8 * world.size), batch_size=2)  # 4 batches a rank
    with start(world) as run, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        last = len(loader) if by == "loader" else math.ceil(len(loader) / run.workers)
        for i, (x, y) in enumerate(run.batches(loader), 1):
            is_last = i % 3 == 0 or i == last
            with contextlib.nullcontext() if is_last else run.accumulate():
                nn.functional.mse_loss(run.model(x), y).backward()
            if is_last:
                run.step()
                run.zero_grad()
    text = "has ended within a step (1 of its batches)"
    is_expected = by == "loader" and world.size > 1 and world.rank == 0
    assert [text in str(each.message) for each in caught] == [True] * is_expected


@pytest.mark.mpi
def test_a_loader_that_is_changed_between_two_epochs(world: Any) -> None:
    loader = DataLoader(data_set(12 * world.size), batch_size=2)
    with start(world) as run:
        assert train(run, run.batches(loader)) == 6
        loader.batch_sampler.batch_size = 3  # type: ignore[union-attr]
        assert train(run, run.batches(loader)) == 4
        seen = []
        loader.collate_fn = lambda samples: seen.append(len(samples)) or default_collate(samples)
        assert train(run, run.batches(loader)) == 4 and set(seen) == {3}


@pytest.mark.mpi(min_size=2)
def test_a_data_set_that_grows_by_samples_of_each_rank_is_taken_as_it_is(world: Any) -> None:
    rows = [torch.ones(4) * n for n in range(2 * world.size)]
    loader = DataLoader(rows, 1, collate_fn=torch.stack)  # type: ignore[arg-type]
    model = nn.Linear(4, 1)
    with Run(model, torch.optim.SGD(model.parameters(), 0.0), comm=world) as run, torch.no_grad():
        assert len(list(run.batches(loader))) == 2
        rows += [torch.ones(4) * (10 + world.rank)] * 4
        loader.sampler.data_source = rows  # type: ignore[attr-defined]
        assert len(list(run.batches(loader))) == 2 * world.size + 4


@pytest.mark.mpi(min_size=2)
def test_integers_that_may_be_indices_are_sharded_with_a_warning(world: Any) -> None:
    model = nn.Linear(4, 1)
    with Run(model, torch.optim.SGD(model.parameters(), 0.0), comm=world) as run, torch.no_grad():
        for shard, warned in ((None, True), (True, False), (False, False)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = list(run.batches(DataLoader(range(4 * world.size), 1), shard=shard))  # type: ignore
            assert len(found) == (4 * world.size if shard is False else 4)
            assert any("a data set of integers" in str(w.message) for w in caught) == (
                warned and world.rank == 0
            )


@pytest.mark.mpi(min_size=2)
def test_a_new_loader_in_each_epoch_has_a_new_order(world: Any) -> None:
    model, data = nn.Linear(1, 1), torch.arange(32.0).unsqueeze(1)
    orders = []
    equal_steps = LASGD(period=2, max_lag=2, trigger="all")
    with Run(model, torch.optim.SGD(model.parameters(), 0.0), equal_steps, comm=world) as run:
        for _ in range(3):
            loader, order = DataLoader(data, 1, shuffle=True), []  # type: ignore[arg-type, var-annotated]
            for x in run.batches(loader, steps=4):
                order.append(float(x))
                run.zero_grad()
                model(x).sum().backward()
                run.step()
            orders.append(tuple(order[:3]))
    assert len(set(orders)) == 3
