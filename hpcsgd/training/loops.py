"""The loops over batches of a run: sharded, numbered, and scheduled as its strategy requires."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from torch import nn

from hpcsgd.errors import HpcsgdError
from hpcsgd.registry import check
from hpcsgd.registry.limits import Natural
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.training.asynchronous_batches import AsynchronousBatches
from hpcsgd.training.batches import loaders_of_peers, synchronous_batches
from hpcsgd.training.epochs import Epochs
from hpcsgd.training.identity_map import IdentityMap
from hpcsgd.training.sharding import ShardedLoader, Sharding
from hpcsgd.training.step_trace import trace_steps
from hpcsgd.training.virtual_nodes import VirtualNodes


class Batches(Iterator[Any]):
    """The batches of a loader: each `iter()` begins a loop over them, as that of a DataLoader does.

    `next()` goes on with a loop that it begins itself, and which the next `iter()` continues.
    """

    def __init__(self, begin: Callable[[], Iterator[Any]]) -> None:
        self._begin = begin
        self._begun: Iterator[Any] | None = None
        self._is_over = False

    def __iter__(self) -> Iterator[Any]:
        begun = self._begun if not self._is_over else None
        self.close()
        return begun or self._begin()

    def __next__(self) -> Any:
        self._begun = self._begun or self._begin()
        try:
            return next(self._begun)
        except StopIteration:
            self._is_over = True
            raise

    def close(self) -> None:
        """End a loop that `next` has begun."""
        self._begun, self._is_over = None, False


class Loops:
    """Makes the loops of `run.batches`.

    Attributes
    ----------
    sharding
        Replaces plain loaders by sharded ones.
    """

    def __init__(
        self,
        context: StrategyContext,
        strategy: Strategy,
        model: nn.Module,
        virtual_nodes: VirtualNodes,
        uneven: str,
    ) -> None:
        self._model = model
        self._context, self._strategy, self._nodes, self._uneven = context, strategy, virtual_nodes, uneven
        self.sharding = Sharding(context, strategy)
        self._epochs = Epochs(active=context.peers.size > 1)
        self._asynchronous = AsynchronousBatches(context, strategy, virtual_nodes, self._epochs)
        self._warned: IdentityMap[bool] = IdentityMap()
        if strategy.synchronous and context.peers.size > 1:
            context.batches.follow()

    def batches(
        self, loader: Iterable[Any] | Sequence[Iterable[Any]], steps: int | None, shard: bool | None
    ) -> Batches:
        """Return the batches of a loader; see `Run.batches`."""
        steps = check("option 'steps' of run.batches", steps, Natural | None)
        loaders, tracer = loaders_of_peers(loader, self._context), self._context.world.tracer

        def begin() -> Iterator[Any]:
            found = self._iterate(loaders, steps, shard)
            return trace_steps(found, self._model, tracer) if tracer.on else found

        return Batches(begin)

    def _iterate(self, loaders: list[Iterable[Any]], steps: int | None, shard: bool | None) -> Iterator[Any]:
        loop, calls, given = self._context.loop, self._context.world.calls, loaders[0]
        check_between_loops(self._context, self._strategy, "run.batches()")
        calls.loop, calls.left, loop.is_open, ended = calls.loop + 1, False, True, False
        loaders = [self.sharding.shard(loader, shard) for loader in loaders]
        unfinished, repeated, first_step = 0, 0, loop.steps  # batches since the last step, or of weight 0
        may_warn = shard is not False and not self._warned.get(given)
        with closing(self._batches(loaders, steps)) as found:
            try:
                for number, batch in enumerate(found):
                    if number == 0:
                        may_warn &= bool(loop.equal_peers)
                        loop.equal_peers = loop.equal_peers if may_warn else []
                    steps = loop.steps
                    repeated += self._context.batch_weight == 0
                    yield batch
                    unfinished = 0 if loop.steps > steps else unfinished + 1
                ended = True
                if repeated and loop.steps == first_step:
                    self._warn_of_repeated(repeated)
                if unfinished and calls.in_step and isinstance(loaders[0], ShardedLoader):
                    self._warn_of_unfinished_step(given, loaders[0], unfinished)
            finally:
                # By `break`, `return` or an exception: the other ranks look at it if they wait for this one.
                calls.left, loop.is_open = not ended, False
                if may_warn and not loop.equal_peers:  # the first step of the loop has warned of them
                    self._warned.set(given, True)
                loop.equal_peers = []

    def _warn_of_repeated(self, count: int) -> None:
        warnings.warn(
            f"rank {self._context.world.global_rank}: a loop over run.batches() without a step has had its "
            f"last batch {count} times more, as other ranks had more. Begin a loop of evaluation under "
            "torch.no_grad(), with which each batch comes once, or multiply its results by run.weight",
            RuntimeWarning,
            stacklevel=3,
        )

    def _warn_of_unfinished_step(self, given: Any, loader: ShardedLoader, batches: int) -> None:
        if self._context.world.rank == 0:
            warnings.warn(
                f"a loop over run.batches() has ended within a step ({batches} of its batches), which the "
                f"next loop continues: len(loader) is {len(given)}, of which this rank has {len(loader)}. "
                "Count math.ceil(len(loader) / run.workers), here and in schedules",
                RuntimeWarning,
                stacklevel=3,
            )

    def _batches(self, loaders: Sequence[Iterable[Any]], steps: int | None) -> Generator[Any, None, None]:
        if not torch.is_grad_enabled():
            yield from self._evaluation(loaders, steps)
            return
        # One peer without a number of steps is plain training.
        if not self._strategy.synchronous and (self._context.peers.size > 1 or steps is not None):
            yield from self._asynchronous.batches(loaders, steps)
            return
        for loader in loaders:
            self._epochs.begin(loader)
        yield from synchronous_batches(loaders, self._context, self._uneven, steps, self._nodes)

    def _evaluation(self, loaders: Sequence[Iterable[Any]], steps: int | None) -> Iterator[Any]:
        """Yield each batch once: without gradients there are no steps to be scheduled."""
        if self._context.world.rank >= self._strategy.workers(self._context.world.size):
            return
        before = self._context.loop.steps
        for index, loader in enumerate(loaders):
            self._nodes.select_peer(index)
            for batch in islice(loader, steps):
                yield batch
                self._check_no_step(before)
        self._nodes.select_peer(0)

    def _check_no_step(self, before: int) -> None:
        if self._context.peers.size > 1 and self._context.loop.steps != before:
            raise HpcsgdError(
                "run.step() in a loop over run.batches() that began under torch.no_grad()",
                rank=self._context.world.global_rank,
                do="begin a loop of training with gradients enabled, with torch.no_grad() inside of it",
            )


def check_between_loops(context: StrategyContext, strategy: Strategy, call: str) -> None:
    """Raise `HpcsgdError` for a collective call in a loop in which ranks take unequal numbers of steps."""
    if context.peers.size > 1 and context.loop.is_open and not strategy.synchronous:
        raise HpcsgdError(
            f"{call} inside a loop of an asynchronous strategy, whose ranks are at different steps",
            rank=context.world.global_rank,
            do="call it between two loops: for batches in run.batches(loader, steps=100): ...",
        )
