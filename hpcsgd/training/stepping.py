"""One training step, as `run.step` and `run.skip` take it, and the comparisons of the ranks in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from hpcsgd.errors import BadOption, HpcsgdError, format_ranks
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.training.buffers import Buffers, has_equal_frozen
from hpcsgd.training.closures import averaged_closure
from hpcsgd.training.drift import DriftCheck
from hpcsgd.training.model_copy import copy_from_rank_0
from hpcsgd.training.optimizers import NewOptimizers, StepWatch, unscale
from hpcsgd.training.trained_parameters import (
    TrainedParameters,
    replaced_text,
    untrained_error,
    warn_of_other_views,
)
from hpcsgd.training.virtual_nodes import VirtualNodes

#: A comparison after some steps includes every tenth frozen parameter: they may be most of the model.
_FROZEN_SHARE = 10


class Stepping:
    """Takes the steps of a run.

    Attributes
    ----------
    scaling
        `found_inf` and `grad_scale` of a GradScaler, during its call of `run.step`.
    """

    def __init__(
        self, strategy: Strategy, context: StrategyContext, trained: TrainedParameters, check_every: int
    ) -> None:
        assert context.optimizer is not None and context.model is not None
        self._strategy, self._context, self._trained = strategy, context, trained
        context.loop.structure, context.unscale = trained.structure, self.unscale
        self._optimizer, self._world = context.optimizer, context.world
        self._drift = DriftCheck(self._world, self._optimizer, check_every)
        self._watch = StepWatch(self._optimizer, self._world.global_rank)
        self._watch.allowed = self._world.size == 1
        if not strategy.averages_gradients and context.peers.size > 1 and self._world.rank == 0:
            warn_of_other_views(context.model, trained.named)
        self._new_optimizers = NewOptimizers(self._optimizer, self._world.global_rank)
        self._world.calls.begin_run()
        self._world.calls.synchronous &= strategy.synchronous
        self._world.calls.background |= strategy.averages_in_background
        self.scaling: tuple[Tensor | None, Tensor | None] = None, None

    def watch(self, buffers: Buffers) -> None:
        """Compare and synchronise the buffers of the run from now on."""
        self._buffers = buffers
        self._drift.begin(buffers.of_training())

    def begin(self) -> None:
        """Begin to look for other optimizers, at the end of the start."""
        self._new_optimizers.begin()

    def unscale(self) -> bool:
        """Divide the gradients by the scale of a GradScaler; False: this step must be skipped."""
        return unscale(self._optimizer, *self.scaling)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Context of backward passes with the current batch that only add to the gradients."""
        self._context.loop.batch_used = True
        self._world.calls.begin_step()
        with self._strategy.accumulate():
            yield
        self._context.batches.end_use()

    def step(self, nodes: VirtualNodes, closure: Callable[[], Any] | None, weight: float | None) -> Any:
        """Take one step; see `Run.step`."""
        self.check_weight(weight)
        evaluations = [averaged_closure(closure, self._strategy, self._context)] if closure else []
        results: list[Any] = []

        def update() -> None:
            if self.unscale():
                with self._world.tracer.span("update", "compute"), self._own_step():
                    results.append(self._optimizer.step(*evaluations))
                self._strategy.check_memory(in_update=True)  # an optimizer may write p.data = new

        loop = self._context.loop
        self._new_optimizers.check()
        loop.weight, loop.has_closure = weight, closure is not None
        if not loop.steps and not loop.has_closure:
            self._warn_without_gradients()
        self._take(update, nodes)
        return results[0] if closure and results else None

    def _own_step(self) -> AbstractContextManager[None]:
        """Context of the optimizer's step, which is this rank's own where its gradients are."""
        is_common = self._world.size == 1 or self._strategy.averages_gradients
        return nullcontext() if is_common or not self._strategy.synchronous else self._drift.of_own_step()

    def skip(self, nodes: VirtualNodes) -> None:
        """Leave one step out; see `Run.skip`."""
        self._context.loop.skipped = True
        self._take(lambda: None, nodes)

    def _take(self, update: Callable[[], None], nodes: VirtualNodes) -> None:
        context, loop, number = self._context, self._context.loop, self._context.step
        self._world.calls.begin_step()
        self._strategy.check_memory()
        self._take_in_new_parameters()
        if loop.equal_peers:
            self._warn_of_equal_data()
        # Of a loader that cannot be started again, in an asynchronous strategy.
        loop.skipped |= context.weight == 0 and not self._strategy.synchronous
        self._watch.allowed = True
        try:
            self._strategy.step((lambda: None) if loop.skipped else update)
        finally:
            loop.weight, loop.has_closure, loop.skipped = None, False, False
            self._watch.allowed = self._world.size == 1
        if self._strategy.synchronous:
            nodes.select_peer((context.current_peer_index + 1) % context.peers.per_rank)
            if context.current_peer_index == 0:
                self.set_steps(context.step + 1)
                self._buffers.after_step()
                if self._drift.is_due(context.step):
                    self.check(every_frozen=_FROZEN_SHARE)
        context.step_taken = loop.batch_used = True
        loop.steps += 1
        context.batches.begin_step()
        self._world.calls.end_step()
        self._world.activity.step = context.step
        self._world.tracer.end_step(number)

    def set_steps(self, steps: int) -> None:
        """Set the number of steps taken."""
        self._context.step = self._world.activity.step = steps

    def check(self, *, equal: bool | None = None, ending: bool = False, every_frozen: int = 1) -> None:
        """Compare the ranks; collective.

        Parameters
        ----------
        equal
            Whether the parameters must be equal. Default: if they must be with this strategy after this step.
        ending
            Whether the run ends: parameters of the model that nobody trains are a warning then, not an error.
        every_frozen
            Compare every n-th frozen parameter, others each time. Default 1: all.
        """
        self._check_replaced(ending)
        if equal is None:
            # At the end a method with models of the ranks' own puts their consensus in place.
            equal = self._strategy.has_equal_models() and (self._strategy.averages_gradients or not ending)
        parameters = self._trained.trained()
        if has_equal_frozen(self._strategy, self._world):
            frozen = [*self._trained.frozen(), *self._trained.replaced()]
            parameters += frozen[self._drift.number(self._context.step) % every_frozen :: every_frozen]
        self._drift.compare(
            self._context.step,
            self._context.loop.batches,
            parameters if equal else None,
            settings=self._strategy.synchronous,
            buffers=self._buffers.of_training(),
        )

    def _check_replaced(self, ending: bool) -> None:
        if self._world.size == 1 or self._strategy.averages_gradients:
            return
        names_here = [name for name, _ in self._trained.replaced()][:5]
        rows = self._world.gather(names_here, "the search for replaced parameters")
        if ending and names_here:
            text = f"rank {self._world.global_rank}: {replaced_text(names_here)}"
            warnings.warn(text, RuntimeWarning, stacklevel=4)
        names = next(filter(None, rows), None)
        if names and not ending:
            raise HpcsgdError(
                replaced_text(names),
                rank=[each for each, row in zip(self._world.all.ranks, rows, strict=True) if row],
                got=", ".join(names),
                do="change parameters in place: load_state_dict without assign=True, p.data.copy_(values)",
                everywhere=True,
            )

    def check_weight(self, weight: float | None) -> None:
        """Check the weight of a step.

        Raises
        ------
        BadOption
            It is below 0 or not finite, or the strategy has no weights.
        """
        if weight is None:
            return
        if not 0 <= weight < float("inf"):
            raise BadOption(
                "the weight of a step is out of range",
                rank=self._world.global_rank,
                expected="at least 0",
                got=weight,
            )
        if not self._strategy.accepts_weights and self._world.size > 1:
            raise BadOption(
                f"{type(self._strategy).__name__} gives all ranks the same weight",
                got=f"weight={weight}",
                do="use AllReduce() or LocalSGD(), or leave weight out",
                everywhere=True,
            )

    def _take_in_new_parameters(self) -> None:
        """Train parameters that were unfrozen or added to the optimizer since the last step as the others."""
        names = self._trained.new()
        if not names or self._world.size == 1:
            return
        self._context.parameters = self._trained.named
        self._context.loop.structure = self._trained.structure
        with self._trained.unfrozen():
            if not self._strategy.restart():
                raise untrained_error(names, self._world.global_rank)
        # Each rank has initialised a new layer by itself.
        copy_from_rank_0(self._world, [each for each in self._trained.named if each[0] in names])

    def _warn_of_equal_data(self) -> None:
        peers, self._context.loop.equal_peers = self._context.loop.equal_peers, []
        if self._world.rank == 0:
            warnings.warn(
                f"{format_ranks(peers)} have the same first batch: they train on the same data. Pass a torch "
                "DataLoader without a sampler of your own to run.batches(), which shards it, or write "
                "DataLoader(dataset, sampler=DistributedSampler(dataset, run.workers, run.worker), ...), or "
                "shard by run.worker of run.workers; run.batches(loader, shard=False) where it is intended",
                RuntimeWarning,
                stacklevel=5,
            )

    def _warn_without_gradients(self) -> None:
        trained = [p for _, p in self._trained.named if p.requires_grad]
        if self._world.size > 1 and trained and all(p.grad is None for p in trained):
            warnings.warn(
                f"rank {self._world.global_rank}: no parameter of the run has a gradient in its first step. "
                "Call loss.backward() before run.step(), and train the parameters of run.model: others, in a "
                "dictionary of your own, are not averaged",
                RuntimeWarning,
                stacklevel=4,
            )

    def close(self) -> None:
        """Remove the hooks of the optimizer."""
        self._watch.close()
