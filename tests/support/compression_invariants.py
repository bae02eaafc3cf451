"""Invariants of a reduction over simulated ranks, for every scheme."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hpcsgd.compress import build
from hpcsgd.compress.base import Segment, kernels_for
from tests.support import compressor_rows as c
from tests.support.devices import on_device
from tests.support.simulated_codecs import Lockstep

EPS = 2.0**-23


def numbers(kind: str, ranks: int, numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Return (ranks, numel) of gradient-like numbers; also in float64 they are numbers of float32."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((ranks, numel))
    if kind == "heavy":
        x *= np.exp(3 * rng.standard_normal((ranks, numel)))
    elif kind == "sparse":
        x *= rng.random((ranks, numel)) < 0.02
    elif kind == "blocks":
        x *= 10.0 ** rng.integers(-4, 4, (numel // 100 + 1)).repeat(100)[:numel]
    elif kind == "whole":
        x = (np.arange(numel) * 7 + 3 * np.arange(ranks)[:, None]) % 5.0 - 2
    return on_device(torch.from_numpy(x).clamp(-3e4, 3e4).float().to(dtype))


def segment_of(numel: int, ranks: int, first: int = 0) -> Segment:
    """With a matrix, a gap, and a vector."""
    rows = int((numel * 0.6) ** 0.5)
    columns = max(1, rows - 3)
    inside: list[tuple[int, tuple[int, ...]]] = [(0, (rows, columns))] if rows else []
    begin = rows * columns + 5 if rows else 0
    if numel > begin:
        inside.append((begin, (numel - begin,)))
    return Segment(numel, ranks, first, tensors=tuple(inside), device=torch.get_default_device())


def lockstep(row: c.Row, segment: Segment, feedback: bool, seed: int = 0) -> Lockstep:
    compressor = build(row.spec)
    assert compressor is not None
    return Lockstep(compressor, segment, feedback, seed)


def rotate(lock: Lockstep, x: Tensor, back: bool = False) -> Tensor:
    """Each row as a rotated scheme sees it, or back."""
    out = torch.empty(x.shape)
    for source, target in zip(x, out, strict=True):
        kernels = kernels_for(source)
        list(
            (kernels.unrotate if back else kernels.rotate)(
                source, lock.random_key(0, 0).fixed(), lock.segment.offset, target
            )
        )
    return out


def residuals_of(lock: Lockstep) -> Tensor:
    return torch.stack([residual for residual in lock.residuals if residual is not None])


def reduce_and_check(row: c.Row, lock: Lockstep, rows: Tensor, step: int) -> Tensor:
    """Check the invariants of one reduction with error feedback; returns the residuals."""
    ranks, numel = rows.shape
    scale = 1 / ranks
    before = residuals_of(lock).clone()
    out = lock.reduce(rows, step, scale)
    residuals = residuals_of(lock)

    assert all(torch.equal(other, out[0]) for other in out)
    assert torch.isfinite(residuals).all()
    total = (rotate(lock, rows.float()) if row.rotated else rows.float()) + before
    error = np.abs(residuals.double().numpy(force=True))
    assert np.all(error <= row.bound(total.double().numpy(force=True), lock.segment) * (1 + 2 * EPS))

    # What each rank's codes say is what it had to say without what they did not.
    own = total.double() - residuals.double()
    decoded = rotate(lock, own.float(), back=True).double() if row.rotated else own
    expected = (decoded.sum(0) * scale).numpy(force=True)
    size = (total.double().abs() + residuals.double().abs()).sum(0).numpy(force=True) * scale
    if row.mixes:
        size = np.full(numel, np.linalg.norm(size) * 8)
    tolerance = (4 * EPS + ranks * row.precision) * size + 2.0**-147
    tolerance += torch.finfo(rows.dtype).eps * (np.abs(expected) + torch.finfo(rows.dtype).tiny)
    found, largest = out[0].double().numpy(force=True), torch.finfo(rows.dtype).max
    overflows = np.isinf(found) & (np.abs(expected) + tolerance > largest)  # in float16, by coarse rounding
    assert np.all(np.abs(found - expected)[~overflows] <= tolerance[~overflows])
    return residuals
