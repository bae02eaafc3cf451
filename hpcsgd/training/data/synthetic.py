"""Gaussian clusters: a learnable task of any size."""

from __future__ import annotations

import math
from typing import Annotated

import torch

from hpcsgd.errors import BadOption
from hpcsgd.registry import Within, checked
from hpcsgd.registry.limits import Count, Seed, Size
from hpcsgd.training.data.base import Data
from hpcsgd.training.data.in_memory import TensorSource
from hpcsgd.training.data.rng_streams import torch_stream

_MOST_NUMBERS = 10**10  # of all samples together: 40 GB


@checked
def synthetic(
    shape: tuple[Size, ...] = (32,),
    classes: Annotated[int, Within(2, 10**6)] = 10,
    samples: Count = 4096,
    seed: Seed = 0,
) -> Data:
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

    Raises
    ------
    BadOption
        Fewer samples than classes, or more than 40 GB of them.
    """
    if not classes <= samples <= _MOST_NUMBERS // math.prod(shape):
        raise BadOption(
            "synthetic data has too few or too many samples",
            expected=f"{classes} samples, one a class, to {_MOST_NUMBERS // math.prod(shape)} of this shape",
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
