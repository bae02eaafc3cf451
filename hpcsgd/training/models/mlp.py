"""Models without convolutions, for inputs of any shape."""

from __future__ import annotations

import math
from typing import Annotated

from torch import nn

from hpcsgd.registry import Within, checked


def logistic(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Multinomial logistic regression."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes))


@checked
def two_nn(shape: tuple[int, ...], classes: int, width: Annotated[int, Within(1, 2**16)] = 200) -> nn.Module:
    """Perceptron with two hidden layers: the 2NN.

    Parameters
    ----------
    shape
        Shape of one input.
    classes
        Number of labels.
    width
        Units in each hidden layer. Default 200.

    Notes
    -----
    McMahan et al., Communication-efficient learning of deep networks from decentralized data, 2017.
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )
