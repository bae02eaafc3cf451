"""CIFAR-10 and CIFAR-100, from the binary version: no pickle is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hpcsgd.registry import checked
from hpcsgd.training.data.augment import crop_and_flip
from hpcsgd.training.data.base import Data
from hpcsgd.training.data.files import corrupt_file, find_folder
from hpcsgd.training.data.in_memory import TensorSource

_PAGE = "the page 'The CIFAR-10 and CIFAR-100 datasets', binary version"
_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class BinaryVersion:
    """Files and record format of a binary version, and the statistics of its training pixels."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    records: dict[str, int]
    labels: int
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_TRAIN10 = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
CIFAR10 = BinaryVersion(
    folder="cifar-10-batches-bin",
    train=_TRAIN10,
    test=("test_batch.bin",),
    records=dict.fromkeys((*_TRAIN10, "test_batch.bin"), 10_000),
    labels=1,
    classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
CIFAR100 = BinaryVersion(
    folder="cifar-100-binary",
    train=("train.bin",),
    test=("test.bin",),
    records={"train.bin": 50_000, "test.bin": 10_000},
    labels=2,  # coarse, then fine: the fine one is the class
    classes=100,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


@checked
def cifar10(path: Path = Path("data/cifar10")) -> Data:
    """60 000 photographs of 10 classes, 32 by 32 pixels, from the binary version in a folder.

    Parameters
    ----------
    path
        Folder of the ``.bin`` files, or its parent folder, with ``cifar-10-batches-bin``.

    Notes
    -----
    Krizhevsky, Learning multiple layers of features from tiny images, 2009.
    """
    return read(path, CIFAR10)


@checked
def cifar100(path: Path = Path("data/cifar100")) -> Data:
    """60 000 photographs of 100 classes, 32 by 32 pixels, from the binary version in a folder.

    Parameters
    ----------
    path
        Folder of the ``.bin`` files, or its parent folder, with ``cifar-100-binary``.

    Notes
    -----
    Krizhevsky, Learning multiple layers of features from tiny images, 2009.
    """
    return read(path, CIFAR100)


def read(path: Path, version: BinaryVersion) -> Data:
    """Read a data set in its binary version.

    Raises
    ------
    HpcsgdError
        A file is missing, of another size, or has a label out of range.
    """
    folder = find_folder(version.records, (path, path / version.folder), ("",), _PAGE)
    train, test = (_source(folder, names, version) for names in (version.train, version.test))
    shape = (3, 32, 32)
    return Data(train, test, "classification", shape, version.classes, crop_and_flip)


def _source(folder: Path, names: Sequence[str], version: BinaryVersion) -> TensorSource:
    total = sum(version.records[name] for name in names)
    x = np.empty((total, _PIXELS), np.uint8)
    y = np.empty(total, np.int64)
    start = 0
    for name in names:
        file, count = folder / name, version.records[name]
        record = version.labels + _PIXELS
        if file.stat().st_size != count * record:
            raise corrupt_file(file, f"{count * record} bytes", file.stat().st_size, _PAGE)
        records = np.fromfile(file, np.uint8).reshape(count, record)
        fine = records[:, version.labels - 1]
        if int(fine.max()) >= version.classes:
            raise corrupt_file(file, f"labels below {version.classes}", int(fine.max()), _PAGE)
        x[start : start + count], y[start : start + count] = records[:, version.labels :], fine
        start += count
    images = torch.from_numpy(x).view(-1, 3, 32, 32)
    return TensorSource(images, torch.from_numpy(y), version.mean, version.std)
