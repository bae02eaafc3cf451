"""The partition of samples over ranks, for training and for evaluation."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpcsgd.errors import BadOption
from hpcsgd.registry import checked
from hpcsgd.registry.limits import Natural, Seed, Skew
from hpcsgd.training.data.rng_streams import numpy_stream, torch_stream

Indices = NDArray[np.int64]


@checked
def partition(
    labels: Tensor | None, samples: int, ranks: int, alpha: Skew | None, seed: Seed, epoch: Natural
) -> list[Tensor]:
    """Assign every sample to exactly one rank, in the order of one epoch.

    Parameters
    ----------
    labels
        Class of each sample, (samples,) int64; needed by ``alpha`` only.
    samples, ranks
        Number of samples and of ranks.
    alpha
        None: one permutation an epoch, distributed round-robin, so that the ranks' batches of one step
        together are a batch of the permutation. A number: each class is divided over the ranks in
        proportions from a Dirichlet(alpha) distribution, the same in every epoch; with small values
        ranks have few classes. Each rank gets at least one sample, and shuffles its own.
    seed, epoch
        Seed and epoch, non-negative.

    Returns
    -------
    list of Tensor
        Indices of the samples of each rank, int64.

    Raises
    ------
    BadOption
        Fewer samples than ranks, or ``alpha`` without labels.

    Notes
    -----
    Hsu, Qi, Brown, Measuring the effects of non-identical data distribution for federated visual
    classification, 2019.
    """
    if not 1 <= ranks <= samples:
        raise BadOption(
            "each rank needs a sample",
            expected=f"1 to {samples} ranks",
            got=ranks,
            do="start fewer ranks, or use a larger data set (--data)",
        )
    if alpha is None:
        order = torch.randperm(samples, generator=torch_stream("epoch", seed, epoch), device="cpu")
        return [order[rank::ranks] for rank in range(ranks)]
    if labels is None:
        raise BadOption(
            "alpha skews the distribution of classes, and this data has no classes",
            do="leave out --alpha for language data",
        )
    shards = dirichlet_shards(labels, ranks, alpha, seed)
    return [shuffled(shard, rank, seed, epoch) for rank, shard in enumerate(shards)]


def shuffled(shard: Tensor, rank: int, seed: int, epoch: int) -> Tensor:
    """Return the shard of a rank in the order of one epoch."""
    return shard[torch.randperm(len(shard), generator=torch_stream("shard", seed, epoch, rank), device="cpu")]


def evaluation_shard(samples: int, rank: int, ranks: int) -> Tensor:
    """Return the indices of the samples that one rank evaluates, int64: contiguous, without overlap.

    Parameters
    ----------
    samples
        Number of samples of the source; shards differ in length by at most one, and may be empty.
    rank, ranks
        This rank, and the number of ranks.
    """
    return torch.arange(samples * rank // ranks, samples * (rank + 1) // ranks, device="cpu")


def dirichlet_shards(labels: Tensor, ranks: int, alpha: float, seed: int) -> list[Tensor]:
    """Return the samples of each rank, the same in every epoch, in no particular order."""
    generator = numpy_stream("dirichlet", seed)
    classes = labels.numpy()
    by_class = np.argsort(classes, kind="stable")
    pieces: list[list[Indices]] = [[] for _ in range(ranks)]
    for members in np.split(by_class, np.cumsum(np.bincount(classes))[:-1]):
        proportions = generator.dirichlet(np.full(ranks, alpha))
        cuts = (np.cumsum(proportions)[:-1] * len(members)).astype(np.int64)
        for of_rank, piece in zip(pieces, np.split(generator.permutation(members), cuts), strict=True):
            of_rank.append(piece)
    shards = [torch.from_numpy(np.concatenate(of_rank)) for of_rank in pieces]
    _fill_empty_shards(shards)
    return shards


def _fill_empty_shards(shards: list[Tensor]) -> None:
    """Move one sample from the largest shard to each empty one."""
    for rank, shard in enumerate(shards):
        if not len(shard):
            donor = max(range(len(shards)), key=lambda other: len(shards[other]))
            shards[rank], shards[donor] = shards[donor][-1:], shards[donor][:-1]
