"""The use that the user's loop makes of each batch: a step, a backward pass, or none."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hpcsgd.strategies.batch_weights import OpenLoop
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.tensors.backward_pass import no_hook, tensors_in

_SAMPLES = 16  # parameters, evenly spaced, whose gradients show a backward pass
_FEW_SAMPLES = 2  # where the strategy nearly always sees it: of checkpoints inside others it does not
_MOST_AHEAD = 1024  # batches
_MOST_REMEMBERED = 16  # batches, of which the model may get one


class BatchUse:
    """Counts the steps of a loop over batches, and those that it takes before it uses them.

    Parameters
    ----------
    context
        The context of the run.
    counted
        Whether the loop ends after a number of steps.
    on_found
        Called when `ahead` has become certain, in the first forward pass. Default: not.

    Attributes
    ----------
    steps
        Steps of this loop.
    ahead
        Number of batches that the loop has taken before it used the first one: so many it is ahead.
    is_known
        Whether that is certain, as the model got tensors of a batch.
    has_used
        Whether the loop has used a batch.
    collects
        Whether the loop has used a batch before, and not the last one.
    """

    def __init__(
        self,
        context: StrategyContext,
        *,
        counted: bool,
        on_found: Callable[[], None] = lambda: None,
    ) -> None:
        self._context, self.on_found = context, on_found
        self._first_step = context.step
        self.ahead, self.has_used, self.collects, self.is_known = 0, False, False, False
        self._addresses: list[set[int]] = []
        self._hook: Any = None
        self._is_needed = counted or context.world.size > 1
        trained = [p for _, p in context.parameters if p.requires_grad]
        every = -(-len(trained) // (_FEW_SAMPLES if context.loop.sees_backward else _SAMPLES)) or 1
        # Weak: what refers to a parameter shows `NewOptimizers` where to look.
        self._samples = [weakref.ref(p) for p in (trained[::every] if self._is_needed else [])]

    @property
    def steps(self) -> int:
        return self._context.step - self._first_step

    def begin(self, batch: object = None) -> None:
        """Record that a batch is handed out; None: a repeated one."""
        if not self.has_used:
            self._addresses = [*self._addresses[1 - _MOST_REMEMBERED :], _addresses(batch)]
        self._context.loop.batches += 1
        self._context.loop.batch_used = False
        self._marks = self._gradients()

    def is_unused(self) -> bool:
        """Return whether neither a step nor a gradient has followed the last batch."""
        # The gradients, where they accumulate.
        return not self._context.loop.batch_used and self._gradients() == self._marks

    def check(self) -> None:
        """Record whether the loop has used the last batch."""
        is_unused = self.is_unused()
        self.collects = is_unused and self.has_used
        if not is_unused:
            self.has_used = True
        elif self.has_used:
            self.ahead = 0  # it leaves batches out, or takes several at once
        else:
            self.ahead += 1
            self._watch_model()

    def _watch_model(self) -> None:
        """Find out which of the last batches the model gets in its next forward pass."""
        model = self._context.model
        if self._hook is not None or model is None or not self._is_needed:
            return

        with contextlib.suppress(RuntimeError):  # TorchScript has no such hooks
            self._hook = model.register_forward_pre_hook(_InputHook(self), with_kwargs=True)

    def find(self, inputs: object) -> None:
        """Find the batch of which the model gets a tensor, in the first forward pass of training."""
        if not torch.is_grad_enabled():
            return
        self._end_watch()
        got = _addresses(inputs)
        places = [place for place, each in enumerate(reversed(self._addresses)) if got & each]
        if places:
            self.ahead, self.is_known = places[0], True
            self.on_found()

    def _end_watch(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def end(self) -> None:
        """End the loop, which may be inside of another one."""
        self._end_watch()
        self._context.loop.batch_used = True

    def _gradients(self) -> list[tuple[int, int]]:
        found = [None if (p := sample()) is None else p.grad for sample in self._samples]
        return [(id(gradient), 0 if gradient is None else gradient._version) for gradient in found]


class _InputHook:
    """Forward pre-hook of the model, whose copies and pickled forms have no effect."""

    def __init__(self, use: BatchUse) -> None:
        self._use = use

    def __call__(self, module: nn.Module, args: object, kwargs: object) -> None:
        self._use.find((args, kwargs))

    def __reduce__(self) -> Any:
        return no_hook, ()


def _addresses(value: object) -> set[int]:
    return {each.data_ptr() for each in tensors_in(value) if _has_memory(each)}


def _has_memory(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.layout == torch.strided and tensor.numel() > 0


class UsedBatches:
    """Finds which peers have the batch that the loop uses: if it looks ahead, not the one that it takes.

    A loop looks ahead if the ranks have taken equally many batches before they used the first one, and have
    used one for each since.
    """

    def __init__(self, context: StrategyContext, use: BatchUse, loop: OpenLoop) -> None:
        self._context, self._use, self._loop = context, use, loop
        use.on_found = self._set_first
        self._recent: list[list[bool]] = []
        self._ahead, self._has_changed, self._is_last = 0, False, False
        #: Number of batches of which no rank has used any; 0 if one has used one.
        self._unused, self._is_known = 0, False

    def take(self, has_batch: list[bool]) -> list[bool]:
        """Return which peers have the batch that is used next; collective where `has_batch` changes."""
        changes = bool(self._recent) and has_batch != self._recent[-1]
        kept = min(max(self._use.ahead, self._ahead), _MOST_AHEAD)
        self._recent = [*self._recent[max(0, len(self._recent) - kept) :], has_batch]
        if changes:
            self._has_changed = True
            self._agree()
            if self._use.collects:
                self._context.batches.warn_once("collected batches", _COLLECTED, level=1)
        if self._context.peers.per_rank > 1 and self._use.ahead and self._use.has_used:
            self._context.batches.warn_once("batches of virtual nodes", _VIRTUAL, level=1)
        if self._has_changed and self._ahead and self._use.has_used and not self._is_known:
            self._context.batches.warn_once("look-ahead", _text(self._ahead), level=1)
        # A loop that has used none may be an evaluation, with `run.weight`.
        return self._used_now() if self._use.has_used else has_batch

    def _used_now(self) -> list[bool]:
        # The model may get a batch that is older than those remembered here.
        return self._recent[max(0, len(self._recent) - 1 - self._ahead)]

    def _set_first(self) -> None:
        """Give the first batch that is used, which was taken before others, its own weights; collective."""
        if self._has_changed:
            self._agree()
            self._context.batches.set(self._loop, self._used_now())

    def are_enough(self, steps: int) -> bool:
        """Return whether the loop has the batches of `steps` steps; collective.

        In a loop without steps each batch without gradients counts as one, as in evaluation.
        """
        taken = self._use.steps
        if taken == 0 or (taken == steps - 1 and not self._is_last):
            self._is_last = taken == steps - 1
            self._agree()
        if taken == 0:
            return self._unused >= steps
        return taken + (self._is_last and self._ahead > 0 and self._is_known) >= steps

    def end(self) -> None:
        """Record at the end of the loop which peers have the batches that it has not used; collective."""
        if self._has_changed:
            self._agree()
            taken_ahead = self._recent[len(self._recent) - self._ahead :]
            self._context.batches.set_taken_ahead(taken_ahead, are_all=not self._use.has_used)

    def _agree(self) -> None:
        """Set the number of batches that the loop is ahead, 0 if it differs between ranks; collective."""
        use = self._use
        here = use.ahead, use.has_used, use.is_known
        rows = self._context.world.meet("the comparison of batches taken", here)
        numbers, used, known = zip(*rows, strict=True)
        is_ahead = len(set(numbers)) == 1 and numbers[0] <= min(len(self._recent), _MOST_AHEAD)
        self._ahead = numbers[0] if is_ahead else 0
        self._unused, self._is_known = 0 if any(used) else min(numbers), all(known)


_COLLECTED = (
    "a step uses several batches that were taken before it, and ranks that have run out repeat one of them: "
    "all have the weight of the last one. Run a backward pass with each batch when it is taken, or pass "
    "uneven='stop' to Run"
)

_VIRTUAL = (
    "with virtual nodes a batch belongs to the peer in place, and this loop takes batches before it uses the "
    "last one: they train other peers than their own. Use each batch when it is taken"
)


def _text(ahead: int) -> str:
    return (
        f"the loop took {ahead + 1} batches before its first step, and then one a step: each step has the "
        f"weight of the batch that was taken {ahead} earlier. If the loop leaves out a batch instead, call "
        "run.skip() for it"
    )
