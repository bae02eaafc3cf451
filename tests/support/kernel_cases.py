"""Test data for kernels: awkward numbers, lengths and tilings."""

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
    """Numbers of all magnitudes, special ones among them; runs of plain ones and of zeros."""
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
class CodecCase:
    """The arguments of a call of encode and decode, and their results."""

    x: Tensor
    residual: Tensor | None
    tiling: spec.Tiling
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


def residuals_for(numel: int, seed: int = 0) -> Tensor:
    """Possible residuals of error feedback: finite also with `numbers` added."""
    return torch.clamp(numbers(numel, seed + 1), -1e30, 1e30)


def make_case(
    x: Tensor, residual: Tensor | None, bits: tuple[int, ...], terms: int, row: int, euclidean: bool = False,
    seed: int = 1, out_dtype: torch.dtype = torch.float32,
) -> CodecCase:  # fmt: skip
    """Create the arguments of `run_case`."""
    levels = torch.tensor([2.0 ** (b - 1) - 1 for b in bits])
    lanes = spec.lanes_for(int(levels[0]), terms)
    tiling = spec.Tiling.of(x.numel(), lanes.count, row)
    masks = torch.zeros(len(bits) - 1, -(-tiling.rows // 32) * tiling.row, dtype=torch.int32)
    return CodecCase(
        x, residual, tiling, lanes, levels, terms, euclidean, spec.key(seed, 7), 2**32 - 100 + seed,
        torch.zeros(tiling.rows, dtype=torch.uint16), masks,
        torch.full((tiling.words,), -1, dtype=torch.int32 if lanes.word == 32 else torch.int64),
        torch.full((x.numel(),), float("nan"), dtype=out_dtype),
    )  # fmt: skip


def run_case(c: CodecCase, kernels: Any = host) -> CodecCase:
    """Encode and decode; `residual` becomes the quantisation error."""
    finish(kernels.norms(c.x, c.residual, c.tiling, c.euclidean, c.norms))
    if len(c.levels) > 1:
        finish(kernels.choose_scales(c.x, c.residual, c.norms, c.tiling, c.levels, c.masks))
    code_arguments = (c.norms, c.tiling, c.lanes, c.levels, c.masks)
    finish(kernels.encode(c.x, c.residual, *code_arguments, c.key, c.offset, c.words))
    finish(kernels.decode(c.words, *code_arguments, c.terms, 1 / c.terms, c.out))
    return c
