"""Which rank trains, and which evaluates, on which samples."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpcsgd.errors import BadOption
from hpcsgd.training.data.rng_streams import numpy_stream, torch_stream

Indices = NDArray[np.int64]


def partition(
    labels: Tensor | None, samples: int, ranks: int, alpha: float | None, seed: int, epoch: int
) -> list[Tensor]:
    """Give every sample to exactly one rank, in the order of one epoch.

    Parameters
    ----------
    labels
        Class of each sample, (samples,) int64; only ``alpha`` needs it.
    samples, ranks
        How many there are of each.
    alpha
        None: one permutation a epoch, dealt out in turn, so that the ranks' batches of one step
        together are a batch of that permutation. A number: each class is divided over the ranks by
        proportions from a Dirichlet(alpha) distribution, the same in every epoch; small values
        give ranks with few classes. Each rank gets at least one sample and shuffles its own.
    seed, epoch
        Non-negative.

    Returns
    -------
    list of Tensor
        For each rank the indices of its samples, int64.

    Raises
    ------
    BadOption
        Fewer samples than ranks, ``alpha`` out of range, or ``alpha`` without labels.

    Notes
    -----
    Hsu, Qi, Brown, Measuring the effects of non-identical data distribution for federated visual
    classification, 2019.
    """
    if not 1 <= ranks <= samples:
        raise BadOption("each rank needs a sample", expected=f"1 to {samples} ranks", got=ranks)
    if alpha is None:
        order = torch.randperm(samples, generator=torch_stream("epoch", seed, epoch))
        return [order[rank::ranks] for rank in range(ranks)]
    if labels is None:
        raise BadOption(
            "alpha skews the classes that a rank sees, and this data has no classes",
            do="leave alpha out for language data",
        )
    if not (math.isfinite(alpha) and 1e-6 <= alpha <= 1e6):
        raise BadOption("alpha is out of range", expected="1e-6 to 1e6", got=alpha)
    shards = skewed(labels, ranks, alpha, seed)
    return [shuffled(shard, rank, seed, epoch) for rank, shard in enumerate(shards)]


def shuffled(shard: Tensor, rank: int, seed: int, epoch: int) -> Tensor:
    """A skewed shard in its order of one epoch."""
    return shard[torch.randperm(len(shard), generator=torch_stream("shard", seed, epoch, rank))]


def evaluation_shard(samples: int, rank: int, ranks: int) -> Tensor:
    """Indices that one rank evaluates, int64: contiguous, no padding, no overlap.

    Parameters
    ----------
    samples
        Size of the source; shards differ in length by one at most, and may be empty.
    rank, ranks
        This rank, and how many there are.
    """
    return torch.arange(samples * rank // ranks, samples * (rank + 1) // ranks)


def skewed(labels: Tensor, ranks: int, alpha: float, seed: int) -> list[Tensor]:
    """The samples of each rank, which are its own in every epoch, not in the order of any."""
    draw = numpy_stream("dirichlet", seed)
    classes = labels.numpy()
    by_class = np.argsort(classes, kind="stable")
    pieces: list[list[Indices]] = [[] for _ in range(ranks)]
    for members in np.split(by_class, np.cumsum(np.bincount(classes))[:-1]):
        proportions = draw.dirichlet(np.full(ranks, alpha))
        cuts = (np.cumsum(proportions)[:-1] * len(members)).astype(np.int64)
        for share, piece in zip(pieces, np.split(draw.permutation(members), cuts), strict=True):
            share.append(piece)
    shards = [torch.from_numpy(np.concatenate(share)) for share in pieces]
    _feed_the_empty(shards)
    return shards


def _feed_the_empty(shards: list[Tensor]) -> None:
    """Move one sample from the largest shard to each empty one."""
    for rank, shard in enumerate(shards):
        if not len(shard):
            donor = max(range(len(shards)), key=lambda other: len(shards[other]))
            shards[rank], shards[donor] = shards[donor][-1:], shards[donor][:-1]
