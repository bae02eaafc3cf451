"""ResNet: residual networks, for images, (channels, height, width)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from hpcsgd.training.models.input_check import check_image

Block = Callable[[int, int, int], "Residual"]


def resnet18(shape: tuple[int, ...], classes: int) -> nn.Module:
    """ResNet-18, with the stem for CIFAR below 64 pixels and the stem for ImageNet otherwise.

    Notes
    -----
    He, Zhang, Ren, Sun, Deep residual learning for image recognition, 2016.
    """
    channels, height, width = check_image(shape, "resnet18")
    stem = _imagenet_stem(channels) if min(height, width) >= 64 else _stem(channels, 64)
    return _resnet(stem, basic, (64, 128, 256, 512), (2, 2, 2, 2), classes)


def resnet50(shape: tuple[int, ...], classes: int) -> nn.Module:
    """ResNet-50, with the stem for CIFAR below 64 pixels and the stem for ImageNet otherwise.

    Notes
    -----
    He, Zhang, Ren, Sun, Deep residual learning for image recognition, 2016; a block's stride is in
    its 3 by 3 convolution, as in torchvision.
    """
    channels, height, width = check_image(shape, "resnet50")
    stem = _imagenet_stem(channels) if min(height, width) >= 64 else _stem(channels, 64)
    return _resnet(stem, bottleneck, (256, 512, 1024, 2048), (3, 4, 6, 3), classes)


def resnet20(shape: tuple[int, ...], classes: int) -> nn.Module:
    """ResNet-20 for CIFAR, with projection shortcuts (option B).

    Notes
    -----
    He, Zhang, Ren, Sun, Deep residual learning for image recognition, 2016, section 4.2.
    """
    channels, *_ = check_image(shape, "resnet20")
    return _resnet(_stem(channels, 16), basic, (16, 32, 64), (3, 3, 3), classes)


class Residual(nn.Module):
    """A residual block: relu(body(x) + shortcut(x)).

    Parameters
    ----------
    body
        Computes the residual.
    channels_in, out, stride
        Input and output channels, and stride of the body; the shortcut is a projection if these change
        the shape.
    """

    def __init__(self, body: nn.Module, channels_in: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = body
        same = channels_in == out and stride == 1
        self.shortcut = nn.Identity() if same else _conv(channels_in, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(cast(Tensor, self.body(x) + self.shortcut(x)))


def basic(channels_in: int, out: int, stride: int) -> Residual:
    """Return the block of the shallower networks: two 3 by 3 convolutions."""
    body = nn.Sequential(_conv(channels_in, out, 3, stride), nn.ReLU(), _conv(out, out, 3))
    return Residual(body, channels_in, out, stride)


def bottleneck(channels_in: int, out: int, stride: int) -> Residual:
    """Return the block of the deeper networks: a 3 by 3 convolution with a fourth of the channels."""
    narrow = out // 4
    body = nn.Sequential(
        _conv(channels_in, narrow, 1),
        nn.ReLU(),
        _conv(narrow, narrow, 3, stride),
        nn.ReLU(),
        _conv(narrow, out, 1),
    )
    return Residual(body, channels_in, out, stride)


def _resnet(
    stem: nn.Module, block: Block, widths: Sequence[int], depths: Sequence[int], classes: int
) -> nn.Module:
    layers: list[nn.Module] = []
    channels_in = widths[0] if block is basic else 64
    for stage, (out, depth) in enumerate(zip(widths, depths, strict=True)):
        for position in range(depth):
            layers.append(block(channels_in, out, 2 if stage and not position else 1))
            channels_in = out
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels_in, classes)
    return nn.Sequential(stem, *layers, *head)


def _conv(channels_in: int, out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, out, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


def _stem(channels: int, out: int) -> nn.Module:
    return nn.Sequential(_conv(channels, out, 3), nn.ReLU())


def _imagenet_stem(channels: int) -> nn.Module:
    return nn.Sequential(_conv(channels, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))
