"""Batches for all peers: equally many a peer for synchronous strategies, on demand for asynchronous ones."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from hpcsgd.errors import BadOption, HpcsgdError
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.training.virtual_nodes import VirtualNodes

Batch = TypeVar("Batch")
_END = object()


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
    loaders: Sequence[Iterable[Batch]], context: StrategyContext, uneven: str
) -> Iterator[Batch]:
    """Yield the batches of one epoch, equally many for every peer.

    If all loaders have a length, the lengths are gathered once an epoch and trusted; else the ranks
    exchange before each step whether they have one more batch.

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

    Raises
    ------
    HpcsgdError
        A loader has no batch at all where others have some, has no `len()` although there are virtual
        nodes, or yields another number of batches than its `len()`.
    """
    for loader in loaders:
        _warn_of_forks(loader)
    join = uneven == "join"
    entries_of_rank = [(_length(loader), hasattr(loader, "filler")) for loader in loaders]
    entries = [entry for rank in context.world.gather(entries_of_rank, "an epoch's start") for entry in rank]
    if any(length is None for length, _ in entries):
        if len(loaders) > 1:
            raise _unsized(context)
        plan = _agree_each_step(loaders[0], context, join and not all(filler for _, filler in entries))
    else:
        lengths = [length for length, _ in entries]
        if join and any(lengths):
            _check_none_empty([length > 0 or filler for length, filler in entries])
        plan = _from_lengths(loaders, lengths, context)
    last: list[object] = [_END] * len(loaders)
    try:
        for batch, has_batch in plan:
            if not join and not all(has_batch):
                return
            index = context.current_peer_index
            if batch is not _END:
                last[index] = batch
            elif last[index] is _END:
                # Resumed after the end of this peer's batches: only the loader can supply one to repeat.
                last[index] = loaders[index].filler()  # type: ignore[attr-defined]
            context.set_batches(has_batch)
            context.loop.batches += 1
            yield last[index]  # type: ignore[misc]
    finally:
        context.begin_step()


class AsynchronousBatches:
    """Batches in the order in which an asynchronous strategy schedules the local peers.

    Parameters
    ----------
    context, strategy, virtual_nodes
        Those of the run.
    """

    def __init__(self, context: StrategyContext, strategy: Strategy, virtual_nodes: VirtualNodes) -> None:
        self._context, self._strategy, self._virtual_nodes = context, strategy, virtual_nodes
        self._loaders: list[Iterable[Any]] = []
        self._iterators: list[Iterator[Any]] = []

    def batches(self, loaders: Sequence[Iterable[Batch]], steps: int | None) -> Iterator[Batch]:
        """Yield batches until `steps` more steps have been taken.

        Parameters
        ----------
        loaders
            One for each local peer. With the same loaders as in the last call the iteration continues in
            the middle of them; at its end a loader is started again.
        steps
            None: the number of batches of the longest loader of all ranks.

        Raises
        ------
        HpcsgdError
            A loader is empty or an iterator that is exhausted, or `steps` is None and one has no `len()`.
        """
        context = self._context
        if [id(loader) for loader in loaders] != [id(loader) for loader in self._loaders]:
            for loader in loaders:
                _warn_of_forks(loader)
            self._loaders, self._iterators = list(loaders), [_repeat(context, each) for each in loaders]
        lengths = context.world.gather([_length(loader) for loader in loaders], "the start of some steps")
        flat = [length for entries in lengths for length in entries]
        if steps is None and None in flat:
            raise _unsized(context)
        end = context.step + (max(flat) if steps is None else steps)
        try:
            for index in self._strategy.peer_schedule(end):
                self._virtual_nodes.select_peer(index)
                context.step_taken = False
                while not context.step_taken:  # several batches a step if gradients are accumulated
                    yield next(self._iterators[index])
        finally:
            context.begin_step()


def _repeat(context: StrategyContext, loader: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty or iter(loader) is loader:
            raise HpcsgdError(
                "the loader has no batch at all" if empty else "the loader is exhausted",
                rank=context.world.rank,
                expected="a loader that can be iterated over again: with an asynchronous strategy a rank may "
                "take more steps than its loader has batches",
                do="pass the loader itself to run.batches(), not iter(loader)",
            )


def _length(loader: object) -> int | None:
    return len(loader) if isinstance(loader, Sized) else None


def _unsized(context: StrategyContext) -> HpcsgdError:
    return HpcsgdError(
        "a loader has no length",
        expected="loaders with len(), which virtual nodes and asynchronous strategies need",
        do="define its __len__; with an asynchronous strategy run.batches(loader, steps=...) will do",
        everywhere=True,
    )


def _warn_of_forks(loader: object) -> None:
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
    loaders: Sequence[Iterable[object]], lengths: list[int], context: StrategyContext
) -> Iterator[tuple[object, list[bool]]]:
    batches = [iter(loader) for loader in loaders]
    local_lengths = [lengths[peer] for peer in context.peers.local]
    step_counts = [0] * len(loaders)
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
    loader: Iterable[object], context: StrategyContext, must_have_one: bool
) -> Iterator[tuple[object, list[bool]]]:
    batches = iter(loader)
    first = True
    while True:
        batch = next(batches, _END)
        has_batch = context.world.gather(batch is not _END, "the check whether each rank has one more batch")
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
