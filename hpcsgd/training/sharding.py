"""Sharding of a plain DataLoader: each rank takes its part of the global order of batches."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from hpcsgd.errors import BadOption
from hpcsgd.strategies import Strategy, StrategyContext
from hpcsgd.training import rng_state
from hpcsgd.training.digests import digest

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


class Sharding:
    """Replaces plain DataLoaders by sharded ones, and sets the epochs of samplers that have them.

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
        self._sharded: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self._fingerprints: WeakKeyDictionary[Any, int | None] = WeakKeyDictionary()
        self._epochs: WeakKeyDictionary[Any, tuple[int, int]] = WeakKeyDictionary()

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
            `shard` is True for another kind of loader.
        """
        context = self._context
        if context.world.size == 1 or self._workers == 1 or context.peers.per_rank > 1:
            return loader
        plain = _is_plain(loader)
        if shard and not plain:
            raise BadOption(
                "run.batches(shard=True) for a loader that it cannot shard",
                expected="a torch DataLoader of a data set with len(), in its order or shuffled",
                got=type(loader).__name__,
                do="give each rank its own part, by run.worker and run.workers",
                everywhere=True,
            )
        if shard is None:
            found = self._fingerprint(loader) if plain else None
            others = context.world.meet("run.batches()", found)
            shard = found is not None and len(set(others[: self._workers])) == 1
        self._set_epoch(loader)
        return self._sharded_loader(loader) if shard else loader

    def _fingerprint(self, loader: Any) -> int | None:
        if loader not in self._fingerprints:
            self._fingerprints[loader] = _fingerprint(loader.dataset)
        return self._fingerprints[loader]

    def _sharded_loader(self, loader: Any) -> Any:
        if loader not in self._sharded:
            self._sharded[loader] = self._make(loader)
        return self._sharded[loader]

    def _make(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        arguments = {name: getattr(loader, name) for name in _ARGUMENTS if hasattr(loader, name)}
        order = _Order(loader.sampler, self._generator if self._synchronous else None, self._context.seed)
        if loader.batch_size is None:
            sampler = _Part(order, self._worker, self._workers)
            return DataLoader(loader.dataset, batch_size=None, sampler=sampler, **arguments)
        batches = BatchSampler(order, loader.batch_size, loader.drop_last)
        part = _Part(batches, self._worker, self._workers)
        return DataLoader(loader.dataset, batch_sampler=part, **arguments)

    def _generator(self, own: torch.Generator | None) -> torch.Generator:
        """Return the generator of rank 0's order, drawn as `RandomSampler` would, on all ranks."""
        world, state = self._context.world, None
        if world.rank == 0 and own is None:
            seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
            own = _seeded(seed)
        if world.rank == 0:
            assert own is not None
            state = own.get_state()
        shared = world.gather(state, "the state of an epoch's order")[0]
        if world.rank > 0 or own is None:
            own = _seeded(0)
            own.set_state(shared)
        return own

    def _set_epoch(self, loader: Iterable[Any]) -> None:
        """Number the epochs of a sampler or data set with `set_epoch`, unless the user does."""
        for name in ("sampler", "batch_sampler", "dataset"):
            owner: Any = getattr(loader, name, None)
            if not callable(getattr(owner, "set_epoch", None)):
                continue
            epoch, last = self._epochs.get(owner, (-1, 0))
            if getattr(owner, "epoch", last) != last:
                continue  # set by the user since
            owner.set_epoch(epoch + 1)
            self._epochs[owner] = epoch + 1, getattr(owner, "epoch", epoch + 1)


class _Order:
    """The global order of samples: that of a sequential or random sampler, the same on all ranks.

    Parameters
    ----------
    sampler
        The sampler of the loader.
    agree
        Returns, for this rank's own generator or None, that of rank 0; None: the ranks agree on nothing.
    seed
        Seed of the order where the ranks agree on nothing.
    """

    def __init__(
        self,
        sampler: Any,
        agree: Callable[[torch.Generator | None], torch.Generator] | None,
        seed: int,
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
            generator = _seeded(zlib.crc32(f"{self._seed} {self._epoch}".encode()))
        else:
            generator = self._agree(sampler.generator)
        return iter(RandomSampler(sampler.data_source, sampler.replacement, sampler._num_samples, generator))


class _Part:
    """Every n-th element of a sampler or of a batch sampler.

    Parameters
    ----------
    whole
        The sampler.
    first, step
        The first element, and the distance of two.
    """

    def __init__(self, whole: Any, first: int, step: int) -> None:
        self._whole, self._first, self._step = whole, first, step

    def __len__(self) -> int:
        return len(range(self._first, len(self._whole), self._step))

    def __iter__(self) -> Iterator[Any]:
        for index, each in enumerate(self._whole):
            if index % self._step == self._first:
                yield each


def _seeded(seed: int) -> torch.Generator:
    generator = torch.Generator(device="cpu")
    generator.manual_seed(seed)
    return generator


def _is_plain(loader: object) -> bool:
    """Return whether a loader is torch's own, and takes a data set in its order or shuffled."""
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        return False
    batched = loader.batch_size is None or type(loader.batch_sampler) is BatchSampler
    return batched and type(loader.sampler) in (SequentialSampler, RandomSampler)


def _fingerprint(dataset: Any) -> int | None:
    """Return a checksum of a data set's kind, length, subsets and three samples; None: there is none."""
    parts = [f"{type(dataset).__qualname__} {len(dataset)}"]
    inner = dataset
    while isinstance(inner, Subset):
        parts.append(str(zlib.crc32(np.asarray(list(inner.indices), np.int64).tobytes())))
        inner = inner.dataset
    if not len(dataset):
        return None
    generators = rng_state.state()
    try:
        for index in sorted({0, len(dataset) // 2, len(dataset) - 1}):
            rng_state.seed(0)  # random augmentation is the same on all ranks
            found = digest(dataset[index], distinctive=False)
            if found is None:
                return None
            parts.append(str(found))
    except Exception:
        return None
    finally:
        rng_state.restore(generators)
    return zlib.crc32(" ".join(parts).encode())
