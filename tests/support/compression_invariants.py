"""What a reduction of simulated ranks must obey, whatever the scheme."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hpcsgd.compress import Stretch, build
from hpcsgd.kernels.codec import host
from tests.support import compressor_rows as c
from tests.support.simulated_codecs import Lockstep

EPS = 2.0**-23


def numbers(kind: str, ranks: int, numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """(ranks, numel) of what gradients look like; a float64 too is a number that float32 has."""
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
    return torch.from_numpy(x).clamp(-3e4, 3e4).float().to(dtype)


def stretch_of(numel: int, ranks: int, first: int = 0) -> Stretch:
    """With a matrix, a gap, and a vector."""
    rows = int((numel * 0.6) ** 0.5)
    columns = max(1, rows - 3)
    inside: list[tuple[int, tuple[int, ...]]] = [(0, (rows, columns))] if rows else []
    begin = rows * columns + 5 if rows else 0
    if numel > begin:
        inside.append((begin, (numel - begin,)))
    return Stretch(numel, ranks, first, tensors=tuple(inside))


def lockstep(row: c.Row, stretch: Stretch, feedback: bool, seed: int = 0) -> Lockstep:
    compressor = build(row.spec)
    assert compressor is not None
    return Lockstep(compressor, stretch, feedback, seed)


def rotate(lock: Lockstep, x: Tensor, back: bool = False) -> Tensor:
    """Each row as a rotated scheme sees it, or back."""
    out = torch.empty(x.shape)
    for source, target in zip(x, out, strict=True):
        function = host.unrotate if back else host.rotate
        list(function(source, lock.draw(0, 0).lasting(), lock.stretch.first, target))
    return out


def memory(lock: Lockstep) -> Tensor:
    return torch.stack([residual for residual in lock.residuals if residual is not None])


def reduce_and_check(row: c.Row, lock: Lockstep, rows: Tensor, step: int) -> Tensor:
    """One reduction with feedback; what it must obey. Gives the residuals."""
    ranks, numel = rows.shape
    scale = 1 / ranks
    before = memory(lock).clone()
    out = lock.reduce(rows, step, scale)
    rest = memory(lock)

    assert all(torch.equal(other, out[0]) for other in out)
    assert torch.isfinite(out).all() and torch.isfinite(rest).all()
    seen = (rotate(lock, rows.float()) if row.rotated else rows.float()) + before
    error = np.abs(rest.double().numpy())
    assert np.all(error <= row.bound(seen.double().numpy(), lock.stretch) * (1 + 2 * EPS))

    # What each rank's codes say is what it had to say without what they did not.
    own = seen.double() - rest.double()
    said = rotate(lock, own.float(), back=True).double() if row.rotated else own
    expected = (said.sum(0) * scale).numpy()
    size = (seen.double().abs() + rest.double().abs()).sum(0).numpy() * scale
    if row.mixes:
        size = np.full(numel, np.linalg.norm(size) * 8)
    tolerance = (4 * EPS + ranks * row.precision) * size + 2.0**-147
    tolerance += torch.finfo(rows.dtype).eps * (np.abs(expected) + torch.finfo(rows.dtype).tiny)
    assert np.all(np.abs(out[0].double().numpy() - expected) <= tolerance)
    return rest
