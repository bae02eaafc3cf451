"""Bounds on the error of a scheme's mean."""

from __future__ import annotations

import math

import torch

from hpcsgd.compress.base import Compressor
from hpcsgd.compress.error_feedback import ErrorFeedback
from hpcsgd.compress.float32 import Float32
from hpcsgd.compress.hadamard import Hadamard
from hpcsgd.compress.half import FP16
from hpcsgd.compress.maxnorm import QSGDMaxNorm
from hpcsgd.compress.multiscale import QSGDMaxNormMultiScale
from hpcsgd.compress.randk import GlobalRandK, GlobalRandKMaxNorm, GlobalRandKMaxNormMultiScale

_FLOAT32 = 1e-5


def error_bound(compressor: Compressor | None, numel: int) -> float:
    """A bound on the relative error of the mean that only a bug can exceed; infinite for a biased scheme."""
    feedback = False
    while isinstance(compressor, ErrorFeedback | Hadamard):
        feedback = feedback or isinstance(compressor, ErrorFeedback)
        compressor = compressor.inner
    match compressor:
        case None | Float32():
            return _FLOAT32
        case FP16():
            return 4 * torch.finfo(compressor.dtype).eps
        case QSGDMaxNorm() | QSGDMaxNormMultiScale():
            return _bound_for_levels(compressor.levels[0], compressor.scale, compressor.norm)
        case GlobalRandK() | GlobalRandKMaxNorm() | GlobalRandKMaxNormMultiScale() if not feedback:
            inner = error_bound(compressor.inner, numel)
            share = compressor.ratio if compressor.k is None else min(1.0, compressor.k / numel)
            return 2 * (1 + inner) / math.sqrt(share)
        case _:
            return math.inf


def _bound_for_levels(levels: int, scale: str, norm: str) -> float:
    """At most half a level per element; the size of a level is the ratio of the norm to a typical element."""
    return (2 if (scale, norm) == ("block", "max") else 40) / levels
