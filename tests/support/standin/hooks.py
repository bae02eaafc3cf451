"""Errors in hooks of gradients on the stand-in, which torch would end the process for.

In the thread of a device in Python, torch looks up its stream while the error of a hook is set, and this
look-up fails. So a hook hides its error, gives torch another one, and `backward` raises the hidden one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_hidden: list[BaseException] = []


def install() -> None:
    """Let errors in hooks of tensors pass the thread of the device."""
    on_gradient = torch.Tensor.register_hook
    after_accumulation = torch.Tensor.register_post_accumulate_grad_hook
    run: Any = torch.autograd._engine_run_backward

    def backward(*arguments: Any, **options: Any) -> Any:
        try:
            return run(*arguments, **options)
        except RuntimeError:
            if not _hidden:
                raise
            raise _hidden.pop() from None

    torch.Tensor.register_hook = lambda self, hook: on_gradient(self, _hiding(hook))
    torch.Tensor.register_post_accumulate_grad_hook = lambda self, hook: after_accumulation(
        self, _hiding(hook)
    )
    torch.autograd._engine_run_backward = backward


def _hiding(hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def run(tensor: Tensor) -> Any:
        try:
            return hook(tensor)
        except BaseException as error:
            _hidden.append(error)
            return tensor[None]  # torch raises an error of its own for a result of another size

    return run
