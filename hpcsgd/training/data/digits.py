"""Handwritten digits, bundled with scikit-learn."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch

from hpcsgd.errors import HpcsgdError
from hpcsgd.registry import checked
from hpcsgd.registry.limits import Seed
from hpcsgd.training.data.base import Data
from hpcsgd.training.data.in_memory import TensorSource
from hpcsgd.training.data.rng_streams import torch_stream


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
    table = np.loadtxt(_file(), delimiter=",")
    x = torch.from_numpy(table[:, :-1] / 16).float().view(-1, 1, 8, 8)
    y = torch.from_numpy(table[:, -1]).long()
    order = torch.randperm(len(y), generator=torch_stream("digits", seed), device="cpu")
    members = [order[y[order] == label] for label in range(10)]
    test = torch.cat([member[: len(member) // 5] for member in members])
    train = torch.cat([member[len(member) // 5 :] for member in members])
    sources = TensorSource(x[train], y[train]), TensorSource(x[test], y[test])
    return Data(*sources, kind="classification", shape=(1, 8, 8), classes=10)


def _file() -> Path:
    """Find the file without importing scikit-learn, which takes longer than to train on it."""
    package = importlib.util.find_spec("sklearn")
    folders = (package.submodule_search_locations if package is not None else None) or []
    files = [Path(folder) / "datasets" / "data" / "digits.csv.gz" for folder in folders]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise HpcsgdError(
            "the handwritten digits of scikit-learn are not there",
            expected="datasets/data/digits.csv.gz in the package sklearn",
            got=", ".join(map(str, files)) or "no package sklearn",
            do="pip install scikit-learn, or use another data set",
            everywhere=True,
        )
    return found
