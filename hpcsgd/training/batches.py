"""Batches of synchronous strategies: equally many for every peer."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from copy import copy as shallow_copy  # of objects of the user, whose classes are unknown
from itertools import chain
from typing import Any, TypeVar

from torch.utils.data import DataLoader, IterableDataset

from hpcsgd.errors import BadOption, HpcsgdError
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.training.batch_use import BatchUse, UsedBatches
from hpcsgd.training.digests import digest
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
    loaders: Sequence[Iterable[Batch]],
    context: StrategyContext,
    uneven: str,
    steps: int | None = None,
    nodes: VirtualNodes | None = None,
) -> Iterator[Batch]:
    """Yield the batches of one epoch, equally many for every peer.

    If all loaders have a length, the lengths are gathered once an epoch and trusted; else the ranks
    exchange before each step whether they have one more batch. A single peer gets its loader's batches.

    Parameters
    ----------
    loaders
        One for each local peer; batches are yielded for one peer after the other.
    context
        Its `batches` are set before each batch.
    uneven
        "join": a peer without further batches repeats its last one with weight 0, so that the user's
        loop, schedulers and counters advance equally on all ranks. "stop": the epoch ends for all peers
        with the shortest loader.
    steps
        Maximum number of steps. Default: none.
    nodes
        The local peers, where there are several.

    Raises
    ------
    HpcsgdError
        A loader has no batch at all where others have some, or yields another number of batches than its
        `len()`.
    """
    for loader in loaders:
        warn_of_forks(loader)
    plan = _plan(loaders, context, uneven == "join", nodes)
    use, last = BatchUse(context, counted=steps is not None), [_END] * len(loaders)
    loop = context.batches.begin_loop()
    used = UsedBatches(context, use, loop)
    try:
        while steps is None or context.current_peer_index or not used.are_enough(steps):
            batch, has_batch = next(plan, (_END, None))
            if has_batch is None or (uneven == "stop" and not all(has_batch)):
                break
            index = context.current_peer_index
            if batch is not _END:
                last[index] = _without_changes(batch, context)
            elif last[index] is _END:
                # Of peers without any batch, or resumed after their last: only the loader can supply one.
                last[index] = loaders[index].filler()  # type: ignore[attr-defined]
            context.batches.set(loop, used.take(has_batch))
            given = batch if batch is not _END else _without_changes(last[index], context)
            use.begin(batch if batch is not _END else None)
            yield given  # type: ignore[misc]
            use.check()
        used.end()
    finally:
        use.end()
        context.batches.end_loop(loop)


def _without_changes(batch: Any, context: StrategyContext) -> Any:
    """Return a shallow copy of a dictionary or list, which the loop may change before it is repeated."""
    is_changeable = context.peers.size > 1 and isinstance(batch, MutableMapping | list)
    return shallow_copy(batch) if is_changeable else batch


def _plan(
    loaders: Sequence[Iterable[object]], context: StrategyContext, join: bool, nodes: VirtualNodes | None
) -> Iterator[tuple[object, list[bool] | None]]:
    """Yield each batch, or the end marker, and which peers have one; collective."""
    if context.peers.size == 1:
        yield from ((batch, [True]) for batch in loaders[0])
        return
    lengths_here = [length_of(loader) for loader in loaders]  # before the first batch, which may change it
    batches = [started_late(loader) for loader in loaders]
    found, fillers = None, [hasattr(loader, "filler") for loader in loaders]
    # A sharded loader without a batch has one too: the ranks agree on its order.
    if may_fetch_ahead(loaders, context) and (lengths_here != [0] or fillers == [True]):
        first, batches[0] = fetch_first(batches[0])
        found = digest(first)
    entries_here = [(length, filler, found) for length, filler in zip(lengths_here, fillers, strict=True)]
    entries = [each for rank in context.world.meet("run.batches()", entries_here) for each in rank]
    context.loop.equal_peers = equal_peers([each for _, _, each in entries])
    if any(length is None for length, _, _ in entries):
        must_have_one = join and not all(filler for _, filler, _ in entries)
        yield from _agree_each_step(batches, context, must_have_one, nodes)
        return
    lengths = [length for length, _, _ in entries]
    if join and any(lengths):
        check_none_empty([length > 0 or filler for length, filler, _ in entries], context)
    yield from _from_lengths(batches, lengths, context)


def started_late(loader: Iterable[Batch]) -> Iterator[Batch]:
    """Yield a loader's batches; its `iter()` is called only with the first, in the place of that peer."""
    yield from loader


