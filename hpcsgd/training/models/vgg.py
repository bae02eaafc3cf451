"""VGG with batch normalisation and one linear layer as head, as usual for CIFAR.

Images are (channels, height, width), at least 2 by 2. Pooling stops once one of less than 32 pixels is one
pixel in size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hpcsgd.training.models.input_check import check_image

_WIDTHS = (64, 128, 256, 512, 512)


def vgg11(shape: tuple[int, ...], classes: int) -> nn.Module:
    """VGG-11 with batch normalisation.

    Notes
    -----
    Simonyan, Zisserman, Very deep convolutional networks for large-scale image recognition, 2015.
    """
    return _vgg(check_image(shape, "vgg11", smallest=2), classes, (1, 1, 2, 2, 2))


def vgg16(shape: tuple[int, ...], classes: int) -> nn.Module:
    """VGG-16 with batch normalisation.

    Notes
    -----
    Simonyan, Zisserman, Very deep convolutional networks for large-scale image recognition, 2015.
    """
    return _vgg(check_image(shape, "vgg16", smallest=2), classes, (2, 2, 3, 3, 3))


def _vgg(shape: tuple[int, int, int], classes: int, depths: Sequence[int]) -> nn.Module:
    channels, side = shape[0], min(shape[1:])
    layers: list[nn.Module] = []
    for width, depth in zip(_WIDTHS, depths, strict=True):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        if side > 1:
            layers.append(nn.MaxPool2d(2))
            side //= 2
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    return nn.Sequential(*layers, *head)
