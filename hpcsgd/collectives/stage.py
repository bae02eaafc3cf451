"""Between the model's memory and the memory that is communicated, where these are apart (GPUs)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

from hpcsgd.tensors import Bucket

Job = Callable[[], None]


def staged(bucket: Bucket, job: Job, direct: Job | None = None) -> Job:
    """The job, preceded by the copy to the host and followed by the copy back where there is one.

    On a GPU the copies run on a stream of the communication thread, after everything that the caller's
    current stream has queued so far; the job is over when the result is in the device's memory, so
    whatever the caller queues after `wait()` sees it.

    Parameters
    ----------
    job
        Works on `bucket.host`.
    direct
        Does the same on `bucket.flat`, for an MPI that takes device memory; default: there is none.
    """
    if bucket.flat is bucket.host:
        return job
    device = bucket.flat.device
    produced = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def run() -> None:
        with _side_stream(device) as stream:
            if produced is not None:
                produced.wait(stream)
            if direct is not None and bucket.world.cuda_aware:
                _finish(stream)
                direct()
            else:
                bucket.host.copy_(bucket.flat, non_blocking=True)
                _finish(stream)
                job()
                bucket.flat.copy_(bucket.host, non_blocking=True)
            _finish(stream)

    return run


@contextlib.contextmanager
def _cuda(device: torch.device) -> Iterator[torch.cuda.Stream]:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(_streams[device]):
        yield _streams[device]


def _side_stream(device: torch.device) -> AbstractContextManager[torch.cuda.Stream | None]:
    return _cuda(device) if device.type == "cuda" else contextlib.nullcontext()


def _finish(stream: torch.cuda.Stream | None) -> None:
    if stream is not None:
        stream.synchronize()


_streams: dict[torch.device, torch.cuda.Stream] = {}
