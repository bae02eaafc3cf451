"""Sharding of a plain DataLoader: each rank takes its part of the global order of batches."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from hpcsgd.errors import BadOption
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.training.fingerprint import fingerprint
from hpcsgd.training.identity_map import IdentityMap

#: Arguments of a DataLoader that a sharded one takes over.
_ARGUMENTS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
)


class _Plain(NamedTuple):
    """The order of a plain loader: its sampler, and how samples become batches; size None: one by one."""

    sampler: SequentialSampler | RandomSampler
    batch_size: int | None
    drop_last: bool


class Sharding:
    """Replaces plain DataLoaders by sharded ones.

    Parameters
    ----------
    context, strategy
        Those of the run. With a synchronous strategy the ranks begin each epoch together, and its order is
        that of rank 0's sampler; else it is a function of the run's seed and the number of the epoch.
    """

    def __init__(self, context: StrategyContext, strategy: Strategy) -> None:
        self._context = context
        self._workers = strategy.workers(context.world.size)
        self._worker = context.world.rank % self._workers
        self._synchronous = strategy.synchronous
        #: By loader, its settings and its part: users may change a loader between two epochs.
        self._sharded: IdentityMap[tuple[list[Any], ShardedLoader]] = IdentityMap()
        self._fingerprints: IdentityMap[tuple[object, ...]] = IdentityMap()
        self._made = 0  # sharded loaders, also those that are gone: equally many on all ranks

    def shard(self, loader: Iterable[Any], shard: bool | None) -> Iterable[Any]:
        """Return the loader for this rank's shard; collective.

        Parameters
        ----------
        loader
            Any loader.
        shard
            True: shard a plain DataLoader; False: take the loader as it is; None: shard it if all ranks have
            the same data set, as far as a few samples show.

        Raises
        ------
        BadOption
            On all ranks, if `shard` is True for another kind of loader, or differs.
        """
        context = self._context
        if context.world.size == 1 or self._workers == 1:
            return loader
        plain = _plain(loader) if context.peers.per_rank == 1 else None
        found = self._fingerprint(loader, plain) if plain and shard is None else None
        mine = type(loader).__name__, shard, plain is not None, found
        others = context.world.meet("run.batches()", mine)[: self._workers]
        self._check(others)
        by_default = shard is None and others[0][-1] is not None and len({each[-1] for each in others}) == 1
        if not (shard or by_default) or plain is None:  # the loader of a server is never used
            return loader
        settings = [*plain, *(getattr(loader, name, None) for name in _ARGUMENTS)]
        known = self._sharded.get(loader)
        if known is None or any(a is not b and a != b for a, b in zip(known[0], settings, strict=True)):
            known = settings, self._make(loader, plain)
            self._sharded.set(loader, known)
            if by_default and context.world.rank == 0:
                _warn_of_indices(loader)
        return known[1]

    def _check(self, others: list[tuple[str, bool | None, bool, object]]) -> None:
        if len({shard for _, shard, _, _ in others}) > 1:
            raise BadOption(
                "option shard of run.batches differs between ranks",
                got=", ".join(str(shard) for _, shard, _, _ in others),
                do="pass the same on all ranks",
                everywhere=True,
            )
        _, shard, _, _ = others[0]
        other = [rank for rank, (_, _, is_plain, _) in enumerate(others) if not is_plain]
        if shard and other:
            raise BadOption(
                "run.batches(shard=True) for a loader that it cannot shard",
                rank=[self._context.world.all.ranks[rank] for rank in other],
                expected="a torch DataLoader of a data set with len(), in its order or shuffled, and no "
                "virtual nodes",
                got=others[other[0]][0],
                do="give each rank its own part, by run.worker and run.workers",
                everywhere=True,
            )

    def _fingerprint(self, loader: Any, plain: _Plain) -> tuple[object, ...] | None:
        found, sampler = self._fingerprints.get(loader), plain.sampler
        order = type(sampler).__name__, len(sampler), len(sampler.data_source)
        form = (*order, plain.batch_size, plain.drop_last)
        if found is None or found[:-1] != form:
            found = (*form, fingerprint(loader.dataset))
            self._fingerprints.set(loader, found)
        return None if found[-1] is None else found

    def _make(self, loader: Any, plain: _Plain) -> ShardedLoader:
        arguments = {name: getattr(loader, name) for name in _ARGUMENTS if hasattr(loader, name)}
        self._made += 1
        agree = self._generator if self._synchronous else None
        order = _Order(plain.sampler, agree, f"{self._context.seed} {self._made}")
        if plain.batch_size is None:
            part: Any = _Part(order, self._worker, self._workers)
            return ShardedLoader(loader.dataset, batch_size=None, sampler=part, **arguments)
        batches = BatchSampler(order, plain.batch_size, plain.drop_last)
        part = _Part(batches, self._worker, self._workers)
        return ShardedLoader(loader.dataset, batch_sampler=part, **arguments)

    def _generator(self, own: torch.Generator | None) -> torch.Generator:
        """Return the generator of rank 0's order, drawn as `RandomSampler` would, on all ranks."""
        world, state = self._context.world, None
        if world.rank == 0:
            own = _seeded(int(torch.empty((), dtype=torch.int64).random_())) if own is None else own
            state = own.device.type, own.get_state()
        device, shared = world.gather(state, "the state of an epoch's order")[0]
        if world.rank == 0:
            assert own is not None
            return own
        copied = torch.Generator(device)
        copied.set_state(shared)
        return copied


