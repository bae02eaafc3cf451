"""Timing of the compression and averaging kernels beside a memory copy, on the host or on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcsgd.commands.bench import devices, output
from hpcsgd.commands.bench.compress.contenders import COPY
from hpcsgd.commands.bench.compress.results import Measurement
from hpcsgd.commands.bench.output import Column, Results, times
from hpcsgd.commands.bench.timing import Contender, interleave, with_barrier
from hpcsgd.compress.base import kernels_for, levels_of
from hpcsgd.compress.packed_quantizer import BLOCK
from hpcsgd.mpi.world import World

#: Default number of elements; on a GPU a kernel must take longer than its launch, and exceed the cache.
ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
_BITS = 4
_CALLS_ON_GPU = 20


@dataclass
class Kernel:
    """One kernel, which `run` computes on the host, or launches on the GPU; it may be called repeatedly."""

    name: str
    run: Callable[[], None]
    width: float  # bytes that it must read and write per element


def measure(world: World, comm: Any, elements: int, repeats: int) -> list[Measurement]:
    """Time the kernels on `world.device`; rank 0 prints a table. Returns the results.

    Raises
    ------
    HpcsgdError
        On all ranks, if decoding, rotating back or merging does not restore the input.
    """
    compared = _kernels(world, elements)

    def once() -> None:
        for kernel in compared:
            kernel.run()

    world.local.compile_kernels(once)  # on one rank first, not on all at once
    if world.device.type == "cuda":
        seconds = _time_on_gpu(compared, repeats)
    else:
        contenders = [Contender(k.name, lambda: None, with_barrier(comm, k.run)) for k in compared]
        seconds = interleave(comm, contenders, repeats)
    data, moved = f"kernel on {world.device.type}", {k.name: k.width * elements for k in compared}
    results = [Measurement(data, k, "kernel", elements, seconds[k], moved[k]) for k in seconds]
    if world.rank == 0:
        title = f"kernels on {world.device.type}, {elements / 1e6:.1f} M float32, {_BITS} bits, "
        Results(_columns(results), results, title + output.describe_ranks(world), "All ranks at once.").show()
    return results


def _columns(results: Sequence[Measurement]) -> list[Column[Measurement]]:
    def rate(m: Measurement) -> float:
        return 1e-9 * m.moved / m.median

    copy = next(result for result in results if result.method == COPY)
    return [
        Column(lambda m: m.method, heading="kernel"),
        *times(lambda m: m.seconds),
        Column(lambda m: m.median / copy.median, heading="times\nmemory copy", form=".2f"),
        Column(lambda m: m.moved / m.elements, heading="bytes moved\nper element", form=".2f"),
        Column(rate, heading="GB/s", form=".1f"),
        Column(lambda m: rate(m) / rate(copy), heading="share of the\ncopy's bandwidth", form=".0%"),
    ]


class _KernelBuffers:
    """The buffers of the kernels. The packed words are those of one rank, or a sum of `terms` equal ones."""

    def __init__(self, world: World, elements: int) -> None:
        from hpcsgd.kernels.codec.spec import Tiling, lanes_for

        def zeros(numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(numel, dtype=dtype, device=world.device)

        levels = levels_of(_BITS)
        self.terms = world.size
        self.lanes = lanes_for(levels, self.terms)
        self.tiling = Tiling.of(elements, self.lanes.count, BLOCK)
        generator = torch.Generator(device="cpu").manual_seed(0)
        self.x = torch.randn(elements, generator=generator, device="cpu").to(world.device)
        self.residual, self.out = zeros(elements), zeros(elements)
        self.norms = zeros(self.tiling.rows, torch.uint16)
        self.words = zeros(self.tiling.words, torch.int32 if self.lanes.word == 32 else torch.int64)
        masks = torch.zeros((0, 0), dtype=torch.int32, device=world.device)
        levels_of_scales = torch.tensor([float(levels)], device=world.device)
        self.coding = (self.norms, self.tiling, self.lanes, levels_of_scales, masks)
        self.model, self.correction, self.snapshot = self.x.clone(), zeros(elements), zeros(elements)


def _kernels(world: World, elements: int) -> list[Kernel]:
    from hpcsgd.kernels.codec.spec import key
    from hpcsgd.kernels.sums import model_delta

    b = _KernelBuffers(world, elements)
    kernels, random_key, word = kernels_for(b.x), key(0), b.lanes.bits_per_element / 8

    def run_all(steps: Callable[..., Iterator[None]], *arguments: object) -> Callable[[], None]:
        def run() -> None:
            for _ in steps(*arguments):
                pass

        return run

    def copy() -> None:
        if b.x.is_cuda:
            b.out.copy_(b.x)
        else:
            np.copyto(b.out.numpy(), b.x.numpy())

    norms = run_all(kernels.norms, b.x, None, b.tiling, False, b.norms)
    encode = run_all(kernels.encode, b.x, None, *b.coding, random_key, 0, b.words)
    decode = run_all(kernels.decode, b.words, *b.coding, b.terms, 1 / b.terms, b.out)
    rotate = run_all(kernels.rotate, b.x, random_key, 0, b.out)
    unrotate = run_all(kernels.unrotate, b.out, random_key, 0, b.out)

    def snapshot() -> None:
        model_delta.take_snapshot(b.model, b.correction, b.out, b.snapshot)

    def advance() -> None:
        model_delta.accumulate(b.out, b.snapshot, b.correction)

    def merge() -> None:
        model_delta.apply_correction(b.model, b.correction)

    norms(), encode()
    b.words.mul_(b.terms)
    decode()
    _check(world, "decode", b, 2 / levels_of(_BITS))
    rotate(), unrotate()
    _check(world, "unrotate", b, 1e-5)
    # An average of twice the model doubles the model; a second merge must not change it.
    snapshot()
    b.out.mul_(2)
    for again in (advance, merge, merge, snapshot):
        again()
    b.out.mul_(0.5)
    _check(world, "merge", b, 1e-6)
    with_residual = run_all(kernels.encode, b.x, b.residual, *b.coding, random_key, 0, b.words)
    return [
        Kernel(COPY, copy, 8),
        Kernel("norms", norms, 4),
        Kernel("encode", encode, 4 + word),
        Kernel("encode with residual", with_residual, 12 + word),
        Kernel("decode", decode, word + 4),
        Kernel("rotate", rotate, 8),
        Kernel("unrotate", run_all(kernels.unrotate, b.x, random_key, 0, b.out), 8),
        Kernel("snapshot", snapshot, 16),
        Kernel("advance", advance, 16),
        Kernel("merge", merge, 16),
    ]


def _check(world: World, name: str, b: _KernelBuffers, limit: float) -> None:
    error = float((b.out.double() - b.x.double()).norm() / b.x.double().norm())
    output.check(world, f"kernel {name}", error < limit, f"a relative error below {limit:.2g}", error)


def _time_on_gpu(kernels: Sequence[Kernel], repeats: int) -> dict[str, np.ndarray]:
    """Seconds per kernel by the GPU's clock, alternating; several calls at a time hide the launch time."""
    samples = [[devices.seconds_on_gpu(k.run, _CALLS_ON_GPU) for k in kernels] for _ in range(repeats)]
    return dict(zip((kernel.name for kernel in kernels), np.array(samples).T, strict=True))
