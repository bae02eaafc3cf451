"""The end of a backward pass, also of one with further passes inside it (re-entrant checkpointing)."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpcsgd.errors import BadOption

_ENGINE = torch.autograd.graph._engine_run_backward.__code__


class BackwardPass:
    """Calls a function at the end of each outermost backward pass.

    A pass is seen when it reaches a parameter, or the output of a watched module. Where neither lies in the
    outermost pass itself (the whole model is one re-entrant checkpoint), its end is not seen.

    Parameters
    ----------
    on_end
        Called in the thread of autograd at the end of a pass, and before `backward()` returns.
    on_restart
        Called at the begin of a pass after one that was left by an exception.
    """

    def __init__(self, on_end: Callable[[], None], on_restart: Callable[[], None]) -> None:
        self._on_end, self._on_restart = on_end, on_restart
        self._outer = self._inner = -1

    def enter(self) -> bool:
        """Return whether the pass that runs this hook is inside another one."""
        task = torch._C._current_graph_task_id()
        if task == self._outer:
            return False
        if task == self._inner:
            return True
        if _is_nested():
            self._inner = task
            return True
        if self._outer >= 0:
            self._on_restart()
        self._outer = task
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(self._end)
        return False

    def _end(self) -> None:
        self._outer = -1
        self._on_end()

    def watch(self, module: nn.Module) -> list[Any]:
        """See each pass through the outputs of a module, if it is not a scripted one; return the handles."""
        if isinstance(module, torch.jit.ScriptModule):
            return []  # it has no hooks: a pass is seen when it reaches a parameter
        return [module.register_forward_hook(_OutputHook(self))]


class LastHooks:
    """Hooks of accumulated gradients that run after those of the user, which may change a gradient."""

    def __init__(self, hooks: Sequence[tuple[Tensor, Callable[[Any], None]]]) -> None:
        self._hooks = list(hooks)
        self._handles = [_register(*each) for each in hooks]

    def are_last(self) -> bool:
        """Return whether the user has added no hooks behind these."""
        return not self._behind()

    def move_to_end(self) -> None:
        """Move the hooks behind those that the user has added."""
        for index in self._behind():
            self._handles[index].remove()
            self._handles[index] = _register(*self._hooks[index])

    def _behind(self) -> list[int]:
        present: list[Any] = [parameter._post_accumulate_grad_hooks for parameter, _ in self._hooks]
        rows = enumerate(zip(present, self._handles, strict=True))
        return [index for index, (hooks, own) in rows if hooks and next(reversed(hooks)) != own.id]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _register(parameter: Tensor, hook: Callable[[Any], None]) -> Any:
    return parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


class _OutputHook:
    """Forward hook of a module, whose copies and pickled forms have no effect: their passes are not seen."""

    def __init__(self, passes: BackwardPass) -> None:
        self._passes = passes

    def __call__(self, module: nn.Module, inputs: object, output: object) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if DistributedDataParallel._active_ddp_module is not None:
            raise BadOption(
                "the model is called inside DistributedDataParallel, which averages its gradients by itself",
                do="call the module itself in the loop, without DistributedDataParallel around it",
            )
        for tensor in tensors_in(output):
            if tensor.requires_grad and not tensor.is_leaf:  # a leaf would keep the hooks of all passes
                tensor.register_hook(self._on_gradient)  # type: ignore[no-untyped-call]

    def _on_gradient(self, gradient: Tensor) -> None:
        self._passes.enter()

    def __reduce__(self) -> Any:
        return no_hook, ()


def no_hook() -> Any:
    """Return a hook without effect, in place of a copy of one."""
    return _ignore


def _ignore(module: nn.Module, inputs: object, output: object) -> None:
    """Forward hook without effect."""


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)


def _is_nested() -> bool:
    """Return whether the running backward pass was started by a function of another one."""
    depth, frame = 0, sys._getframe()
    while (outside := frame.f_back) is not None:
        depth += outside.f_code is _ENGINE
        frame = outside
    # Threads of autograd, one a GPU, have no frame of the call of backward.
    in_worker = isinstance(threading.current_thread(), threading._DummyThread)
    return depth >= (1 if in_worker else 2)