def _warn_of_indices(loader: Any) -> None:
    dataset = loader.dataset
    if isinstance(dataset, Sequence) and len(dataset) and isinstance(dataset[0], int):
        warnings.warn(
            "run.batches() shards a data set of integers: each rank gets its part of them. If they are "
            "indices of data of each rank's own, pass shard=False; if all ranks have the same, shard=True",
            RuntimeWarning,
            stacklevel=5,
        )


class ShardedLoader(DataLoader[Any]):
    """A DataLoader of one rank's batches."""

    def filler(self) -> Any:
        """Return a batch for a rank that has none of its own: there are fewer batches than ranks."""
        whole = getattr(self.batch_sampler, "whole", None)
        size = None if whole is None else whole.batch_size
        # With a generator of its own, the global one stays as it is.
        first = DataLoader(self.dataset, size, collate_fn=self.collate_fn, generator=torch.Generator())
        return next(iter(first))


class _Order:
    """The global order of samples: that of a sequential or random sampler, the same on all ranks.

    Parameters
    ----------
    sampler
        The sampler of the loader.
    agree
        Returns, for this rank's own generator or None, that of rank 0; None: the ranks agree on nothing.
    seed
        Seed of the order where the ranks agree on nothing: of the run, and the number of the loader.
    """

    def __init__(
        self,
        sampler: Any,
        agree: Callable[[torch.Generator | None], torch.Generator] | None,
        seed: str,
    ) -> None:
        self._sampler, self._agree, self._seed, self._epoch = sampler, agree, seed, -1

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        sampler = self._sampler
        if not isinstance(sampler, RandomSampler):
            return iter(sampler)
        self._epoch += 1
        if self._agree is None:
            own = "" if sampler.generator is None else sampler.generator.initial_seed()
            generator = _seeded(zlib.crc32(f"{self._seed} {own} {self._epoch}".encode()))
        else:
            generator = self._agree(sampler.generator)
        return iter(RandomSampler(sampler.data_source, sampler.replacement, sampler._num_samples, generator))


class _Part:
    """Every n-th element of a sampler or of a batch sampler.

    With `drop_last`, the last batches that are fewer than the ranks are dropped too, as by one process whose
    batches are as large as those of all ranks together; but never all of them.
    """

    def __init__(self, whole: Any, first: int, step: int) -> None:
        self.whole, self._first, self._step = whole, first, step

    def _total(self) -> int:
        total = len(self.whole)
        drops = getattr(self.whole, "drop_last", False) and total > self._step
        return total - total % self._step if drops else total

    def __len__(self) -> int:
        return len(range(self._first, self._total(), self._step))

    def __iter__(self) -> Iterator[Any]:
        # To the end on all ranks, which agree on the order in the first step of the iteration.
        total = self._total()
        for index, each in enumerate(self.whole):
            if index < total and index % self._step == self._first:
                yield each


def _seeded(seed: int) -> torch.Generator:
    generator = torch.Generator(device="cpu")
    generator.manual_seed(seed)
    return generator


def _plain(loader: object) -> _Plain | None:
    """Return the order of a loader that is torch's own and takes a data set in its order or shuffled."""
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        return None
    batches: Any = loader.batch_sampler
    if batches is None:
        found = _Plain(loader.sampler, None, False)  # type: ignore[arg-type]
    elif type(batches) is BatchSampler:
        found = _Plain(batches.sampler, batches.batch_size, batches.drop_last)  # type: ignore[arg-type]
    else:
        return None
    return found if type(found.sampler) in (SequentialSampler, RandomSampler) else None
