"""Augmentation of image batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_and_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to 4 pixels, padded with zeros, and mirror half of them, at random.

    Images are (n, channels, height, width), of any dtype; the generator is the only source of randomness.

    Notes
    -----
    He et al., Deep residual learning for image recognition, 2016, section 4.2.
    """
    count, _, height, width = x.shape
    top, left = torch.randint(9, (2, count), generator=generator, device="cpu")
    mirrored = torch.randint(2, (count, 1, 1, 1), generator=generator, device="cpu").bool()
    crops = F.pad(x, (4, 4, 4, 4)).unfold(2, height, 1).unfold(3, width, 1)
    x = crops[torch.arange(count, device="cpu"), :, top, left]
    return torch.where(mirrored, x.flip(3), x)
