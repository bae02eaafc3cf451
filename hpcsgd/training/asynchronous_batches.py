"""Batches of asynchronous strategies: on demand, in the order in which local peers are scheduled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from hpcsgd.errors import HpcsgdError
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.training.batches import length_of, record_equal_peers, warn_of_forks
from hpcsgd.training.digests import digest
from hpcsgd.training.virtual_nodes import VirtualNodes

Batch = TypeVar("Batch")
_END = object()
_LONGEST_ROUND = 32  # steps between two questions whether a rank has new batches


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
        self._sources: list[_Source[Any]] = []

    def batches(self, loaders: Sequence[Iterable[Batch]], steps: int | None) -> Iterator[Batch]:
        """Yield batches until `steps` more steps have been taken.

        Parameters
        ----------
        loaders
            One for each local peer. With the same loaders as in the last call the iteration continues in
            the middle of them; at its end a loader is started again.
        steps
            None: the number of batches of the longest loader of all ranks; where one has no length, until
            every loader has been at its end.

        Raises
        ------
        HpcsgdError
            A loader is empty, or cannot be started again.
        """
        context = self._context
        if [id(loader) for loader in loaders] != [id(loader) for loader in self._loaders]:
            for loader in loaders:
                warn_of_forks(loader)
            self._loaders = list(loaders)
            self._sources = [_Source(context, each) for each in loaders]
        lengths = [length_of(loader) for loader in loaders]
        entries = context.world.meet("run.batches()", (lengths, self._first_digest()))
        record_equal_peers([found for _, found in entries], context)
        try:
            if steps is None and any(None in found for found, _ in entries):
                yield from self._until_all_ended()
            else:
                longest = max(length or 0 for found, _ in entries for length in found)
                yield from self._until(context.step + (longest if steps is None else steps))
        finally:
            context.begin_step()

    def _first_digest(self) -> int | None:
        if self._context.world.size == 1 or not self._computes():
            return None
        return digest(self._sources[0].peek())

    def _until(self, end: int) -> Iterator[Any]:
        context = self._context
        for index in self._strategy.peer_schedule(end):
            self._virtual_nodes.select_peer(index)
            context.step_taken = False
            while not context.step_taken:  # several batches a step if gradients are accumulated
                batch = next(self._sources[index])
                context.loop.batches += 1
                yield batch

    def _until_all_ended(self) -> Iterator[Any]:
        """Yield batches in rounds of steps, until every loader of all ranks has been at its end."""
        steps = 1
        for source in self._sources:
            source.begin_epoch()
        while any(self._context.world.meet("run.batches()", self._has_new())):
            yield from self._until(self._context.step + steps)
            steps = min(2 * steps, _LONGEST_ROUND)

    def _has_new(self) -> bool:
        return self._computes() and any(source.has_new() for source in self._sources)

    def _computes(self) -> bool:
        """Return whether this rank takes batches: the loader of a server is never used."""
        world = self._context.world
        return world.rank < self._strategy.workers(world.size)


class _Source(Generic[Batch]):
    """The batches of one loader, again and again.

    Parameters
    ----------
    context
        The context of the run, for errors.
    loader
        The loader.
    """

    def __init__(self, context: StrategyContext, loader: Iterable[Batch]) -> None:
        self._context, self._loader = context, loader
        self._batches = iter(loader)
        self._ahead: list[Any] = []
        self._last: Any = _END
        self._ended = self._repeats_last = False

    def begin_epoch(self) -> None:
        """Begin an epoch that ends when all loaders have been at their ends, for which this one may wait."""
        self._ended, self._repeats_last = False, True

    def has_new(self) -> bool:
        """Return whether the loader has a batch before its next end, and has not been at one."""
        if not self._ended and not self._ahead:
            batch = next(self._batches, _END)
            self._ended = batch is _END
            self._ahead = [] if self._ended else [batch]
        return not self._ended

    def peek(self) -> Any:
        """Return the next batch without taking it."""
        self._ahead = self._ahead or [next(self)]
        return self._ahead[0]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch: Any = self._ahead.pop() if self._ahead else next(self._batches, _END)
        if batch is _END:
            self._ended = True
            self._batches = iter(self._loader)
            batch = next(self._batches, _END)
        if batch is _END:
            if self._last is _END or not self._repeats_last:
                raise self._exhausted()
            self._context.loop.exhausted = True
            batch = self._last
        self._last = batch
        return batch  # type: ignore[no-any-return]

    def _exhausted(self) -> HpcsgdError:
        once = iter(self._loader) is self._loader
        return HpcsgdError(
            "the loader is exhausted" if once else "the loader has no batch at all",
            rank=self._context.world.global_rank,
            expected="a loader that can be iterated over again: with an asynchronous strategy a rank may "
            "take more steps than its loader has batches",
            do="pass the loader itself to run.batches(), not iter(loader) or a generator",
        )
