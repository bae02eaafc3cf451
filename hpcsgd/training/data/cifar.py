"""CIFAR-10 and CIFAR-100, from the binary version: no pickle is ever loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hpcsgd.training.data.augment import crop_and_flip
from hpcsgd.training.data.base import Data
from hpcsgd.training.data.files import corrupt, find
from hpcsgd.training.data.in_memory import Tensors

_PAGE = "the page 'The CIFAR-10 and CIFAR-100 datasets', binary version"
_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """Where the binary version keeps what, and the statistics of its training pixels."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    records: dict[str, int]
    labels: int
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_TRAIN10 = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
CIFAR10 = Layout(
    folder="cifar-10-batches-bin",
    train=_TRAIN10,
    test=("test_batch.bin",),
    records=dict.fromkeys((*_TRAIN10, "test_batch.bin"), 10_000),
    labels=1,
    classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
CIFAR100 = Layout(
    folder="cifar-100-binary",
    train=("train.bin",),
    test=("test.bin",),
    records={"train.bin": 50_000, "test.bin": 10_000},
    labels=2,  # coarse, then fine: the fine one is the class
    classes=100,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


def cifar10(path: Path = Path("data/cifar10")) -> Data:
    """60 000 photographs of 10 classes, 32 by 32 pixels, from the binary version in a folder.

    Parameters
    ----------
    path
        Folder of the ``.bin`` files, or the one that holds ``cifar-10-batches-bin``.

    Notes
    -----
    Krizhevsky, Learning multiple layers of features from tiny images, 2009.
    """
    return read(path, CIFAR10)


def cifar100(path: Path = Path("data/cifar100")) -> Data:
    """60 000 photographs of 100 classes, 32 by 32 pixels, from the binary version in a folder.

    Parameters
    ----------
    path
        Folder of the ``.bin`` files, or the one that holds ``cifar-100-binary``.

    Notes
    -----
    Krizhevsky, Learning multiple layers of features from tiny images, 2009.
    """
    return read(path, CIFAR100)


def read(path: Path, layout: Layout) -> Data:
    """Read the data set that a layout describes.

    Raises
    ------
    HpcsgdError
        A file is missing, of another size, or has a label that does not exist.
    """
    folder = find(layout.records, (path, path / layout.folder), ("",), _PAGE)
    train, test = (_source(folder, names, layout) for names in (layout.train, layout.test))
    shape = (3, 32, 32)
    return Data(train, test, "classification", shape, layout.classes, crop_and_flip)


def _source(folder: Path, names: Sequence[str], layout: Layout) -> Tensors:
    total = sum(layout.records[name] for name in names)
    x = np.empty((total, _PIXELS), np.uint8)
    y = np.empty(total, np.int64)
    start = 0
    for name in names:
        file, count = folder / name, layout.records[name]
        record = layout.labels + _PIXELS
        if file.stat().st_size != count * record:
            raise corrupt(file, f"{count * record} bytes", file.stat().st_size, _PAGE)
        records = np.fromfile(file, np.uint8).reshape(count, record)
        fine = records[:, layout.labels - 1]
        if int(fine.max()) >= layout.classes:
            raise corrupt(file, f"labels below {layout.classes}", int(fine.max()), _PAGE)
        x[start : start + count], y[start : start + count] = records[:, layout.labels :], fine
        start += count
    images = torch.from_numpy(x).view(-1, 3, 32, 32)
    return Tensors(images, torch.from_numpy(y), layout.mean, layout.std)
