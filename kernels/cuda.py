"""The sources of the GPU's kernels, compiled by CuPy when first used and kept in its cache on disk.

They read and write the memory of torch's tensors, on torch's current stream. CuPy is imported here, and
only then.
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

import torch

from hpcsgd.errors import HpcsgdError
from hpcsgd.kernels import spec

#: Not one bit may differ from the host's: no fused multiply-add.
OPTIONS = ("--std=c++17", "--fmad=false")


def processors(device: torch.device) -> int:
    """How many multiprocessors a GPU has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def source(file: str) -> str:
    """The text of `file`.cu as it is compiled: after the constants of `spec` and `numbers.h`."""
    folder = resources.files(__package__)
    return (
        spec.header() + folder.joinpath("numbers.h").read_text() + folder.joinpath(f"{file}.cu").read_text()
    )


def launch(
    file: str, kernel: str, device: torch.device, blocks: int, threads: int, memory: int, arguments: list[Any]
) -> None:
    """Put a kernel with so many blocks of threads, and bytes of shared memory for each, on the stream."""
    cupy = _cupy()
    with cupy.cuda.Device(device.index), _stream(cupy, device):
        _function(file, kernel, device.index, memory)(
            (blocks,), (threads,), tuple(arguments), shared_mem=memory
        )


def _stream(cupy: Any, device: torch.device) -> Any:
    return cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, device.index)


@functools.cache
def _module(file: str, index: int) -> Any:
    return _cupy().RawModule(code=source(file), options=OPTIONS)


@functools.cache
def _function(file: str, kernel: str, index: int, memory: int) -> Any:
    function = _module(file, index).get_function(kernel)
    if memory:
        function.max_dynamic_shared_size_bytes = memory
    return function


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise HpcsgdError(
            "gradients on a GPU cannot be compressed without CuPy",
            got=str(error),
            do="pip install '.[gpu]', or train without --compress",
            everywhere=True,
        ) from error
    return cupy
