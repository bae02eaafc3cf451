"""A source of samples in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpcsgd.errors import BadOption


class TensorSource:
    """A source whose samples are two tensors.

    Parameters
    ----------
    x
        Inputs, (samples, ...), any dtype. uint8 stands for [0, 1] in 255 steps: it is stored as uint8
        and converted to float32 for each batch.
    y
        Targets, (samples, ...). Integers in one dimension are the labels.
    mean, std
        Mean and standard deviation of each channel (dimension 1 of ``x``), in units of [0, 1]: a batch is
        (x / 255 - mean) / std. For uint8 only. Default: 0 and 1.

    Raises
    ------
    BadOption
        ``x`` and ``y`` differ in length, or a mean or std is passed for inputs that are not uint8.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> None:
        if len(x) != len(y):
            raise BadOption("inputs and targets differ in length", expected=len(x), got=len(y))
        if x.dtype != torch.uint8 and (any(mean) or any(value != 1 for value in std)):
            raise BadOption("a mean or std applies to uint8 inputs only", got=x.dtype)
        self.x, self.y = x, y
        channels = (-1, *(1 for _ in x.shape[2:]))
        scale = torch.tensor(std, device="cpu").reciprocal()
        self._scale = (scale / 255).view(channels)
        self._shift = (torch.tensor(mean, device="cpu") * scale).view(channels)

    @property
    def labels(self) -> Tensor | None:
        """Class of each sample, (samples,) int64; None if targets are not classes."""
        classes = self.y.ndim == 1 and not self.y.is_floating_point()
        return self.y.long() if classes else None

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return inputs, as float32 if they are stored as uint8, and targets of some samples."""
        x, y = self.x.index_select(0, indices), self.y.index_select(0, indices)
        if x.dtype == torch.uint8:
            x = x.to(torch.float32).mul_(self._scale).sub_(self._shift)
        return x, y