def may_fetch_ahead(loaders: Sequence[object], context: StrategyContext) -> bool:
    """Return whether the first batch may be fetched before its peer is in place and will take it.

    Virtual nodes have random generators each, and a checkpoint has the position of a loader that has one.
    """
    return context.peers.size > 1 and len(loaders) == 1 and not hasattr(loaders[0], "load_state_dict")


def fetch_first(batches: Iterator[Any]) -> tuple[Any, Iterator[Any]]:
    """Return the first batch, None if there is none, and an iterator over all batches."""
    first = next(batches, _END)
    return (None, batches) if first is _END else (first, chain((first,), batches))


def equal_peers(digests: Sequence[int | None]) -> list[int]:
    """Return the first peers of which the first batch is the same."""
    groups = [[peer for peer, each in enumerate(digests) if each == one] for one in set(digests) - {None}]
    return min((group for group in groups if len(group) > 1), default=[])


def length_of(loader: Any) -> int | None:
    """Return the number of batches of a loader; None where it is not known, or is an estimate."""
    if isinstance(loader, Iterator):
        return None  # some of its batches may have been taken
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):
        return None  # each of its workers may yield an incomplete batch
    try:
        return len(loader)
    except (TypeError, NotImplementedError, AttributeError):
        return None


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
            "with multiprocessing_context='forkserver', and import mpi4py.MPI, if the script does so itself, "
            "under `if __name__ == '__main__':`, for the workers import the script",
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
    batches: Sequence[Iterator[object]],
    context: StrategyContext,
    must_have_one: bool,
    nodes: VirtualNodes | None,
) -> Iterator[tuple[object, list[bool]]]:
    counts = [0] * len(batches)
    rounds: dict[int, tuple[list[object], list[bool]]] = {}  # by the number of the batch
    while True:
        index = context.current_peer_index
        number = counts[index]
        if number not in rounds:
            fetched = _fetch_one_each(batches, nodes)
            has_here = [batch is not _END for batch in fetched]
            what = "the check of run.batches() for one more batch"
            has_batch = [has for rank in context.world.meet(what, has_here) for has in rank]
            rounds[number] = fetched, has_batch
        fetched, has_batch = rounds[number]
        if not any(has_batch):
            return
        if number == 0 and must_have_one:
            check_none_empty(has_batch, context)
        counts[index] += 1
        rounds.pop(min(counts) - 1, None)
        yield fetched[index], has_batch


def _fetch_one_each(batches: Sequence[Iterator[object]], nodes: VirtualNodes | None) -> list[object]:
    if nodes is None or len(batches) == 1:
        return [next(each, _END) for each in batches]
    return [next(each, _END) for each, _ in zip(batches, nodes.each(), strict=True)]


def check_none_empty(has_batch: Sequence[bool], context: StrategyContext) -> None:
    """Raise `HpcsgdError` on all ranks if some peers have no batch."""
    if not all(has_batch):
        ranks = {peer // context.peers.per_rank for peer, has in enumerate(has_batch) if not has}
        raise HpcsgdError(
            "the loader has no batch at all, those of other ranks have some",
            rank=[context.world.all.ranks[rank] for rank in ranks],
            expected="at least one batch on every rank",
            do="give each rank a part of the data (of files or shards: at least as many as ranks), or pass "
            "uneven='stop' to Run",
            everywhere=True,
        )


def _wrong_length(context: StrategyContext, length: int, found: str) -> HpcsgdError:
    return HpcsgdError(
        "the loader's len() is not the number of its batches",
        rank=context.world.global_rank,
        expected=f"{length} batches, its len()",
        got=found,
        do="correct its __len__, or pass iter(loader): the ranks then check before each step "
        "which of them have a batch",
    )
