"""What the compute thread does in a step, for the trace: batch, forward, backward."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hpcsgd.diagnostics.trace import Off


def traced(batches: Iterator[Any], model: nn.Module, trace: Off) -> Iterator[Any]:
    """The batches; what happens between two of them is traced as a step."""
    with closing(batches), _passes(model, trace):  # type: ignore[type-var]
        try:
            while True:
                trace.begin_step()
                started = time.perf_counter()
                batch = next(batches)
                trace.record("batch", "compute", started, time.perf_counter())
                yield batch
        except StopIteration:
            return
        finally:
            trace.abandon_step()


@contextmanager
def _passes(model: nn.Module, trace: Off) -> Iterator[None]:
    """Inside, passes of the model are traced; on a GPU the time that it takes to queue them."""
    began = [0.0]

    def before(*_: object) -> None:
        began[0] = time.perf_counter()

    def after(_: nn.Module, inputs: object, output: object) -> None:
        trace.record("forward", "compute", began[0], time.perf_counter())
        tensor = _first_with_gradient(output)
        if tensor is not None:
            tensor.register_hook(backward)  # type: ignore[no-untyped-call]

    def backward(_: Tensor) -> None:
        started = time.perf_counter()
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: trace.record("backward", "compute", started, time.perf_counter()))

    hooks = (model.register_forward_pre_hook(before), model.register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _first_with_gradient(output: object) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.requires_grad else None
    inside = list(output.values()) if isinstance(output, Mapping) else output
    if not isinstance(inside, list | tuple):
        return None
    return next((found for each in inside if (found := _first_with_gradient(each)) is not None), None)
