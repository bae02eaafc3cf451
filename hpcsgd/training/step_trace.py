"""Trace spans of the compute thread: batch, forward and backward of each step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hpcsgd.diagnostics.trace import NullTracer
from hpcsgd.tensors.backward_pass import tensors_in


def trace_steps(batches: Iterator[Any], model: nn.Module, trace: NullTracer) -> Iterator[Any]:
    """Yield the batches, and record the time from one to the next as a step of the trace."""
    with closing(batches), _traced_passes(model, trace):  # type: ignore[type-var]
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
def _traced_passes(model: nn.Module, trace: NullTracer) -> Iterator[None]:
    """Record forward and backward passes of the model; on a GPU the time that it takes to queue them."""
    began = [0.0]

    def before(*_: object) -> None:
        began[0] = time.perf_counter()

    def after(_: nn.Module, inputs: object, output: object) -> None:
        trace.record("forward", "compute", began[0], time.perf_counter())
        tensor = next((each for each in tensors_in(output) if each.requires_grad and not each.is_leaf), None)
        if tensor is not None:
            tensor.register_hook(backward)  # type: ignore[no-untyped-call]

    def backward(_: Tensor) -> None:
        started = time.perf_counter()
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: trace.record("backward", "compute", started, time.perf_counter()))

    hooks = []
    if not isinstance(model, torch.jit.ScriptModule):  # which has no hooks
        hooks = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
