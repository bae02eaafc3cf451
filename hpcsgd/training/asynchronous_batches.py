"""Batches of asynchronous strategies: on demand, in the order in which local peers are scheduled."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader

from hpcsgd.errors import HpcsgdError
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.training.batch_use import BatchUse
from hpcsgd.training.batches import (
    check_none_empty,
    equal_peers,
    length_of,
    may_fetch_ahead,
    warn_of_forks,
)
from hpcsgd.training.digests import digest
from hpcsgd.training.epochs import Epochs
from hpcsgd.training.virtual_nodes import VirtualNodes

Batch = TypeVar("Batch")
_END = object()
_LONG_ROUND = 32  # steps


class AsynchronousBatches:
    """Batches in the order in which an asynchronous strategy schedules the local peers."""

    def __init__(
        self, context: StrategyContext, strategy: Strategy, virtual_nodes: VirtualNodes, epochs: Epochs
    ) -> None:
        self._context, self._strategy, self._virtual_nodes = context, strategy, virtual_nodes
        self._epochs = epochs
        self._loaders: list[Iterable[Any]] = []
        self._sources: list[_Source[Any]] = []
        self._taken = 0
        #: Of the loop in progress, on this rank.
        self._use, self._unused = BatchUse(context, counted=True), 0
        self._limit: int | None = None
        self._warned, self._longest, self._accumulated = False, 0, 0

    def batches(self, loaders: Sequence[Iterable[Batch]], steps: int | None) -> Iterator[Batch]:
        """Yield batches until `steps` more steps have been taken.

        A loader is started again at its end. One that cannot be, such as a generator, then repeats its last
        batch with weight 0; when all have come to that, the loop ends.

        Parameters
        ----------
        loaders
            One for each local peer. With the same loaders as in the last call the iteration continues in
            the middle of them.
        steps
            None: the number of batches of the longest loader of all ranks; where one has no length, until
            every loader has been at its end.

        Raises
        ------
        HpcsgdError
            On all ranks, if the loaders of some peers have no batch at all, and those of others have; or a
            rank has had all batches of its loader, or `steps`, and has taken no step.
        """
        context = self._context
        if [id(loader) for loader in loaders] != [id(loader) for loader in self._loaders]:
            for loader in loaders:
                warn_of_forks(loader)
            self._loaders, self._sources = list(loaders), [_Source(each, self._epochs) for each in loaders]
        lengths_here = [length_of(loader) for loader in loaders]
        first = self._fetch_first()
        once = any(isinstance(loader, Iterator) for loader in loaders)
        entries = context.world.meet("run.batches()", (lengths_here, once, *first))
        entries = entries[: self._strategy.workers(context.world.size)]  # a server's loader is never used
        context.loop.equal_peers = equal_peers([found for *_, found in entries])
        has_batch = [has for _, _, has, _ in entries]
        if not any(has_batch):
            return
        check_none_empty(has_batch, context)
        lengths = [length for found, *_ in entries for length in found]
        self._use, self._limit, self._unused = BatchUse(context, counted=True), steps, 0
        self._accumulated = 0
        self._longest = max((length for length in lengths if length is not None), default=0)
        self._steps_before = context.loop.steps
        for source in self._sources:
            source.begin_epoch(restarts=True)
        self._loop = loop = context.batches.begin_loop()
        try:
            if any(once for _, once, *_ in entries) or (steps is None and None in lengths):
                yield from self._in_rounds(None if steps is None else context.step + steps)
            else:
                yield from self._until(context.step + (max(lengths) if steps is None else steps))
        finally:
            self._use.end()
            context.batches.end_loop(loop)

    @property
    def _is_server(self) -> bool:
        world = self._context.world
        return world.rank >= self._strategy.workers(world.size)

    def _fetch_first(self) -> tuple[bool, int | None]:
        """Return whether this rank has a batch, as far as is known, and the checksum of its next one.

        It is not fetched ahead of its step where it may depend on the step, and the epoch's end does not.
        """
        if self._is_server or not may_fetch_ahead(self._loaders, self._context):
            return True, None
        source, loader, length = self._sources[0], self._loaders[0], length_of(self._loaders[0])
        if length is not None and not isinstance(loader, DataLoader | list | tuple):
            return length > 0 or source.can_repeat(), None
        has_batch = source.has_next() or source.can_repeat()
        return has_batch, digest(source.ahead)

    def _until(self, end: int) -> Iterator[Any]:
        context = self._context
        for index in self._strategy.peer_schedule(end):
            self._virtual_nodes.select_peer(index)
            context.step_taken, taken = False, 0
            while not context.step_taken:  # several batches a step if gradients are accumulated
                batch, is_new = self._sources[index].take()
                every = range(context.peers.size)
                context.batches.set(self._loop, [is_new or peer != context.peer for peer in every])
                self._use.begin()
                self._taken, taken = self._taken + 1, taken + 1
                yield batch
                self._unused += self._use.is_unused()
                if context.loop.steps == self._steps_before and self._is_at_end(self._sources[index], taken):
                    return
            self._accumulated += taken > 1
            if self._accumulated > 1:  # the first step of a loop that looks ahead takes several, too
                self._warn_of_accumulation(taken)

    def _is_at_end(self, source: _Source[Any], taken: int) -> bool:
        """Return whether a loop that has taken no step has had its batches; an error with several peers.

        Those are all batches of the loader, or `steps`; twice the loader's if gradients are accumulated.
        """
        if self._limit is not None:
            at_end = self._unused >= self._limit
        else:
            at_end = source.passes() >= (1 if self._unused == taken else 2)
        if not at_end:
            return False
        if self._context.peers.size == 1:
            return True
        raise HpcsgdError(
            "a loop over run.batches() without run.step(), which ends after a number of steps",
            rank=self._context.world.global_rank,
            do="call run.step() in the loop; evaluate under torch.no_grad() or torch.inference_mode(), with "
            "which a loop has each batch once",
        )

    def _warn_of_accumulation(self, batches: int) -> None:
        """Warn of a loop over the batches of an epoch, which takes a step for each, with several batches."""
        if self._limit is None and not self._warned and self._context.world.rank == 0:
            warnings.warn(
                f"a step has taken {batches} batches, and this loop takes as many steps as the longest "
                "loader has batches, so it goes through the data several times. Give the number of steps: "
                f"run.batches(loader, steps={self._longest // batches or '...'})",
                RuntimeWarning,
                stacklevel=5,
            )
        self._warned = True

    def _in_rounds(self, end: int | None) -> Iterator[Any]:
        """Yield batches in rounds of some steps, until no rank has a new batch, or iteration `end`.

        New are the batches before a loader's first end, or, with an `end`, all but repeated ones. The rounds
        grow: a rank that is so slow that the others take all steps of one must get its turn in another.
        """
        context, length, before = self._context, 1, -1
        for source in self._sources:
            source.begin_epoch(restarts=end is not None)
        while end is None or context.step < end:
            # A server takes none and has none; neither may it wait for its turn.
            status = self._has_new(), self._taken == before and not self._is_server
            found = context.world.meet("the check of run.batches() for new batches", status)
            if not any(has_new for has_new, _ in found):
                return
            if context.peers.size > 1 and before >= 0 and (length < _LONG_ROUND or any(i for _, i in found)):
                length *= 2
            before, last = self._taken, context.step + length
            yield from self._until(last if end is None else min(last, end))

    def _has_new(self) -> bool:
        if self._is_server:
            return False
        found = []
        for index, source in enumerate(self._sources):
            self._virtual_nodes.select_peer(index)  # for its random generators
            found.append(source.has_new())
        return any(found)


class _Source(Generic[Batch]):
    """The batches of one loader, again and again."""

    def __init__(self, loader: Iterable[Batch], epochs: Epochs) -> None:
        self._loader, self._epochs = loader, epochs
        self._batches: Iterator[Any] | None = None
        self._ahead = self._last = _END
        self._ends, self._restarts = 0, True
        #: Batches taken since the loader was started, and whether the epoch has begun after some of them.
        self._taken, self._begins_inside = 0, False

    @property
    def ahead(self) -> Any:
        return None if self._ahead is _END else self._ahead

    def begin_epoch(self, *, restarts: bool) -> None:
        """Begin to look for new batches: those before the loader's next end, or, with `restarts`, any."""
        self._ends, self._restarts = 0, restarts
        self._begins_inside = self._batches is not None and self._taken > 0

    def has_new(self) -> bool:
        """Return whether there is a new batch."""
        if not self._restarts and not self._ends and self._ahead is _END:
            self._ahead = self._fetch()
        return self.has_next() if self._restarts else not self._ends

    def passes(self) -> int:
        """Return how often all batches of the loader have come since `begin_epoch`."""
        if self._ahead is _END and self._batches is not None:
            self._ahead = self._fetch()
        return self._ends - self._begins_inside

    def has_next(self) -> bool:
        """Return whether there is a batch that is no repetition, after a restart at need."""
        for _ in range(2):
            if self._ahead is _END:
                self._ahead = self._fetch()
        return self._ahead is not _END

    def can_repeat(self) -> bool:
        """Return whether a batch can be repeated."""
        return self._last is not _END or hasattr(self._loader, "filler")

    def take(self) -> tuple[Batch, bool]:
        """Return the next batch, and whether it is no repetition."""
        is_new = self.has_next()
        if is_new:
            self._last, self._ahead, self._taken = self._ahead, _END, self._taken + 1
        elif not self.can_repeat():
            raise HpcsgdError(
                "the loader has no batch at all",
                expected="at least one batch for every peer",
                do="give each peer a part of the data",
            )
        elif self._last is _END:
            self._last = self._loader.filler()  # type: ignore[attr-defined]
        return self._last, is_new  # type: ignore[return-value]

    def _fetch(self) -> Any:
        if self._batches is None:
            self._epochs.begin(self._loader)
            self._batches, self._taken = iter(self._loader), 0
        batch = next(self._batches, _END)
        if batch is _END:
            self._batches, self._ends = None, self._ends + 1
        return batch
