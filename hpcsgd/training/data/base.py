"""What a data set is: a training and a test source, and what a model must know of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Inputs of one training batch, and the only source of randomness, to augmented inputs."""


class Source(Protocol):
    """Samples by index."""

    @property
    def labels(self) -> Tensor | None:
        """Class of each sample, (samples,) int64; None where samples have no class."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some samples.

        Parameters
        ----------
        indices
            Samples, (n,) int64.
        generator
            Given for training batches, to sources whose augmentation is part of decoding (a random
            crop of images that differ in size); the others have no use for it. Default None:
            every call returns the same.
        """


@dataclass(frozen=True)
class Data:
    """A data set.

    Parameters
    ----------
    train, test
        Disjoint sources.
    kind
        ``"classification"``: an input has one label; ``"language"``: each token has the next as
        its target.
    shape
        Shape of one input.
    classes
        Number of labels, or size of the vocabulary.
    augment
        Applied to training batches only; default None.
    """

    train: Source
    test: Source
    kind: Literal["classification", "language"]
    shape: tuple[int, ...]
    classes: int
    augment: Augment | None = None
