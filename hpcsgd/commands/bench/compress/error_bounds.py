"""How far off the mean by a scheme may be."""

from __future__ import annotations

import math

import torch

from hpcsgd.compress import (
    FP16,
    Compressor,
    ErrorFeedback,
    Float32,
    GlobalRandK,
    Hadamard,
    QSGDMaxNorm,
    QSGDMaxNormMultiScale,
)

_FLOAT32 = 1e-5


def limit(compressor: Compressor | None, numel: int) -> float:
    """A relative error of the mean that only a mistake can exceed; infinite where the scheme is biased."""
    feedback = False
    while isinstance(compressor, ErrorFeedback | Hadamard):
        feedback = feedback or isinstance(compressor, ErrorFeedback)
        compressor = compressor.inner
    match compressor:
        case None | Float32():
            return _FLOAT32
        case FP16():
            return 4 * torch.finfo(compressor.dtype).eps
        case QSGDMaxNorm():
            return _of_levels(compressor.levels, compressor.scaling.scale, compressor.scaling.norm)
        case QSGDMaxNormMultiScale():
            return _of_levels(compressor.levels[0], compressor.scaling.scale, compressor.scaling.norm)
        case GlobalRandK() if not feedback:
            inner = limit(compressor.inner, numel)
            share = compressor.ratio if compressor.k is None else min(1.0, compressor.k / numel)
            return 2 * (1 + inner) / math.sqrt(share)
        case _:
            return math.inf


def _of_levels(levels: int, scale: str, norm: str) -> float:
    """Half a level an element at most, and a level is as large as the norm is above the usual element."""
    return (2 if (scale, norm) == ("block", "max") else 40) / levels
