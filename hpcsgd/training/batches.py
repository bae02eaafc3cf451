"""Batches of synchronous strategies: equally many for every peer."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from torch.utils.data import DataLoader, IterableDataset

from hpcsgd.errors import BadOption, HpcsgdError
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.training.digests import digest

Batch = TypeVar("Batch")
_END = object()
_SAMPLES = 4  # parameters at both ends of a model whose gradients show a backward pass


def loaders_of_peers(loader: Any, context: StrategyContext) -> list[Iterable[Any]]:
    """Return the loaders of the local peers: `loader` itself, or with virtual nodes those in it.

    Raises
    ------
    BadOption
        On all ranks, if there are virtual nodes and `loader` is no list with one for each.
    """
    each = context.peers.per_rank
    if each == 1:
        return [loader]
    if not isinstance(loader, list | tuple) or len(loader) != each:
        peers = context.peers.local
        raise BadOption(
            "virtual nodes need a loader each",
            expected=f"a list of {each} loaders, for peers {peers[0]} to {peers[-1]}",
            got=f"{type(loader).__name__}" + (f" of {len(loader)}" if hasattr(loader, "__len__") else ""),
            do="call run.batches([loader, ...]), one loader for each of run.peers",
            everywhere=True,
        )
    return list(loader)


def synchronous_batches(
    loaders: Sequence[Iterable[Batch]], context: StrategyContext, uneven: str, steps: int | None = None
) -> Iterator[Batch]:
    """Yield the batches of one epoch, equally many for every peer.

    If all loaders have a length, the lengths are gathered once an epoch and trusted; else the ranks
    exchange before each step whether they have one more batch. A single peer gets its loader's batches.

    Parameters
    ----------
    loaders
        One for each local peer; batches are yielded for one peer after the other.
    context
        Its `has_batch` is set before each batch.
    uneven
        "join": a peer without further batches repeats its last one with weight 0, so that the user's
        loop, schedulers and counters advance equally on all ranks. "stop": the epoch ends for all peers
        with the shortest loader.
    steps
        Maximum number of steps. Default: none.

    Raises
    ------
    HpcsgdError
        A loader has no batch at all where others have some, has no `len()` although there are virtual
        nodes, or yields another number of batches than its `len()`; or this rank takes its next batch without
        having used the last one.
    """
    for loader in loaders:
        warn_of_forks(loader)
    plan = _plan(loaders, context, uneven == "join")
    use, last, taken = BatchUse(context), [_END] * len(loaders), 0
    try:
        for batch, has_batch in plan:
            if uneven == "stop" and not all(has_batch):
                return
            index = context.current_peer_index
            taken += index == 0
            if steps is not None and taken > steps:
                return
            if batch is not _END:
                last[index] = batch
            elif last[index] is _END:
                # Resumed after the end of this peer's batches: only the loader can supply one to repeat.
                last[index] = loaders[index].filler()  # type: ignore[attr-defined]
            context.set_batches(has_batch)
            use.begin()
            yield last[index]  # type: ignore[misc]
            use.check()
    finally:
        context.begin_step()


def _plan(
    loaders: Sequence[Iterable[object]], context: StrategyContext, join: bool
) -> Iterator[tuple[object, list[bool]]]:
    """Yield each batch, or the end marker, and which peers have one; collective."""
    if context.peers.size == 1:
        yield from ((batch, [True]) for batch in loaders[0])
        return
    batches = [FirstBatch(loader) for loader in loaders]
    entries_of_rank = [
        (length_of(loader), hasattr(loader, "filler"), each.digest)
        for loader, each in zip(loaders, batches, strict=True)
    ]
    entries = [entry for rank in context.world.meet("run.batches()", entries_of_rank) for entry in rank]
    record_equal_peers([entry[2] for entry in entries], context)
    if any(length is None for length, _, _ in entries):
        if len(loaders) > 1:
            raise unsized_error()
        must_have_one = join and not all(filler for _, filler, _ in entries)
        yield from _agree_each_step(iter(batches[0]), context, must_have_one)
        return
    lengths = [length for length, _, _ in entries]
    if join and any(lengths):
        _check_none_empty([length > 0 or filler for length, filler, _ in entries])
    yield from _from_lengths([iter(each) for each in batches], lengths, context)


class BatchUse:
    """Finds batches that are followed by no gradient and no step, in a loop that takes steps.

    Parameters
    ----------
    context
        The context of the run.
    """

    def __init__(self, context: StrategyContext) -> None:
        self._context, self._before = context, context.loop.steps
        trained = [p for _, p in context.parameters if p.requires_grad]
        self._samples = [*trained[:_SAMPLES], *trained[-_SAMPLES:]] if context.world.size > 1 else []

    def begin(self) -> None:
        """Record that a batch is handed out."""
        self._context.loop.batches += 1
        self._context.loop.batch_used = False
        self._marks = self._gradients()

    def check(self) -> None:
        """Raise `HpcsgdError` where the loop has taken steps, and has made nothing of the last batch."""
        loop, world = self._context.loop, self._context.world
        if world.size == 1 or loop.batch_used or loop.steps == self._before:
            return
        if self._gradients() != self._marks:
            return  # gradients are accumulated over several batches
        raise HpcsgdError(
            "the next batch was taken without run.step() or run.skip() after the last one",
            rank=world.global_rank,
            got=f"batch {loop.batches}, after {self._context.step} steps",
            do="call run.skip() where a batch is left out, so that all ranks leave the step out",
        )

    def _gradients(self) -> list[tuple[int, int]]:
        return [(id(p.grad), 0 if p.grad is None else p.grad._version) for p in self._samples]


class FirstBatch:
    """A loader whose first batch is fetched at once, for a comparison with those of other ranks.

    Parameters
    ----------
    loader
        The loader.

    Attributes
    ----------
    digest
        Checksum of the first batch; None: there is none, or nothing to compare.
    """

    def __init__(self, loader: Iterable[object]) -> None:
        self._batches = iter(loader)
        self._first = next(self._batches, _END)
        self.digest = None if self._first is _END else digest(self._first)

    def __iter__(self) -> Iterator[object]:
        if self._first is not _END:
            first, self._first = self._first, _END
            yield first
            yield from self._batches


def record_equal_peers(digests: Sequence[int | None], context: StrategyContext) -> None:
    """Record, for a warning at the first step of a loop, which peers have the same first batch."""
    groups = [[p for p, each in enumerate(digests) if each == one] for one in set(digests) - {None}]
    context.loop.equal_peers = min((found for found in groups if len(found) > 1), default=[])


def length_of(loader: Any) -> int | None:
    """Return the number of batches of a loader; None where it is not known."""
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):
        return None  # an estimate at best: each worker may yield an incomplete batch
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def unsized_error() -> HpcsgdError:
    """Return the error for a loader without a length."""
    return HpcsgdError(
        "a loader has no length",
        expected="loaders with len(), which virtual nodes need",
        do="define its __len__",
        everywhere=True,
    )


def warn_of_forks(loader: object) -> None:
    """Warn of a DataLoader that forks its workers."""
    if (
        isinstance(loader, DataLoader)
        and loader.num_workers > 0
        and loader.multiprocessing_context is None
        and multiprocessing.get_start_method() == "fork"
    ):
        warnings.warn(
            "this DataLoader forks its workers after MPI was initialised, which can crash or hang: create it "
            "with multiprocessing_context='forkserver'",
            RuntimeWarning,
            stacklevel=2,
        )


def _from_lengths(
    batches: Sequence[Iterator[object]], lengths: list[int], context: StrategyContext
) -> Iterator[tuple[object, list[bool]]]:
    local_lengths = [lengths[peer] for peer in context.peers.local]
    step_counts = [0] * len(batches)
    while step_counts[context.current_peer_index] < max(lengths):
        index = context.current_peer_index
        step, length = step_counts[index], local_lengths[index]
        batch = next(batches[index], _END) if step < length else _END
        if step < length and batch is _END:
            raise _wrong_length(context, length, str(step))
        step_counts[index] += 1
        yield batch, [step < length for length in lengths]
    for remaining, length in zip(batches, local_lengths, strict=True):
        if next(remaining, _END) is not _END:
            raise _wrong_length(context, length, f"more than {length}")


def _agree_each_step(
    batches: Iterator[object], context: StrategyContext, must_have_one: bool
) -> Iterator[tuple[object, list[bool]]]:
    first = True
    while True:
        batch = next(batches, _END)
        has_batch = context.world.meet("the next batch of run.batches()", batch is not _END)
        if not any(has_batch):
            return
        if first and must_have_one:
            _check_none_empty(has_batch)
        first = False
        yield batch, has_batch


def _check_none_empty(has_batch: list[bool]) -> None:
    if not all(has_batch):
        raise HpcsgdError(
            "the loader has no batch at all, those of other ranks have some",
            rank=[rank for rank, has in enumerate(has_batch) if not has],
            expected="at least one batch on every rank",
            do="give each rank a part of the data, or pass uneven='stop' to Run",
            everywhere=True,
        )


def _wrong_length(context: StrategyContext, length: int, found: str) -> HpcsgdError:
    return HpcsgdError(
        "the loader's len() is not the number of its batches",
        rank=context.world.rank,
        expected=f"{length} batches, its len()",
        got=found,
        do="correct its __len__, or pass iter(loader): the ranks then check before each step "
        "which of them have a batch",
    )


def in_loop(batches: Iterator[Batch], context: StrategyContext) -> Iterator[Batch]:
    """Yield the batches, and record whether the loop over them is left before its end."""
    calls, loop = context.world.calls, context.loop
    calls.loop, calls.left, loop.is_open = calls.loop + 1, False, True
    ended = False
    try:
        yield from batches
        ended = True
    finally:
        calls.left, loop.is_open = not ended, False
