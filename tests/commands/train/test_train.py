"""`hpcsgd train` on each kind of data, and what its defaults reach."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.train_jobs import records, trained

RANDOM = np.random.default_rng(0)

# The published files have 30 MB each; these have the same records, six of them.
SMALL_CIFAR = """
from dataclasses import replace
from hpcsgd.training.data import cifar
cifar.CIFAR10 = replace(cifar.CIFAR10, records=dict.fromkeys(cifar.CIFAR10.records, 6))
"""

OWN = """
from torch import nn

def linear(classes: int, features: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(features, classes))
"""


def write_mnist(folder: Path) -> None:
    for part, count in (("train", 30), ("t10k", 20)):
        images, labels = RANDOM.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())


def write_cifar(folder: Path) -> None:
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        batch = RANDOM.integers(0, 256, (6, 3073)).astype(np.uint8)
        batch[:, 0] = np.arange(6)
        batch.tofile(folder / name)


@pytest.mark.timeout(170)
def test_files_and_models_of_the_users_own(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    write_cifar(tmp_path)
    (tmp_path / "book.txt").write_text("It was the best of times, it was the worst of times. " * 40)
    (tmp_path / "mine.py").write_text(OWN)
    rows = {
        f"mnist:path={tmp_path}": "--model lenet",
        f"fashion-mnist:path={tmp_path}": "--model mine:linear:features=784 --alpha 0.5",
        f"cifar10:path={tmp_path}": "--model resnet20 --buffers average --autocast bfloat16",
        f"text:files={tmp_path / 'book.txt'},context=16": "--model gpt:layers=1,width=16 --optimizer adamw",
        "digits": "--model logistic --schedule step --uneven stop --strategy local --threads 1",
    }
    commands = [f"--name {i} --data {d} {rows[d]} --batch 4 --epochs 0.01" for i, d in enumerate(rows)]
    outputs = trained(tmp_path, 2, *commands, prelude=SMALL_CIFAR)
    for name, (data, text) in enumerate(zip(rows, outputs, strict=True)):
        assert f"\n{data}" in text and f"over 2 ranks on 1 node, {torch.get_default_device().type}" in text
        found = records(tmp_path / str(name))
        assert {record["event"] for record in found} == {"train", "test"}
        assert all(np.isfinite(record["loss"]) and 0 <= record["accuracy"] <= 1 for record in found)


@pytest.mark.long
@pytest.mark.timeout(170)
def test_the_defaults_learn_digits(tmp_path: Path) -> None:
    trained(tmp_path, 4, "--name run")
    last = records(tmp_path / "run", "test")[-1]
    assert last["epoch"] == 20 and last["accuracy"] >= 0.95, last
