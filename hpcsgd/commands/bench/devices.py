"""The device of a benchmark: its check, waiting for its work, its copy bandwidth, and its windows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hpcsgd.commands.bench import output
from hpcsgd.errors import BadOption
from hpcsgd.mpi.world import World

_COPIES = 10


@contextlib.contextmanager
def open_world(device: str = "cpu", path: Path | None = None) -> Iterator[World]:
    """Context with the ranks of this job on a device that torch can use, whose rank 0 can write `path`."""
    if device == "cuda" and not torch.cuda.is_available():
        raise BadOption(
            "the device (--device) cannot be used",
            expected="a GPU that torch can use",
            got="cuda, but torch finds no GPU",
            do="leave out --device cuda, or run `hpcsgd doctor` to find the reason",
        )
    with World(device=device) as world:
        output.check_writable(world, path)
        if world.device.type == "cuda":
            # On the current device's stream events are recorded; collectives of torch use it too.
            torch.cuda.set_device(world.device)
        yield world


def set_threads(world: World) -> None:
    """Compute with this rank's share of the node's cores, unless the environment sets the threads."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(world.local.threads)


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


def without_windows() -> AbstractContextManager[None]:
    """Context in which a World and its groups are created without windows of device memory.

    Collectives on them are staged through pinned host memory.
    """
    return set_variable("HPCSGD_DEVICE_WINDOWS", "0")


@contextlib.contextmanager
def set_variable(name: str, value: str) -> Iterator[None]:
    """Context in which an environment variable has a value."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
