"""MNIST and Fashion-MNIST, from idx files."""

from __future__ import annotations

import gzip
import zlib
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hpcsgd.registry import checked
from hpcsgd.training.data.base import Data
from hpcsgd.training.data.files import corrupt_file, find_folder
from hpcsgd.training.data.in_memory import TensorSource

_NAMES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


@checked
def mnist(path: Path = Path("data/mnist")) -> Data:
    """70 000 handwritten digits of 28 by 28 pixels, from idx files (.gz or not) in a folder.

    Parameters
    ----------
    path
        Folder of the four files, ``train-images-idx3-ubyte`` and so on.

    Notes
    -----
    LeCun, Bottou, Bengio, Haffner, Gradient-based learning applied to document recognition, 1998.
    """
    return _read(path, 0.1307, 0.3081, "the page 'The MNIST database of handwritten digits'")


@checked
def fashion_mnist(path: Path = Path("data/fashion-mnist")) -> Data:
    """70 000 pieces of clothing of 28 by 28 pixels, from idx files (.gz or not) in a folder.

    Parameters
    ----------
    path
        Folder of the four files, ``train-images-idx3-ubyte`` and so on.

    Notes
    -----
    Xiao, Rasul, Vollgraf, Fashion-MNIST, 2017.
    """
    return _read(path, 0.2860, 0.3530, "the repository zalandoresearch/fashion-mnist")


def read_idx(file: Path, dimensions: int, page: str) -> Tensor:
    """Read the array of unsigned bytes in an idx file, compressed if its name ends in ``.gz``.

    It must have this number of dimensions. The page is the source of the file, for errors.

    Raises
    ------
    HpcsgdError
        Another magic number, or another number of bytes than in the header.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise corrupt_file(file, "a readable idx file", error, page) from error
    magic, body = bytes([0, 0, 8, dimensions]), 4 + 4 * dimensions
    if content[:4] != magic or len(content) < body:
        raise corrupt_file(file, f"idx magic number {magic.hex()}", content[:4].hex(), page)
    shape = [int(size) for size in np.frombuffer(content, ">u4", dimensions, 4)]
    if len(content) - body != prod(shape):
        raise corrupt_file(file, f"{prod(shape)} bytes of data", len(content) - body, page)
    return torch.from_numpy(np.frombuffer(content, np.uint8, -1, body).copy()).view(shape)


def _read(path: Path, mean: float, std: float, page: str) -> Data:
    names = [f"{name}-ubyte" for name in _NAMES]
    folder = find_folder(names, [path], ("", ".gz"), page)
    files = [plain if (plain := folder / n).is_file() else folder / f"{n}.gz" for n in names]
    train, test = (_source(images, labels, mean, std, page) for images, labels in (files[:2], files[2:]))
    return Data(train, test, kind="classification", shape=(1, 28, 28), classes=10)


def _source(images: Path, labels: Path, mean: float, std: float, page: str) -> TensorSource:
    x, y = read_idx(images, 3, page), read_idx(labels, 1, page)
    if x.shape[1:] != (28, 28) or not len(x):
        raise corrupt_file(images, "images of 28 by 28 pixels", tuple(x.shape), page)
    if len(y) != len(x) or int(y.max()) > 9:
        got = f"{len(y)} labels, the largest {int(y.max())}" if len(y) else "no labels"
        raise corrupt_file(labels, f"{len(x)} labels of 0 to 9", got, page)
    return TensorSource(x.unsqueeze(1), y.long(), (mean,), (std,))
