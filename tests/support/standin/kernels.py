"""Kernels of hpcsgd on the stand-in: their CUDA sources, compiled for the CPU, as work of its streams."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from hpcsgd.kernels import cuda_loader
from tests.support.cuda_on_cpu import Launcher
from tests.support.standin.memory import memory
from tests.support.standin.operators import NAME, queue_kernel


def install() -> None:
    """Let the loader of kernels launch those for tensors of the stand-in there."""
    launch, properties = cuda_loader.launch, cuda_loader.multiprocessors

    def launch_anywhere(file: str, kernel: str, device: torch.device, *rest: Any) -> None:
        (_launch if device.type == NAME else launch)(file, kernel, device, *rest)

    cuda_loader.launch = launch_anywhere
    cuda_loader.is_available = lambda: True
    cuda_loader.multiprocessors = lambda device: 3 if device.type == NAME else properties(device)


_launcher = functools.cache(Launcher)


def _launch(file: str, kernel: str, device: torch.device, *rest: Any) -> None:
    *sizes, arguments = rest
    translated = [_translated(each) for each in arguments]
    queue_kernel(lambda: _launcher()(file, kernel, device, *sizes, translated))


def _translated(argument: Any) -> Any:
    """Return an argument with addresses that work of the device can read."""
    if isinstance(argument, np.uint64):
        return np.uint64(memory.real_address(int(argument)))
    found = argument.copy()
    if found.dtype.names and found["at"].dtype == np.uint64:
        found["at"] = [memory.real_address(int(each)) for each in found["at"]]
    return found
