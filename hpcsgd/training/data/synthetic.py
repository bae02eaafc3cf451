"""Gaussian clusters: a learnable task of any size."""

from __future__ import annotations

import math

import torch

from hpcsgd.errors import BadOption
from hpcsgd.training.data.base import Data
from hpcsgd.training.data.in_memory import TensorSource
from hpcsgd.training.data.rng_streams import torch_stream


def synthetic(shape: tuple[int, ...] = (32,), classes: int = 10, samples: int = 4096, seed: int = 0) -> Data:
    """Gaussian clusters of unit variance, one a class, around normally distributed centres.

    Parameters
    ----------
    shape
        Shape of one input, float32. Default (32,).
    classes
        Number of clusters, at least 2. Default 10.
    samples
        Training samples, at least one a class; there are a fourth as many test samples, at least one a
        class. Default 4096.
    seed
        Seed of centres and samples. Default 0.
    """
    if classes < 2 or samples < classes or min(shape) < 1:
        raise BadOption(
            "synthetic data is too small",
            expected="2 classes, a sample for each, and no empty dimension",
            got=f"classes={classes}, samples={samples}, shape={shape}",
        )
    generator = torch_stream("synthetic", seed)
    centres = torch.randn(classes, math.prod(shape), generator=generator, device="cpu")

    def source(count: int) -> TensorSource:
        y = torch.arange(count, device="cpu") % classes
        x = torch.randn(count, math.prod(shape), generator=generator, device="cpu").add_(centres[y])
        return TensorSource(x.view(count, *shape), y)

    train, test = source(samples), source(max(classes, samples // 4))
    return Data(train, test, kind="classification", shape=shape, classes=classes)
