"""The sources of the GPU's kernels, compiled by CuPy when first used and kept in its cache on disk.

They read and write the memory of torch's tensors, on torch's current stream. CuPy is imported here, and
only then.
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcsgd.errors import HpcsgdError
from hpcsgd.kernels.codec import spec

#: Not one bit may differ from the host's: no fused multiply-add.
OPTIONS = ("--std=c++17", "--fmad=false")
#: Threads of a block whose threads walk the work in strides, and how many such blocks a processor has.
THREADS, _BLOCKS_OF_PROCESSOR = 256, 8


def processors(device: torch.device) -> int:
    """How many multiprocessors a GPU has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def source(file: str) -> str:
    """The text of `file`.cu as it is compiled: after the constants of `spec` and `float_bits.h`."""
    folder = resources.files(__package__)
    return (
        spec.header()
        + folder.joinpath("codec/float_bits.h").read_text()
        + folder.joinpath(f"{file}.cu").read_text()
    )


def name(tensor: Tensor) -> str:
    """How kernels' names say the type of a tensor's elements."""
    return str(tensor.dtype).removeprefix("torch.")


def values(*arguments: Any) -> list[Any]:
    """A kernel's arguments with addresses in place of tensors."""

    def value(argument: Any) -> Any:
        if argument is None or isinstance(argument, Tensor):
            return np.uint64(0 if argument is None else argument.data_ptr())
        return argument

    return [value(argument) for argument in arguments]


def blocks(device: torch.device, threads: int) -> int:
    """How many blocks `spread` launches."""
    return min(_BLOCKS_OF_PROCESSOR * processors(device), -(-threads // THREADS))


def spread(file: str, kernel: str, tensor: Tensor, threads: int, *arguments: Any) -> None:
    """Launch a kernel where `tensor` is, whose threads walk the work in strides: `threads` shares of it."""
    if threads:
        grid = blocks(tensor.device, threads)
        launch(file, kernel, tensor.device, grid, THREADS, 0, values(*arguments))


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
            "compression and LASGD on a GPU need CuPy",
            got=str(error),
            do="pip install '.[gpu]', or train by another strategy and without --compress",
            everywhere=True,
        ) from error
    return cupy
