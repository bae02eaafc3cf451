"""Handwritten digits, bundled with scikit-learn."""

from __future__ import annotations

import torch

from hpcsgd.registry import checked
from hpcsgd.registry.limits import Seed
from hpcsgd.training.data.base import Data
from hpcsgd.training.data.in_memory import TensorSource
from hpcsgd.training.data.rng_streams import preserve_python_random, torch_stream


@checked
def digits(seed: Seed = 0) -> Data:
    """1797 handwritten digits of 8 by 8 pixels, bundled with scikit-learn.

    Parameters
    ----------
    seed
        Seed of the split: four fifths of each class are for training, one fifth for the test. Default 0.

    Notes
    -----
    Alpaydin and Kaynak, Optical recognition of handwritten digits, UCI repository, 1998.
    """
    with preserve_python_random():
        from sklearn.datasets import load_digits  # slow to import, and needed only here

    pixels, target = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels / 16).float().view(-1, 1, 8, 8)
    y = torch.from_numpy(target).long()
    order = torch.randperm(len(y), generator=torch_stream("digits", seed), device="cpu")
    members = [order[y[order] == label] for label in range(10)]
    test = torch.cat([member[: len(member) // 5] for member in members])
    train = torch.cat([member[len(member) // 5 :] for member in members])
    sources = TensorSource(x[train], y[train]), TensorSource(x[test], y[test])
    return Data(*sources, kind="classification", shape=(1, 8, 8), classes=10)
