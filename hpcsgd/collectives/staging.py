"""Staging between device memory and host memory, which is communicated, for models on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hpcsgd.tensors.group import Bucket, TensorGroup

#: Works on a bucket: `operation(bucket, name, *arguments)`.
Operation = Callable[..., None]


def via_host(operation: Operation, bucket: Bucket, name: str, *arguments: Any) -> Callable[[], None]:
    """Return a job that runs `operation(bucket, name, *arguments)` on `bucket.host`, between the copies.

    On a GPU the copies run on a stream of the communication thread, after all work that is queued on the
    caller's current stream. The job ends when the result is in device memory, so work that the caller queues
    after `wait()` sees it. Operations with an entry in `CUDA_AWARE` work on device memory instead if MPI
    supports that; not in half precision, which MPI lacks.
    """
    if bucket.flat is bucket.host:
        return partial(operation, bucket, name, *arguments)
    device = bucket.flat.device
    computed = record_event(device)
    cuda_aware = bucket.world.cuda_aware and bucket.flat.element_size() >= 4
    on_device = CUDA_AWARE.get(operation) if cuda_aware else None

    def run() -> None:
        with side_stream(device) as stream:
            if computed is not None:
                computed.wait(stream)
            if on_device is not None:
                _synchronize(stream)
                on_device(bucket, name, *arguments)
            else:
                bucket.host.copy_(bucket.flat, non_blocking=True)
                _synchronize(stream)
                operation(bucket, name, *arguments)
                bucket.flat.copy_(bucket.host, non_blocking=True)
            _synchronize(stream)

    return run


def after_compute(device: torch.device, job: Callable[[], None]) -> Callable[[], None]:
    """Return a job that runs `job` after all work that is queued on the caller's current stream.

    The job ends when its copies between device and host are complete. On a CPU it is `job` itself.
    """
    if device.type == "cpu":
        return job
    computed = record_event(device)

    def run() -> None:
        with on_side_stream(device, computed):
            job()

    return run


def record_event(device: torch.device) -> torch.Event | None:
    """Record an event after all work that is queued on the caller's current stream; None on a CPU."""
    return None if device.type == "cpu" else current_stream(device).record_event()


def current_stream(device: torch.device) -> torch.Stream:
    """Return the caller's current stream of a device that is no CPU."""
    found: torch.Stream = torch.get_device_module(device).current_stream(device)
    return found


@contextlib.contextmanager
def on_side_stream(device: torch.device, after: torch.Event | None) -> Iterator[None]:
    """Run the context on the stream of the communication thread, after an event; synchronises at the end."""
    with side_stream(device) as stream:
        if after is not None:
            after.wait(stream)
        yield
        _synchronize(stream)


def wait_for_compute(device: torch.device) -> None:
    """Wait until all work that is queued on the caller's current stream is done; returns at once on a CPU."""
    if device.type != "cpu":
        current_stream(device).synchronize()


def to_host(group: TensorGroup, buffers: Sequence[Tensor]) -> None:
    """Copy the buckets to host buffers."""
    for bucket, target in zip(group, buffers, strict=True):
        if target is not bucket.flat:
            target.copy_(bucket.flat)


def from_host(group: TensorGroup, write: Callable[[int, Tensor], None]) -> None:
    """Fill each bucket by `write(index, out)` in host memory, and copy the result to the device."""
    for bucket in group:
        write(bucket.index, bucket.host)
        if bucket.flat is not bucket.host:
            bucket.flat.copy_(bucket.host)


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


def _synchronize(stream: torch.Stream | None) -> None:
    if stream is not None:
        stream.synchronize()


_streams: dict[torch.device, torch.Stream] = {}

#: Operations that a CUDA-aware MPI executes on device memory, and their implementation for that.
CUDA_AWARE: dict[Operation, Operation] = {}
