"""The kernels of compression and of averaging alone, beside a memory copy, on the host or on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.compress.contenders import COPY
from hpcsgd.commands.bench.timing import Contender, interleave, together
from hpcsgd.compress.base import levels_of, ops
from hpcsgd.compress.packed_quantizer import BLOCK
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.world import World

ELEMENTS = 2**24
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
    run
        Starts it, or computes it; may be called again and again.
    width
        Bytes that it must read and write for each element.
    """

    name: str
    run: Callable[[], None]
    width: float


def measure(world: World, comm: Any, elements: int, repeats: int) -> list[output.Row]:
    """Time the kernels on `world.device`; rank 0 prints a table. Returns lines of a CSV file.

    Raises
    ------
    HpcsgdError
        On all ranks, where what is decoded, rotated back or merged is not what there was.
    """
    compared = _kernels(world, elements)

    def once() -> None:
        for kernel in compared:
            kernel.run()

    world.compile(once)  # by one rank, and not by all at once
    if world.device.type == "cuda":
        seconds = _time_on_gpu(compared, repeats)
    else:
        contenders = [Contender(k.name, lambda: None, together(comm, k.run)) for k in compared]
        seconds = interleave(comm, contenders, repeats)
    if world.rank == 0:
        _report(world, elements, compared, seconds)
    facts = {"times_fewer_bytes": "", "relative_error": "", **output.facts(world)}
    return [
        {
            "data": f"kernel on {world.device.type}",
            "method": kernel.name,
            "phase": "kernel",
            "elements": elements,
            **output.milliseconds(seconds[kernel.name]),
            "bytes": round(kernel.width * elements),
            "bits_per_element": "",
            **facts,
        }
        for kernel in compared
    ]


class _Memory:
    """What the kernels work on; the words are those of one rank, or of `terms` equal ones."""

    def __init__(self, world: World, elements: int) -> None:
        from hpcsgd.kernels.codec.spec import Layout, lanes

        def zeros(numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(numel, dtype=dtype, device=world.device)

        levels = levels_of(_BITS)
        self.terms = world.size
        self.lanes = lanes(levels, self.terms)
        self.layout = Layout.of(elements, self.lanes.count, BLOCK)
        self.x = torch.randn(elements, generator=torch.Generator().manual_seed(0)).to(world.device)
        self.residual, self.out = zeros(elements), zeros(elements)
        self.norms = zeros(self.layout.rows, torch.uint16)
        self.words = zeros(self.layout.words, torch.int32 if self.lanes.word == 32 else torch.int64)
        masks = torch.zeros((0, 0), dtype=torch.int32, device=world.device)
        levels_of_scales = torch.tensor([float(levels)], device=world.device)
        self.coding = (self.norms, self.layout, self.lanes, levels_of_scales, masks)
        self.model, self.gain, self.shot = self.x.clone(), zeros(elements), zeros(elements)


def _kernels(world: World, elements: int) -> list[Kernel]:
    from hpcsgd.kernels.codec.spec import key
    from hpcsgd.kernels.sums import model_delta

    m = _Memory(world, elements)
    on, drawn, word = ops(m.x), key(0), m.lanes.bits_per_element / 8

    def all_of(pieces: Callable[..., Iterator[None]], *arguments: object) -> Callable[[], None]:
        def run() -> None:
            for _ in pieces(*arguments):
                pass

        return run

    def copy() -> None:
        if m.x.is_cuda:
            m.out.copy_(m.x)
        else:
            np.copyto(m.out.numpy(), m.x.numpy())

    norms = all_of(on.norms, m.x, None, m.layout, False, m.norms)
    encode = all_of(on.encode, m.x, None, *m.coding, drawn, 0, m.words)
    decode = all_of(on.decode, m.words, *m.coding, m.terms, 1 / m.terms, m.out)
    rotate = all_of(on.rotate, m.x, drawn, 0, m.out)
    unrotate = all_of(on.unrotate, m.out, drawn, 0, m.out)

    def snapshot() -> None:
        model_delta.snapshot(m.model, m.gain, m.out, m.shot)

    def advance() -> None:
        model_delta.advance(m.out, m.shot, m.gain)

    def merge() -> None:
        model_delta.merge(m.model, m.gain)

    norms(), encode()
    m.words.mul_(m.terms)
    decode()
    _check(world, "decode", m, 2 / levels_of(_BITS))
    rotate(), unrotate()
    _check(world, "unrotate", m, 1e-5)
    # The model is doubled, as if the average were, and a second merge must leave it so.
    snapshot()
    m.out.mul_(2)
    advance()
    merge()
    merge()
    snapshot()
    m.out.mul_(0.5)
    _check(world, "merge", m, 1e-6)
    with_residual = all_of(on.encode, m.x, m.residual, *m.coding, drawn, 0, m.words)
    return [
        Kernel(COPY, copy, 8),
        Kernel("norms", norms, 4),
        Kernel("encode", encode, 4 + word),
        Kernel("encode with residual", with_residual, 12 + word),
        Kernel("decode", decode, word + 4),
        Kernel("rotate", rotate, 8),
        Kernel("unrotate", all_of(on.unrotate, m.x, drawn, 0, m.out), 8),
        Kernel("snapshot", snapshot, 16),
        Kernel("advance", advance, 16),
        Kernel("merge", merge, 16),
    ]


def _check(world: World, name: str, m: _Memory, limit: float) -> None:
    error = float((m.out.double() - m.x.double()).norm() / m.x.double().norm())
    errors = world.gather(error, "the check of a kernel")
    wrong = [rank for rank, got in enumerate(errors) if not got < limit]
    if wrong:
        raise HpcsgdError(
            f"the result of kernel {name} is wrong",
            rank=wrong,
            expected=f"a relative error below {limit:.2g}",
            got=errors,
            everywhere=True,
        )


def _time_on_gpu(kernels: Sequence[Kernel], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each by the GPU's own clock, in turns; several calls at a time hide their launch."""
    times: dict[str, list[float]] = {kernel.name: [] for kernel in kernels}
    for _ in range(rounds):
        for kernel in kernels:
            kernel.run()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            for _ in range(_CALLS_ON_GPU):
                kernel.run()
            end.record()
            end.synchronize()
            times[kernel.name].append(start.elapsed_time(end) / _CALLS_ON_GPU / 1e3)
    return {name: np.array(seconds) for name, seconds in times.items()}


def _report(world: World, elements: int, kernels: Sequence[Kernel], seconds: dict[str, np.ndarray]) -> None:
    rates = {k.name: 1e-9 * k.width * elements / float(np.median(seconds[k.name])) for k in kernels}
    copy = float(np.median(seconds[COPY]))
    lines = []
    for kernel in kernels:
        taken, rate = float(np.median(seconds[kernel.name])), rates[kernel.name]
        cells = [f"{1e3 * taken:.3f}", f"{taken / copy:.2f}", f"{kernel.width:.2f}"]
        lines.append([kernel.name, *cells, f"{rate:.1f}", f"{rate / rates[COPY]:.0%}"])
    header = ["kernel", "ms", "times\nmemory copy", "bytes an element\nthat it must move"]
    header += ["GB/s", "share of the\ncopy's bandwidth"]
    device = world.device.type
    title = f"kernels on {device}, {elements / 1e6:.1f} M float32, {_BITS} bits, {output.layout(world)}"
    output.show(title, header, lines, f"All ranks at once. {_GOALS[device]}")
