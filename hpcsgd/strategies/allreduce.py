"""AR-SGD: synchronous SGD whose gradients are all-reduced by buckets while backward still runs."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from hpcsgd.collectives.reducer import make_reducer
from hpcsgd.collectives.sparse_rows import sum_rows
from hpcsgd.collectives.step_status import REMEDIES, StepStatus
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.rank_calls import RankCalls
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.tensors.gradients import Gradients
from hpcsgd.tensors.group import Bucket
from hpcsgd.tensors.misuse import check_all_used
from hpcsgd.tensors.set_aside import SetAside

#: The runs of this process that average gradients: a backward pass may compute those of several.
_attached: weakref.WeakSet[AllReduce] = weakref.WeakSet()


class AllReduce(Strategy):
    """Synchronous SGD on the mean gradient of all ranks: n ranks with batch b equal one with batch n*b.

    Buckets are all-reduced in the communication thread while backward computes the gradients of the next
    ones; when `backward()` returns, gradients are the mean. A rank that has run out of batches contributes
    with weight 0. With `Run(compress=...)` the sums are compressed. Sparse gradients are summed by row.
    """

    title = "all-reduce SGD"
    accepts_compression = accepts_weights = True
    averages_gradients = True
    #: Whether the gradients of a single rank too are collected in a tensor group.
    _needs_group = False

    def attach(self, context: StrategyContext) -> None:
        super().attach(context)
        self._status = StepStatus(context.world)
        self._finite, self._reductions = True, 0
        #: Whether a rank has left this step out, which all leave out then.
        self._left_out = False
        #: Factor of this rank's gradients in a step with weights, and whether steps have weights at all.
        self._share: float | None = None
        self._weighted = False
        #: Whether any rank has a weight above 0 in this step; without, all ranks leave it out.
        self._counts = True
        #: This rank's part in the first step, to which a weight may be given afterwards: its gradients, those
        #: set aside, and whether they are from a batch of its own.
        self._first: tuple[list[Tensor | None], SetAside, bool] | None = None
        self._is_first_step = True
        self._collect_gradients()

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
            rows=context.sparse_rows,
            model=context.model,
        )
        self._aside = SetAside(self.gradients)
        context.batches.on_change = self._set_aside
        _attached.add(self)
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
        self._first = self.context.batches.on_change = None
        _attached.discard(self)
        # The last views of the shared memory, which can then be freed.
        del self.gradients, self._reducer, self._aside

    def disconnect(self) -> None:
        super().disconnect()
        _attached.discard(self)
        if hasattr(self, "gradients"):
            self.context.batches.on_change = None
            self.gradients.disconnect()

    def restart(self) -> bool:
        if self.context.loop.skipped:
            self._follow_others()
        # First, so that a rank whose parameters differ is found before the others wait for it.
        with self.context.world.calls.completed():
            self._compare_numbers(np.zeros(2 * len(self.gradients.used()) + 1, np.bool_))
        if self._aside.on_any_rank:
            self.synchronize(self.context.loop.weight)
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
        if self._aside.on_any_rank:
            bucket.flat.mul_(1.0 / self.context.contributors)
            self._aside.add_to(bucket)
        self._reducer.start(bucket, self._scale(), self._reduction_number())

    def _scale(self) -> float:
        """Factor of the sum of all ranks."""
        is_scaled = self._share is not None or self._aside.on_any_rank
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
            self._first = self.gradients.copies(), self._aside, bool(self.context.batch_weight)
        self._reduce(late=False)

    def _set_aside(self) -> None:
        """Set the gradients of a step aside, before others whose batches count with other weights."""
        if not self._collects:
            return
        self._aside.on_any_rank = True
        if self.gradients.pending:
            self._aside.take(self.context.batch_weight / self.context.contributors)

    def _reduce(self, *, late: bool) -> None:
        with self.context.world.calls.in_pass():
            if self.context.unused == "error" and not self.context.loop.skipped:
                check_all_used(self.context.world, self.gradients.unused())
            self.gradients.finish(late=late)
            self._finite &= self._reducer.finish()
            self.gradients.deliver()
            if self.gradients.sparse:
                self._reduce_rows()
        self._reductions += 1
        if self._aside.on_any_rank:
            self._aside = SetAside(self.gradients)

    def _reduce_rows(self) -> None:
        """Average the sparse gradients."""
        parameters = [p for _, p in self.gradients.sparse]
        share = self.context.batch_weight if self._share is None else self._share
        local = [None if p.grad is None or not share else p.grad * share for p in parameters]
        if self._aside.on_any_rank:
            share = 1.0 / self.context.contributors
            local = self._aside.add_to_rows([None if each is None else each * share for each in local])
        for p, total in zip(parameters, sum_rows(self.context.world, local, self._scale()), strict=True):
            p.grad = total

    def synchronize(self, weight: float | None = None) -> None:
        if not self._collects or self.gradients.accumulating or self._left_out:
            return
        if weight is not None and self._share is None:
            self._set_share(weight)
        elif self._weighted and self._share is None:
            raise HpcsgdError(
                "a step without a weight, after steps with one",
                rank=self.context.world.global_rank,
                do="call run.step(weight=...), or run.skip(), in each step",
            )
        none_yet = not self._reductions and (weight is not None or self.gradients.are_replaced())
        if (self.gradients.pending or none_yet or self._aside.on_any_rank) and not self._left_out:
            self._reduce(late=True)

    def _set_share(self, weight: float) -> None:
        """Set the factor of this rank's gradients; collective."""
        context = self.context
        self._begin_weights()
        # First, so that a rank without a weight is found before the others wait for its weight.
        self._agree()
        if self._left_out:
            return
        aside, is_own = self._aside, bool(context.batch_weight)
        if self._reductions:
            aside, is_own = self._restore_first()
        weight *= aside.put_back(is_own=is_own)
        weights = context.world.gather(weight, "the weights of a step")
        total = math.fsum(weights)
        self._counts = total > 0
        self._share = weights[context.world.rank] / total if total else 0.0

    def _begin_weights(self) -> None:
        self._weighted = self.context.world.calls.weighted = True
        self.gradients.overlap = False

    def _restore_first(self) -> tuple[SetAside, bool]:
        """Undo the average without weights, which only the first step allows."""
        if self._first is None or self._reductions > 1:
            raise HpcsgdError(
                "a weight for gradients that have been averaged without one",
                rank=self.context.world.global_rank,
                do="call run.step(weight=...) in every step from the first one, and all backward passes of a "
                "step but the last inside `with run.accumulate():`",
                everywhere=True,
            )
        gradients, aside, is_own = self._first
        self.gradients.restore(gradients)
        self._reductions = 0
        return aside, is_own

    def complete_gradients(self) -> bool:
        context = self.context
        if not self._collects:
            if context.unused == "error" and not context.loop.skipped:
                check_all_used(context.world, reversed(context.parameters))
            return self._finite and not context.loop.skipped
        if context.loop.skipped:
            self._follow_others()
        else:
            self.synchronize(context.loop.weight)
            if not self._reductions and not self._left_out:
                self._reduce(late=True)
        used, by_hand = (
            each & bool(context.weight) for each in (self.gradients.used(), self.gradients.set_by_hand())
        )
        if not self._left_out:
            used, by_hand = self._agree(np.concatenate([used, by_hand])).reshape(2, -1)
            if by_hand.any() and not self._left_out:
                self._reduce_some(by_hand)
        self.gradients.settle(used | by_hand)
        return self._finite and not self._left_out and self._counts

    def _follow_others(self) -> None:
        """Take part in the reductions of the others, in a step that this rank leaves out."""
        self.context.world.calls.skipping = True
        if not self._reductions:
            self.gradients.zero()
            self._aside.clear()
        if self.gradients.is_reporting:
            self._reduce(late=True)
        # Of this world only one run is open; an earlier one may not have been collected yet.
        others = [each for each in _attached if each.context.world.calls is not self.context.world.calls]
        while place := self._status.of_others(lambda place: any(each._is_behind(place) for each in others)):
            for other in others:
                if other._is_behind(place):
                    other._reduce(late=True)
            if place.completing:
                if place.weighted:
                    self._begin_weights()
                return
            if place.passes > self.context.world.calls.passes:
                self._reduce(late=True)

    def _is_behind(self, place: RankCalls) -> bool:
        """Whether the rank at this place averages a backward pass of this run without this rank."""
        calls = self.context.world.calls
        return place.averaging.get(calls.world, 0) > calls.passes

    def _reduce_some(self, by_hand: np.ndarray) -> None:
        """Average gradients that the loop has set since the end of backward."""
        for bucket in self.gradients.collect(by_hand):
            self.bucket_ready(bucket)
        self._finite &= self._reducer.finish()
        self.gradients.deliver(by_hand)

    def _agree(self, flags: np.ndarray | None = None) -> np.ndarray:
        """Check that all ranks are in the same step, which is left out if one does so, and combine flags."""
        if flags is None:
            flags = np.zeros(2 * len(self.gradients.used()), np.bool_)
        with self.context.world.calls.completed():
            combined = self._compare_numbers(np.append(flags, self.context.loop.skipped))
        self._left_out = bool(combined[-1])
        return combined[:-1]

    def _compare_numbers(self, flags: np.ndarray) -> np.ndarray:
        context, loop = self.context, self.context.loop
        values = (context.step, loop.batches, self._reductions, loop.structure, self._weighted)
        numbers = dict(zip(REMEDIES, values, strict=True))
        return self._status.exchange(numbers, flags, f"the status of step {context.step}")

    def step(self, update: Callable[[], None]) -> None:
        # A closure computes its gradients within the update, which begins if all ranks take the step.
        if self._may_begin() if self.context.loop.has_closure else self.complete_gradients():
            update()
        self._end_step()

    def _may_begin(self) -> bool:
        if self._collects:
            self._agree()
        return not self._left_out

    def _end_step(self) -> None:
        self._is_first_step &= self._left_out  # weights may begin after steps that were left out
        self._finite, self._left_out, self._reductions = True, False, 0
        if self._aside.on_any_rank:
            self._aside.clear()
            self._aside = SetAside(self.gradients)
        self._share, self._first, self._counts = None, None, True

    def state_dict(self) -> dict[str, Any]:
        return {"reduction": self._reducer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reducer.load_state_dict(state["reduction"])
