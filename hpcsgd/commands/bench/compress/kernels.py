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
from hpcsgd.commands.bench.timing import Contender, interleave, with_barrier
from hpcsgd.compress.base import kernels_for, levels_of
from hpcsgd.compress.packed_quantizer import BLOCK
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.world import World

#: Default number of elements; on a GPU a kernel must take longer than its launch, and exceed the cache.
ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
_BITS = 4
_CALLS_ON_GPU = 20
_GOALS = {
    "cpu": "Goals at 16 M elements on one core: encode 2, decode 1.5 times a memory copy.",
    "cuda": "Goal: encode and decode at 85 % of the copy's bandwidth.",
}


@dataclass
class Kernel:
    """One kernel on all elements.

    Attributes
    ----------
    name
        Name in tables and CSV files.
    run
        Runs the kernel on the host, or launches it on the GPU; may be called repeatedly.
    width
        Bytes that the kernel must read and write per element.
    """

    name: str
    run: Callable[[], None]
    width: float


def measure(world: World, comm: Any, elements: int, repeats: int) -> list[output.Row]:
    """Time the kernels on `world.device`; rank 0 prints a table. Returns the rows of the CSV file.

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
    if world.rank == 0:
        _report(world, elements, compared, seconds)
    environment = {"times_fewer_bytes": "", "relative_error": "", **output.environment(world)}
    return [
        {
            "data": f"kernel on {world.device.type}",
            "method": kernel.name,
            "phase": "kernel",
            "elements": elements,
            **output.milliseconds(seconds[kernel.name]),
            "bytes": round(kernel.width * elements),
            "bits_per_element": "",
            **environment,
        }
        for kernel in compared
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
        self.x = torch.randn(
            elements, generator=torch.Generator(device="cpu").manual_seed(0), device="cpu"
        ).to(world.device)
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
    advance()
    merge()
    merge()
    snapshot()
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
    errors = world.gather(error, "the check of a kernel")
    wrong = [rank for rank, got in enumerate(errors) if not got < limit]
    if wrong:
        raise HpcsgdError(
            f"the result of kernel {name} is wrong",
            rank=wrong,
            expected=f"a relative error below {limit:.2g}",
            got=errors,
            do="report this as a bug of hpcsgd, with the output of `hpcsgd doctor`",
            everywhere=True,
        )


def _time_on_gpu(kernels: Sequence[Kernel], repeats: int) -> dict[str, np.ndarray]:
    """Seconds per kernel by the GPU's clock, alternating; several calls at a time hide the launch time."""
    times: dict[str, list[float]] = {kernel.name: [] for kernel in kernels}
    for _ in range(repeats):
        for kernel in kernels:
            times[kernel.name].append(devices.seconds_on_gpu(kernel.run, _CALLS_ON_GPU))
    return {name: np.array(seconds) for name, seconds in times.items()}


def _report(world: World, elements: int, kernels: Sequence[Kernel], seconds: dict[str, np.ndarray]) -> None:
    rates = {k.name: 1e-9 * k.width * elements / float(np.median(seconds[k.name])) for k in kernels}
    copy = float(np.median(seconds[COPY]))
    lines = []
    for kernel in kernels:
        median, rate = float(np.median(seconds[kernel.name])), rates[kernel.name]
        cells = [f"{1e3 * median:.3f}", f"{median / copy:.2f}", f"{kernel.width:.2f}"]
        lines.append([kernel.name, *cells, f"{rate:.1f}", f"{rate / rates[COPY]:.0%}"])
    header = ["kernel", "ms", "times\nmemory copy", "bytes moved\nper element"]
    header += ["GB/s", "share of the\ncopy's bandwidth"]
    device = world.device.type
    title = (
        f"kernels on {device}, {elements / 1e6:.1f} M float32, {_BITS} bits, {output.describe_ranks(world)}"
    )
    output.print_table(title, header, lines, f"All ranks at once. {_GOALS[device]}")
