"""Loads and launches the CUDA kernels: CuPy compiles a source on first use and caches the binary on disk.

Kernels work on the memory of torch tensors, on torch's current stream. CuPy is imported on the first
launch.
"""

from __future__ import annotations

import functools
import importlib.util
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcsgd.errors import HpcsgdError
from hpcsgd.kernels.codec import spec

#: Without fused multiply-add, because results must equal the host's bit for bit.
OPTIONS = ("--std=c++17", "--fmad=false")
#: For grid-stride kernels: threads of a block, and blocks per multiprocessor.
BLOCK_THREADS, _BLOCKS_PER_MULTIPROCESSOR = 256, 8


@functools.cache
def is_available() -> bool:
    """Return whether there is CuPy, which compiles and launches."""
    return importlib.util.find_spec("cupy") is not None


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def source(file: str) -> str:
    """Return the source of `file`.cu as it is compiled: constants of `spec`, `float_bits.h`, the file."""
    folder = resources.files(__package__)
    return (
        spec.header()
        + folder.joinpath("codec/float_bits.h").read_text()
        + folder.joinpath(f"{file}.cu").read_text()
    )


def dtype_name(tensor: Tensor) -> str:
    """Return the element type as it appears in kernel names, such as "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def kernel_arguments(*arguments: Any) -> list[Any]:
    """Return the arguments with each tensor replaced by its address, and None by a null pointer."""

    def convert(argument: Any) -> Any:
        if argument is None or isinstance(argument, Tensor):
            return np.uint64(0 if argument is None else argument.data_ptr())
        return argument

    return [convert(argument) for argument in arguments]


def grid_size(device: torch.device, threads: int) -> int:
    """Return the number of blocks that `launch_strided` launches for `threads` threads."""
    return min(_BLOCKS_PER_MULTIPROCESSOR * multiprocessors(device), -(-threads // BLOCK_THREADS))


def launch_strided(file: str, kernel: str, tensor: Tensor, threads: int, *arguments: Any) -> None:
    """Launch a grid-stride kernel on the device of `tensor`.

    Parameters
    ----------
    file
        Source file below `hpcsgd/kernels`, without `.cu`.
    kernel
        Name of the kernel in it.
    tensor
        Selects the device.
    threads
        Work items, each of which one thread processes; nothing is launched for 0.
    arguments
        Passed to the kernel, see `kernel_arguments`.
    """
    if threads:
        grid = grid_size(tensor.device, threads)
        launch(file, kernel, tensor.device, grid, BLOCK_THREADS, 0, kernel_arguments(*arguments))


def launch(
    file: str, kernel: str, device: torch.device, blocks: int, threads: int, memory: int, arguments: list[Any]
) -> None:
    """Enqueue a kernel on torch's current stream.

    Parameters
    ----------
    file, kernel
        Source file below `hpcsgd/kernels`, without `.cu`, and name of the kernel in it.
    device
        The GPU.
    blocks, threads
        Blocks of the grid, and threads of a block.
    memory
        Dynamic shared memory of a block in bytes.
    arguments
        Numbers and addresses as NumPy scalars.

    Raises
    ------
    HpcsgdError
        CuPy is not installed.
    """
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
            do="pip install '.[gpu]', or train with another --strategy and without --compress",
            everywhere=True,
        ) from error
    return cupy
