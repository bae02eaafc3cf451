"""AR-SGD: synchronous SGD whose gradients are all-reduced by buckets while backward still runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from hpcsgd.collectives.reducer import make_reducer
from hpcsgd.collectives.sparse_rows import sum_rows
from hpcsgd.collectives.step_status import REMEDIES, StepStatus
from hpcsgd.errors import HpcsgdError
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.tensors.gradients import Gradients
from hpcsgd.tensors.group import Bucket
from hpcsgd.tensors.unused import check_all_used


class AllReduce(Strategy):
    """Synchronous SGD on the mean gradient of all ranks: n ranks with batch b equal one with batch n*b.

    Buckets are all-reduced in the communication thread while backward computes the gradients of the next
    ones; when `backward()` returns, gradients are the mean. A rank that has run out of batches contributes
    with weight 0. With `Run(compress=...)` the sums are compressed. Sparse gradients are summed by row.
    """

    averages_gradients = True
    accepts_weights = True
    #: Whether the gradients of a single rank too are collected in a tensor group.
    _needs_group = False

    def attach(self, context: StrategyContext) -> None:
        context.reject("all-reduce SGD", virtual_nodes=True)
        super().attach(context)
        self._status = StepStatus(context.world)
        self._finite, self._reductions, self._reductions_before = True, 0, 1
        #: Factor of this rank's gradients in a step with weights, and whether steps have weights at all.
        self._share: float | None = None
        self._weighted = False
        #: Whether any rank has a weight above 0 in this step; without, all ranks leave it out.
        self._counts = True
        #: The gradients of this rank in the first step, to which a weight may be given afterwards.
        self._first_gradients: list[Tensor | None] | None = None
        self._is_first_step = True
        #: Gradients of this step that were set aside, with their factors; and whether a rank may have such.
        self._aside: list[tuple[list[Tensor | None], float]] = []
        self._first_aside = self._aside
        self._has_aside, self._first_is_own = False, True
        self._collect_gradients()
        context.on_new_weights = self._set_aside

    def _collect_gradients(self) -> None:
        context = self.context
        self._collects = context.world.size > 1 or self._needs_group
        context.loop.sees_backward = self._collects
        self.gradients = Gradients(
            context.world,
            context.parameters if self._collects else [],
            self.bucket_ready,
            self._end_of_pass,
            context.bucket_mib,
            context.unused,
            rows=context.sparse_rows,
            model=context.model,
        )
        self._reducer = make_reducer(
            self.gradients.group,
            context.algorithm,
            context.compress,
            context.seed,
            context.nonfinite,
        )

    def detach(self) -> None:
        self.context.world.progress.drain()
        self.gradients.release()
        del self.gradients, self._reducer  # the last views of the shared memory, which can then be freed

    def disconnect(self) -> None:
        super().disconnect()
        if hasattr(self, "gradients"):
            self.context.on_new_weights = None
            self.gradients.disconnect()

    def restart(self) -> bool:
        # First, so that a rank whose parameters differ is found before the others wait for it.
        self._compare_numbers()
        AllReduce.detach(self)
        self._collect_gradients()
        # All gradients are reduced again: the mean of equal ones is the same.
        self._reductions = 0
        return True

    def has_equal_models(self) -> bool:
        return True

    def accumulate(self) -> AbstractContextManager[None]:
        return self._accumulating()

    @contextmanager
    def _accumulating(self) -> Iterator[None]:
        self.gradients.accumulating = True
        try:
            yield
        finally:
            self.gradients.accumulating = False

    def bucket_ready(self, bucket: Bucket) -> None:
        share = self.context.batch_weight if self._share is None else self._share
        if share == 0:
            bucket.flat.zero_()
        elif share != 1:
            bucket.flat.mul_(share)
        if self._has_aside:
            bucket.flat.mul_(1.0 / self.context.contributors)
            for taken, factor in self._aside:
                self.gradients.add(bucket, taken, factor)
        self._reducer.start(bucket, self._scale(), self._reduction_number())

    def _scale(self) -> float:
        """Factor of the sum of all ranks."""
        is_scaled = self._share is not None or self._has_aside
        return 1.0 if is_scaled else 1.0 / self.context.contributors

    def _reduction_number(self) -> int | None:
        """Number of this step's reductions, the key of their random numbers; None: the run's step."""
        return None

    def _end_of_pass(self) -> None:
        """Average the gradients, at the end of a backward pass."""
        self.context.loop.batch_used = True
        if self._weighted or self.context.wait == "step":
            return
        if self._is_first_step and not self._reductions:
            self._first_gradients, self._first_aside = self.gradients.copies(), self._aside
            self._first_is_own = bool(self.context.batch_weight)
        self._reduce(late=False)

    def _set_aside(self) -> None:
        """Set the gradients of a step aside, before others whose batches count with other weights."""
        if not self._collects:
            return
        self._has_aside = True
        if self.gradients.pending:
            factor = self.context.batch_weight / self.context.contributors
            self._aside.append((self.gradients.take(), factor))

    def _reduce(self, *, late: bool) -> None:
        self.context.world.calls.passes += 1
        self.gradients.finish(late=late)
        self._finite &= self._reducer.finish()
        self.gradients.deliver()
        if self.gradients.sparse:
            self._reduce_rows()
        self._reductions += 1
        self._aside, self._has_aside = [], False

    def _reduce_rows(self) -> None:
        """Average the sparse gradients."""
        parameters = [p for _, p in self.gradients.sparse]
        share = self.context.batch_weight if self._share is None else self._share
        local = [None if p.grad is None or not share else p.grad * share for p in parameters]
        if self._has_aside:
            share = 1.0 / self.context.contributors
            local = [None if each is None else each * share for each in local]
            for taken, factor in self._aside:
                rows = taken[-len(parameters) :]
                local = [_sum(mine, each, factor) for mine, each in zip(local, rows, strict=True)]
        for p, total in zip(parameters, sum_rows(self.context.world, local, self._scale()), strict=True):
            p.grad = total

    def synchronize(self, weight: float | None = None) -> None:
        if not self._collects or self.gradients.accumulating:
            return
        if weight is not None and self._share is None:
            self._set_share(weight)
        elif self._weighted and self._share is None and not self.context.loop.skipped:
            raise HpcsgdError(
                "a step without a weight, after steps with one",
                rank=self.context.world.global_rank,
                do="call run.step(weight=...), or run.skip(), in each step",
            )
        none_yet = not self._reductions and (weight is not None or self.gradients.are_replaced())
        if self.gradients.pending or none_yet or self._has_aside:
            self._reduce(late=True)

    def _set_share(self, weight: float) -> None:
        """Set the factor of this rank's gradients; collective."""
        context = self.context
        self._weighted, self.gradients.overlap = True, False
        # First, so that a rank without a weight is found before the others wait for its weight.
        self._compare_numbers()
        is_own = bool(context.batch_weight)
        if self._reductions:
            self._restore_gradients()
            is_own = self._first_is_own
        weight *= self._take_own_back(is_own)
        weights = context.world.gather(weight, "the weights of a step")
        total = math.fsum(weights)
        self._counts = total > 0
        self._share = weights[context.world.rank] / total if total else 0.0

    def _take_own_back(self, is_own: bool) -> bool:
        """Take back what was set aside of this rank's own batches; return whether this step has any.

        Parameters
        ----------
        is_own
            Whether the gradients that are in place are of such a batch.
        """
        aside = self._aside or self._first_aside
        if aside and not is_own:
            self.gradients.take()
        own = [taken for taken, factor in aside if factor]
        for taken in own:
            self.gradients.put_back(taken)
        self._aside, self._first_aside, self._has_aside = [], [], False
        return bool(own) or is_own

    def _restore_gradients(self) -> None:
        """Undo the average without weights, which only the first step allows."""
        if self._first_gradients is None or self._reductions > 1:
            raise HpcsgdError(
                "a weight for gradients that have been averaged without one",
                rank=self.context.world.global_rank,
                do="call run.step(weight=...) in every step from the first one, and all backward passes of a "
                "step but the last inside `with run.accumulate():`",
                everywhere=True,
            )
        self.gradients.restore(self._first_gradients)
        self._reductions = 0

    def complete_gradients(self) -> bool:
        context = self.context
        if not self._collects:
            if context.unused == "error":
                check_all_used(context.world, reversed(context.parameters))
            return self._finite and not context.loop.skipped
        if context.loop.skipped and not self._reductions:
            self.gradients.zero()
            self._aside = []
        self.synchronize(0.0 if context.loop.skipped and self._weighted else context.loop.weight)
        # A rank that leaves a step out takes part in as many reductions as the others are likely to need.
        while self._reductions < (self._reductions_before if context.loop.skipped else 1):
            self._reduce(late=True)
        used, by_hand = (
            each & bool(context.weight) for each in (self.gradients.used(), self.gradients.set_by_hand())
        )
        with context.world.calls.completed():
            flags = self._compare_numbers(np.concatenate([used, by_hand, [context.loop.skipped]]))
        used, by_hand = flags[:-1].reshape(2, -1)
        if by_hand.any() and not flags[-1]:
            self._reduce_some(by_hand)
        self.gradients.settle(used | by_hand)
        return self._finite and not flags[-1] and self._counts

    def _reduce_some(self, by_hand: np.ndarray) -> None:
        """Average gradients that the loop has set since the end of backward."""
        for bucket in self.gradients.collect(by_hand):
            self.bucket_ready(bucket)
        self._finite &= self._reducer.finish()
        self.gradients.deliver(by_hand)

    def _compare_numbers(self, flags: np.ndarray | None = None) -> np.ndarray:
        """Check that all ranks are in the same step, and combine the flags of this step's end."""
        context = self.context
        if flags is None:
            flags = np.zeros(2 * len(self.gradients.used()) + 1, np.bool_)
        loop = context.loop
        values = (context.step, loop.batches, self._reductions, loop.structure, self._weighted)
        numbers = dict(zip(REMEDIES, values, strict=True))
        return self._status.exchange(numbers, flags, f"the status of step {context.step}")

    def step(self, update: Callable[[], None]) -> None:
        # A closure computes its gradients within the update.
        if self.context.loop.has_closure or self.complete_gradients():
            update()
        self._end_step()

    def _end_step(self) -> None:
        self._finite = True
        self._reductions_before, self._reductions = max(1, self._reductions), 0
        self._aside, self._first_aside, self._has_aside = [], [], False
        self._share, self._first_gradients, self._is_first_step, self._counts = None, None, False, True

    def state_dict(self) -> dict[str, Any]:
        return {"reduction": self._reducer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reducer.load_state_dict(state["reduction"])


def _sum(mine: Tensor | None, other: Tensor | None, factor: float) -> Tensor | None:
    """Return a gradient plus a multiple of another one, of which either may not exist."""
    if other is None:
        return mine
    return other * factor if mine is None else mine + other * factor
