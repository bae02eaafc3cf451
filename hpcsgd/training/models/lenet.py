"""LeNet-5."""

from __future__ import annotations

from torch import nn

from hpcsgd.training.models.input_check import check_image


def lenet(shape: tuple[int, ...], classes: int) -> nn.Module:
    """LeNet-5 with ReLU and max pooling.

    Parameters
    ----------
    shape
        (channels, height, width), at least 4 by 4. Images below 32 pixels are padded before the first
        convolution, as in the paper, and images below 28 pixels before the second one too.
    classes
        Number of labels.

    Notes
    -----
    LeCun, Bottou, Bengio, Haffner, Gradient-based learning applied to document recognition, 1998.
    """
    channels, height, width = check_image(shape, "lenet", smallest=4)
    side = min(height, width)
    first, second = (2 if side < 32 else 0), (2 if side < 28 else 0)

    def remaining(pixels: int) -> int:
        return ((pixels - 4 + 2 * first) // 2 - 4 + 2 * second) // 2

    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=first),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5, padding=second),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * remaining(height) * remaining(width), 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )
