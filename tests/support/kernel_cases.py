"""What the kernels are tested with: awkward numbers, lengths and layouts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcsgd.kernels.codec import host, spec

LENGTHS = (1, 2, 3, 31, 32, 33, 100, 511, 512, 513, 1037, 4099)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SPECIAL = (0.0, -0.0, 1e-45, -1e-39, 1.1754944e-38, 1e-30, 1e38, -1e38, 3.4028235e38, -3.4028235e38, 1.0)


def finish(work: Iterator[None]) -> None:
    for _ in work:
        pass


def numbers(numel: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of all magnitudes, special ones among them; stretches of plain ones and of zeros."""
    rng = np.random.default_rng([seed, numel])
    values = rng.standard_normal(numel) * 10.0 ** rng.integers(-44, 39, numel)
    plain = rng.integers(0, numel + 1, 2)
    values[slice(*sorted(plain))] = rng.standard_normal(abs(plain[0] - plain[1]))
    special = rng.integers(0, numel, numel // 9)
    values[special] = rng.choice(_SPECIAL, len(special))
    start = int(rng.integers(0, numel))
    values[start : start + numel // 5] = 0
    largest = float(torch.finfo(torch.float32 if dtype == torch.float64 else dtype).max)
    return torch.from_numpy(np.clip(values, -largest, largest)).to(dtype)


@dataclass
class Coded:
    """The arguments of a call of encode and decode, and what they give."""

    x: Tensor
    residual: Tensor | None
    layout: spec.Layout
    lanes: spec.Lanes
    levels: Tensor
    terms: int
    euclidean: bool
    key: tuple[int, int]
    offset: int
    norms: Tensor
    masks: Tensor
    words: Tensor
    out: Tensor


def remainders(numel: int, seed: int = 0) -> Tensor:
    """What error feedback may hold: with `numbers` added it still is finite."""
    return torch.clamp(numbers(numel, seed + 1), -1e30, 1e30)


def coded(
    x: Tensor, residual: Tensor | None, bits: tuple[int, ...], terms: int, row: int, euclidean: bool = False,
    seed: int = 1, out_dtype: torch.dtype = torch.float32,
) -> Coded:  # fmt: skip
    """Everything ready for `code`."""
    levels = torch.tensor([2.0 ** (b - 1) - 1 for b in bits])
    lanes = spec.lanes(int(levels[0]), terms)
    layout = spec.Layout.of(x.numel(), lanes.count, row)
    masks = torch.zeros(len(bits) - 1, -(-layout.rows // 32) * layout.row, dtype=torch.int32)
    return Coded(
        x, residual, layout, lanes, levels, terms, euclidean, spec.key(seed, 7), 2**32 - 100 + seed,
        torch.zeros(layout.rows, dtype=torch.uint16), masks,
        torch.full((layout.words,), -1, dtype=torch.int32 if lanes.word == 32 else torch.int64),
        torch.full((x.numel(),), float("nan"), dtype=out_dtype),
    )  # fmt: skip


def code(c: Coded, kernels: Any = host) -> Coded:
    """Encode and decode; `residual` becomes the rest."""
    finish(kernels.norms(c.x, c.residual, c.layout, c.euclidean, c.norms))
    if len(c.levels) > 1:
        finish(kernels.choose_scales(c.x, c.residual, c.norms, c.layout, c.levels, c.masks))
    coding = (c.norms, c.layout, c.lanes, c.levels, c.masks)
    finish(kernels.encode(c.x, c.residual, *coding, c.key, c.offset, c.words))
    finish(kernels.decode(c.words, *coding, c.terms, 1 / c.terms, c.out))
    return c
