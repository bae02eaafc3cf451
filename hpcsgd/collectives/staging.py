"""Staging between device memory and host memory, which is communicated, for models on a GPU.

Ranks of a node whose buckets are windows of device memory need none among each other. What is communicated in
host memory waits for the device twice: after the copy to the host, and after the copy back, before the host
memory is used again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hpcsgd.mpi.tasks import Steps, steps_of, stepwise
from hpcsgd.tensors.group import Bucket, TensorGroup

#: Works on a bucket: `operation(bucket, *arguments)`.
Operation = Callable[..., Steps[None] | None]


def via_host(operation: Operation, bucket: Bucket, *arguments: Any) -> Callable[[], Steps[None] | None]:
    """Return a job that runs `operation(bucket, *arguments)` on `bucket.host`, between the copies.

    On a GPU the copies run on a stream of the communication thread, after all work that is queued on the
    caller's current stream. The job ends when the result is in device memory, so work that the caller queues
    after `wait()` sees it. There are no copies for an operation of `IN_WINDOWS` on a bucket that is
    windowed, nor, if MPI supports device memory (`HPCSGD_CUDA_AWARE=1`), for one with a twin in `CUDA_AWARE`,
    except in half precision, which MPI lacks.
    """
    if not bucket.staged:
        return partial(operation, bucket, *arguments)
    device = bucket.flat.device
    cuda_aware = bucket.world.cuda_aware and bucket.flat.element_size() >= 4
    of_mpi = CUDA_AWARE.get(operation) if cuda_aware else None

    def run() -> Steps[None]:
        if of_mpi is not None:
            wait_for_compute(device)
            of_mpi(bucket, *arguments)
        elif bucket.windowed and operation in IN_WINDOWS:
            yield from steps_of(partial(operation, bucket, *arguments))
        else:
            with _copied(bucket.flat, bucket.host):
                yield from steps_of(partial(operation, bucket, *arguments))

    return after_compute(device, run)


def on_host(bucket: Bucket, part: slice) -> AbstractContextManager[Tensor]:
    """Return a context whose value is a part of the own one of `rows`, on the host; copied back at the end.

    On a CPU, and within a staged operation on rows of the host, it is that part itself.
    """
    if not bucket.windowed:
        return contextlib.nullcontext(bucket.host[part])
    return _copied(bucket.flat[part], bucket.host_part(part))


@contextlib.contextmanager
def _copied(values: Tensor, host: Tensor) -> Iterator[Tensor]:
    """Context in which `host` has the values, which are replaced by it at the end, on the current stream."""
    host.copy_(values, non_blocking=True)
    wait_for_compute(values.device)
    yield host
    values.copy_(host, non_blocking=True)


def after_compute(device: torch.device, job: Callable[[], Any]) -> Callable[[], Any]:
    """Return a job that runs `job` after all work that is queued on the caller's current stream.

    It runs on the stream of the communication thread, and ends when that has done all. On a CPU it is `job`
    itself.
    """
    if device.type == "cpu":
        return job
    computed = record_event(device)

    def run() -> Steps[Any]:
        wait_for(computed, device)
        result = yield from steps_of(job)
        wait_for_compute(device)
        return result

    return lambda: stepwise(partial(side_stream, device), run())


def record_event(device: torch.device) -> torch.Event | None:
    """Record an event after all work that is queued on the caller's current stream; None on a CPU."""
    return None if device.type == "cpu" else current_stream(device).record_event()


def wait_for(event: torch.Event | None, device: torch.device) -> None:
    """Let what is queued on the caller's current stream from now on wait for an event; None: for nothing."""
    if event is not None:
        event.wait(current_stream(device))


def current_stream(device: torch.device) -> torch.Stream:
    """Return the caller's current stream of a device that is no CPU."""
    found: torch.Stream = torch.get_device_module(device).current_stream(device)
    return found


def wait_for_compute(device: torch.device) -> None:
    """Wait until all work that is queued on the caller's current stream is done; returns at once on a CPU."""
    if device.type != "cpu":
        current_stream(device).synchronize()


def copy_to(group: TensorGroup, buffers: Sequence[Tensor]) -> None:
    """Copy the buckets to buffers of the host or the device, and wait for the copies."""
    device = None
    for bucket, target in zip(group, buffers, strict=True):
        if target is not bucket.flat:
            target.copy_(bucket.flat, non_blocking=True)
            device = bucket.flat.device
    if device is not None:
        wait_for_compute(device)


# Streams of torch do not wait for the default stream, on which models are trained, nor it for them
# (c10/cuda/CUDAStream.cpp: cudaStreamNonBlocking); CuPy launches on the stream it is given. So events alone
# order the two.
@contextlib.contextmanager
def _on_stream(device: torch.device) -> Iterator[torch.Stream]:
    module = torch.get_device_module(device)
    if device not in _streams:
        _streams[device] = module.Stream(device)
    with module.stream(_streams[device]):
        yield _streams[device]


def side_stream(device: torch.device) -> AbstractContextManager[torch.Stream | None]:
    """Return a context on the stream of the communication thread; on a CPU it does nothing."""
    return contextlib.nullcontext() if device.type == "cpu" else _on_stream(device)


_streams: dict[torch.device, torch.Stream] = {}

#: Operations that a CUDA-aware MPI executes on device memory, and their implementation for that.
CUDA_AWARE: dict[Operation, Operation] = {}
#: Operations on `Bucket.rows`, wherever these lie.
IN_WINDOWS: set[Operation] = set()
