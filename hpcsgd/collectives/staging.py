"""Between the model's memory and the memory that is communicated, where these are apart (GPUs)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hpcsgd.tensors.group import Bucket, TensorGroup

Job = Callable[..., None]


def staged(job: Job, bucket: Bucket, what: str, *arguments: Any) -> Callable[[], None]:
    """`job(bucket, what, *arguments)`, which works on `bucket.host`, between the copies that needs.

    On a GPU the copies run on a stream of the communication thread, after everything that the caller's
    current stream has queued so far; the job is over when the result is in the device's memory, so
    whatever the caller queues after `wait()` sees it. Jobs with a twin in `DIRECT` work on the device's
    memory instead where MPI takes that; it has no half precision.
    """
    if bucket.flat is bucket.host:
        return partial(job, bucket, what, *arguments)
    device = bucket.flat.device
    produced = computed(device)
    direct = DIRECT.get(job) if bucket.world.cuda_aware and bucket.flat.element_size() >= 4 else None

    def run() -> None:
        with side_stream(device) as stream:
            if produced is not None:
                produced.wait(stream)
            if direct is not None:
                _finish(stream)
                direct(bucket, what, *arguments)
            else:
                bucket.host.copy_(bucket.flat, non_blocking=True)
                _finish(stream)
                job(bucket, what, *arguments)
                bucket.flat.copy_(bucket.host, non_blocking=True)
            _finish(stream)

    return run


def after_compute(device: torch.device, job: Callable[[], None]) -> Callable[[], None]:
    """A job that copies between a GPU and the host: it sees all that the caller's stream has queued so far,
    and is over when its copies are. On a CPU the job itself.
    """
    if device.type != "cuda":
        return job
    produced = computed(device)

    def run() -> None:
        with beside_compute(device, produced):
            job()

    return run


def computed(device: torch.device) -> torch.cuda.Event | None:
    """A mark after all that the caller's stream has queued so far; None on a CPU, where it is computed."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


@contextlib.contextmanager
def beside_compute(device: torch.device, after: torch.cuda.Event | None) -> Iterator[None]:
    """Inside, a GPU works for the communication thread, from a mark on; at the end it has done so."""
    with side_stream(device) as stream:
        if after is not None:
            after.wait(stream)
        yield
        _finish(stream)


def wait_for_compute(device: torch.device) -> None:
    """Wait until all that the caller's stream has queued so far is computed; at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def to_host(group: TensorGroup, space: Sequence[Tensor]) -> None:
    """Copy each bucket as the model has it to host memory."""
    for bucket, target in zip(group, space, strict=True):
        if target is not bucket.flat:
            target.copy_(bucket.flat)


def from_host(group: TensorGroup, write: Callable[[int, Tensor], None]) -> None:
    """Let `write(index, out)` fill each bucket in host memory, and give the model what it wrote."""
    for bucket in group:
        write(bucket.index, bucket.host)
        if bucket.flat is not bucket.host:
            bucket.flat.copy_(bucket.host)


@contextlib.contextmanager
def _cuda(device: torch.device) -> Iterator[torch.cuda.Stream]:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(_streams[device]):
        yield _streams[device]


def side_stream(device: torch.device) -> AbstractContextManager[torch.cuda.Stream | None]:
    return _cuda(device) if device.type == "cuda" else contextlib.nullcontext()


def _finish(stream: torch.cuda.Stream | None) -> None:
    if stream is not None:
        stream.synchronize()


_streams: dict[torch.device, torch.cuda.Stream] = {}

#: Jobs that a CUDA-aware MPI can do on the device's memory, and how.
DIRECT: dict[Job, Job] = {}
