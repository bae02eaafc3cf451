"""The optimizers of a run: one of torch.optim, one of the user's own, or a list of several."""

from __future__ import annotations

import gc
import inspect
import operator
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hpcsgd.errors import BadOption, HpcsgdError

_METHODS = ("step", "zero_grad", "state_dict", "load_state_dict")


class OptimizerList:
    """Several optimizers, each for parameters of its own, that step together, with the methods of one."""

    def __init__(self, optimizers: Sequence[Any]) -> None:
        self.optimizers = list(optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Call `step` of each; a closure, which they would call in turn, is refused."""
        if closure is not None:
            raise BadOption("a closure for several optimizers", do="call run.step() without a closure")
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Call `zero_grad` of each."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def as_optimizer(optimizer: Any) -> Any:
    """Return an optimizer as it is, and a list or tuple of them as one.

    Raises
    ------
    BadOption
        It has no `param_groups`, or lacks a method.
    """
    if isinstance(optimizer, list | tuple):
        for each in optimizer:
            as_optimizer(each)
        return OptimizerList(optimizer)
    missing = [name for name in _METHODS if not callable(getattr(optimizer, name, None))]
    missing += [] if hasattr(optimizer, "param_groups") else ["param_groups"]
    if missing:
        raise BadOption(
            f"the optimizer, a {type(optimizer).__name__}, lacks {', '.join(missing)}",
            expected=f"param_groups and the methods {', '.join(_METHODS)}",
            do="pass an optimizer of torch.optim, one with these methods, or a list of such",
        )
    return optimizer


class StepWatch:
    """Refuses calls of `optimizer.step()` outside of `run.step()`.

    The calls of an optimizer without `register_step_pre_hook` are not seen.

    Attributes
    ----------
    allowed
        Whether `run.step()` is in progress.
    """

    def __init__(self, optimizer: Any, rank: int) -> None:
        self.allowed = False
        this = weakref.ref(self)

        def check(stepped: Any, args: Any, kwargs: Any) -> None:
            watch = this()
            # A copy of the optimizer has a copy of the hook.
            if watch is None or watch.allowed or all(each() is not stepped for each in references):
                return
            raise HpcsgdError(
                "optimizer.step() was called instead of run.step()",
                rank=rank,
                do="call run.step(), with a closure run.step(closure), with a GradScaler scaler.step(run); "
                "not within a hook of backward",
            )

        hooked = [
            each
            for each in map(_inside, single_optimizers(optimizer))
            if hasattr(each, "register_step_pre_hook")
        ]
        references = [weakref.ref(each) for each in hooked]
        self._hooks = [each.register_step_pre_hook(check) for each in hooked]

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()


#: Optimizers of all runs, also of those that are over.
_of_runs: weakref.WeakSet[Any] = weakref.WeakSet()


class NewOptimizers:
    """Warns of an optimizer that a loop makes for the parameters of a run, which goes on with its own.

    It looks for one where more objects refer to a parameter than before. That takes some 20 ms, so the number
    of looks is limited.
    """

    def __init__(self, optimizer: Any, rank: int) -> None:
        self._optimizer, self._rank, self._looks = optimizer, rank, 4
        trained = [p for group in optimizer.param_groups for p in group["params"] if isinstance(p, Tensor)]
        self._watched = [trained[0], trained[-1]] if trained else []
        self._most: list[int] = []
        self._found: dict[int, weakref.ref[Any]] = {}
        every = [form for each in single_optimizers(optimizer) for form in (each, _inside(each))]
        _of_runs.update(each for each in every if isinstance(each, torch.optim.Optimizer))

    def begin(self) -> None:
        """Count what refers to the parameters now: at the end of the start of the run."""
        self._most = self._references()

    def check(self) -> None:
        """Look for one that was not there at the last step; warn of one that has taken no step since."""
        for found in self._found.values():
            if self._looks and (new := found()) is not None and not new.state:
                self._looks = 0
                self._warn(new)
        if self._looks and any(map(operator.gt, references := self._references(), self._most)):
            self._most, self._looks = references, self._looks - 1
            self._look()

    def _references(self) -> list[int]:
        # The state of the run's own optimizer, which its first step makes, is no sign of another one.
        states = [each.state for each in single_optimizers(self._optimizer) if _has_state_by_parameter(each)]
        return [sys.getrefcount(p) - sum(p in state for state in states) for p in self._watched]

    def _look(self) -> None:
        kinds, found = _kinds_of_optimizers(), self._found
        for each in gc.get_objects():
            if type(each) in kinds and hasattr(each, "_optimizer_step_pre_hooks") and self._is_new(each):
                found[id(each)] = weakref.ref(each)
                each.register_step_pre_hook(lambda stepped, *_: found.pop(id(stepped), None) and None)

    def _is_new(self, optimizer: Any) -> bool:
        held = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
        return optimizer not in _of_runs and any(id(p) in held for p in self._watched)

    def _warn(self, new: Any) -> None:
        warnings.warn(
            f"rank {self._rank}: the {type(new).__name__} that the loop has made holds parameters of this "
            f"run, but run.step() steps the {type(self._optimizer).__name__} that the run was made with. "
            "Close the run, and make another one with the new optimizer: run.close(); "
            "run = hpcsgd.Run(model, optimizer)",
            RuntimeWarning,
            stacklevel=5,
        )


def _has_state_by_parameter(optimizer: Any) -> bool:
    """Return whether the state is a dictionary, as torch's; optimizers of the user's own may have any."""
    return isinstance(getattr(optimizer, "state", None), dict)


def _kinds_of_optimizers(of: type = torch.optim.Optimizer) -> set[type]:
    return {of}.union(*map(_kinds_of_optimizers, of.__subclasses__()))


def single_optimizers(optimizer: Any) -> list[Any]:
    """Return the optimizers of a list, or the single one."""
    return optimizer.optimizers if isinstance(optimizer, OptimizerList) else [optimizer]


def _inside(optimizer: Any) -> Any:
    """Return the optimizer inside of a wrapper that has its methods and no hooks, as Accelerate's."""
    while isinstance(optimizer, torch.optim.Optimizer) and not hasattr(
        optimizer, "_optimizer_step_pre_hooks"
    ):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def unscale(optimizer: Any, found_inf: Tensor | None, scale: Tensor | None) -> bool:
    """Divide an optimizer's gradients by the scale of a GradScaler; False: it requires a skip of the step.

    `found_inf` and `scale` are the attributes that a GradScaler has set; None without one.
    """
    if found_inf is not None and bool(found_inf):
        return False
    if scale is not None:
        scaler = _calling_scaler()
        records = [(each, _records(scaler, each)) for each in single_optimizers(optimizer)]
        # The loop may have made gradients finite since.
        if any(bool(record) for _, found in records for record in found):
            return False
        for each, found in records:
            if not found:
                _divide_gradients(each, scale)
    return True


def _divide_gradients(optimizer: Any, scale: Tensor) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.div_(scale)


def _calling_scaler() -> Any:
    """Return the GradScaler whose `step` calls this function, which it does not pass on."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, torch.amp.GradScaler):
            return caller
        frame = frame.f_back
    return None


def _records(scaler: Any, optimizer: Any) -> list[Tensor]:
    """Return what `scaler.unscale_(optimizer)` has recorded in this step; empty: it was not called.

    `unscale_(run)` has another record.
    """
    states = getattr(scaler, "_per_optimizer_states", {})
    found = [states.get(id(each), {}) for each in (optimizer, _inside(optimizer))]
    return [record for state in found for record in state.get("found_inf_per_device", {}).values()]
