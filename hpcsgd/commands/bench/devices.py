"""The device of a benchmark: its check, waiting for its work, its copy bandwidth, and its windows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from hpcsgd.errors import BadOption

_WINDOWS = "HPCSGD_DEVICE_WINDOWS"
_COPIES = 10


def check_device(device: str) -> None:
    """Raise `BadOption` for a device that torch cannot use."""
    if device == "cuda" and not torch.cuda.is_available():
        raise BadOption(
            "the device (--device) cannot be used",
            expected="a GPU that torch can use",
            got="cuda, but torch finds no GPU",
            do="leave out --device cuda, or run `hpcsgd doctor` to find the reason",
        )


def select_device(device: torch.device) -> None:
    """Make a GPU the current one, on whose stream events are recorded; collectives of torch use it too."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def synchronize(device: torch.device) -> None:
    """Wait for all work that is queued on the device; returns at once on a CPU."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def synchronized(device: torch.device, run: Callable[[], None]) -> Callable[[], None]:
    """`run` followed by a wait for all work on the device: a host clock then measures that work."""
    if device.type == "cpu":
        return run

    def run_and_synchronize() -> None:
        run()
        synchronize(device)

    return run_and_synchronize


def seconds_on_gpu(run: Callable[[], object], calls: int) -> float:
    """Seconds of a call by the GPU's clock; several calls at a time hide the time to launch them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    run()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / calls / 1e3


def time_copy(source: Tensor, target: Tensor, repeats: int) -> np.ndarray:
    """Return the seconds of a copy from device memory to device memory, (repeats,), by the GPU's clock."""
    samples = [seconds_on_gpu(lambda: target.copy_(source), _COPIES) for _ in range(repeats)]
    return np.array(samples)


@contextlib.contextmanager
def without_windows() -> Iterator[None]:
    """Context in which a World and its groups are created without windows of device memory.

    Collectives on them are staged through pinned host memory.
    """
    before = os.environ.get(_WINDOWS)
    os.environ[_WINDOWS] = "0"
    try:
        yield
    finally:
        os.environ.pop(_WINDOWS)
        if before is not None:
            os.environ[_WINDOWS] = before
