"""The interface of data sets: a training and a test source, and the shapes that a model needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Maps the inputs of a training batch, and the only source of randomness, to augmented inputs."""


class Source(Protocol):
    """A source of samples by index."""

    @property
    def labels(self) -> Tensor | None:
        """Class of each sample, (samples,) int64; None if samples have no class."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of some samples.

        Parameters
        ----------
        indices
            Indices of the samples, (n,) int64.
        generator
            Passed for training batches, for sources whose augmentation is part of decoding (a random
            crop of images that differ in size); other sources ignore it. Default None:
            every call returns the same values.
        """


@dataclass(frozen=True)
class Data:
    """A data set.

    Parameters
    ----------
    train, test
        Disjoint sources.
    kind
        ``"classification"``: an input has one label; ``"language"``: the target of each token is the
        next token.
    shape
        Shape of one input.
    classes
        Number of labels, or size of the vocabulary.
    augment
        Augmentation of training batches; default None.
    """

    train: Source
    test: Source
    kind: Literal["classification", "language"]
    shape: tuple[int, ...]
    classes: int
    augment: Augment | None = None
