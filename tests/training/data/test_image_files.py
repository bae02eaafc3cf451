from __future__ import annotations

import gzip
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hpcsgd.errors import HpcsgdError
from hpcsgd.training.data import load
from hpcsgd.training.data.base import Data
from hpcsgd.training.data.cifar import CIFAR10, CIFAR100, BinaryVersion, read
from hpcsgd.training.data.imagenet import ImageSource, crop_box
from hpcsgd.training.data.loader import Loader

RANDOM = np.random.default_rng(0)


def idx(array: np.ndarray[Any, Any]) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, pack: Callable[[bytes], bytes] = bytes, suffix: str = "") -> Any:
    arrays = {}
    for part, count in (("train", 30), ("t10k", 20)):
        arrays[f"{part}-images-idx3-ubyte"] = RANDOM.integers(0, 256, (count, 28, 28))
        arrays[f"{part}-labels-idx1-ubyte"] = np.arange(count) % 10
    for name, array in arrays.items():
        (folder / (name + suffix)).write_bytes(pack(idx(array)))
    return arrays


@pytest.mark.parametrize(("pack", "suffix"), [(bytes, ""), (gzip.compress, ".gz")])
@pytest.mark.parametrize(
    ("name", "mean", "std"), [("mnist", 0.1307, 0.3081), ("fashion-mnist", 0.286, 0.353)]
)
def test_idx_files_are_read(
    tmp_path: Path, name: str, mean: float, std: float, pack: Any, suffix: str
) -> None:
    arrays = write_mnist(tmp_path, pack, suffix)
    data = load(f"{name}:path={tmp_path}")
    assert data.shape == (1, 28, 28) and (len(data.train), len(data.test)) == (30, 20)
    x, y = data.test.batch(torch.tensor([7, 0]))
    pixels = torch.from_numpy(arrays["t10k-images-idx3-ubyte"][[7, 0]]).unsqueeze(1)
    torch.testing.assert_close(x, ((pixels / 255 - mean) / std).float())
    assert y.tolist() == [7, 0]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: content[:10],
        lambda content: b"",
        lambda content: b"\0\0\x0d\x03" + content[4:],
        lambda content: content[:4] + b"\xff\xff\xff\xff" + content[8:],
        lambda content: content[:11] + b"\x1d" + content[12:],
    ],
)
def test_a_damaged_idx_file_is_an_error(tmp_path: Path, damage: Any, suffix: str) -> None:
    pack = gzip.compress if suffix else bytes
    write_mnist(tmp_path, pack, suffix)
    file = tmp_path / f"train-images-idx3-ubyte{suffix}"
    content = gzip.decompress(file.read_bytes()) if suffix else file.read_bytes()
    file.write_bytes(pack(damage(content)))
    with pytest.raises(HpcsgdError, match=r"train-images-idx3-ubyte.* is truncated, corrupt"):
        load(f"mnist:path={tmp_path}")


@pytest.mark.parametrize("damage", [lambda z: z[:-9], lambda z: b"x" + z, lambda z: z[:60] + z[80:]])
def test_a_damaged_gz_file_is_an_error(tmp_path: Path, damage: Any) -> None:
    write_mnist(tmp_path, gzip.compress, ".gz")
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(HpcsgdError, match="is truncated, corrupt"):
        load(f"mnist:path={tmp_path}")


@pytest.mark.parametrize("labels", [np.arange(29) % 10, np.full(30, 10), np.zeros(0)])
def test_labels_that_do_not_fit_are_an_error(tmp_path: Path, labels: Any) -> None:
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(HpcsgdError, match="30 labels of 0 to 9"):
        load(f"mnist:path={tmp_path}")


def small(version: BinaryVersion) -> BinaryVersion:
    return replace(version, records=dict.fromkeys(version.records, 6))


def write_cifar(folder: Path, version: BinaryVersion) -> dict[str, np.ndarray[Any, Any]]:
    folder.mkdir(exist_ok=True)
    contents = {}
    for name, count in version.records.items():
        records = RANDOM.integers(0, 256, (count, version.labels + 3072)).astype(np.uint8)
        records[:, : version.labels] = RANDOM.integers(0, version.classes, (count, version.labels))
        records.tofile(folder / name)
        contents[name] = records
    return contents


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("version", [CIFAR10, CIFAR100], ids=["cifar10", "cifar100"])
def test_cifar_is_read(tmp_path: Path, version: BinaryVersion, below: bool) -> None:
    version = small(version)
    contents = write_cifar(tmp_path / version.folder if below else tmp_path, version)
    data = read(tmp_path, version)
    assert data.shape == (3, 32, 32) and data.augment is not None
    for source, names in ((data.train, version.train), (data.test, version.test)):
        records = np.concatenate([contents[name] for name in names])
        x, y = source.batch(torch.arange(len(source)))
        assert y.tolist() == records[:, version.labels - 1].tolist()
        pixels = torch.from_numpy(records[:, version.labels :].reshape(-1, 3, 32, 32) / 255)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (version.mean, version.std))
        torch.testing.assert_close(x, ((pixels - mean) / std).float())


def test_the_published_sizes() -> None:
    for version in (CIFAR10, CIFAR100):
        counts = [sum(version.records[n] for n in names) for names in (version.train, version.test)]
        assert counts == [50_000, 10_000]
        assert set(version.records) == {*version.train, *version.test}


@pytest.mark.parametrize("change", [-1, 1, -3073, 3073])
def test_a_cifar_file_of_another_size_is_an_error(tmp_path: Path, change: int) -> None:
    version = small(CIFAR10)
    write_cifar(tmp_path, version)
    file = tmp_path / "data_batch_3.bin"
    content = file.read_bytes()
    file.write_bytes(content[:change] if change < 0 else content + bytes(change))
    with pytest.raises(HpcsgdError, match=r"data_batch_3\.bin is truncated, corrupt"):
        read(tmp_path, version)


def test_a_cifar_label_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    version = small(CIFAR10)
    records = write_cifar(tmp_path, version)["test_batch.bin"]
    records[4, 0] = 10
    records.tofile(tmp_path / "test_batch.bin")
    with pytest.raises(HpcsgdError, match="labels below 10"):
        read(tmp_path, version)


@pytest.mark.parametrize("size", [(500, 375), (300, 400), (1, 1), (3, 900), (900, 3), (224, 224)])
def test_random_crops_lie_inside_the_image(size: tuple[int, int]) -> None:
    width, height = size
    for draw in torch.rand(200, 10, 4, generator=torch.Generator().manual_seed(0)):
        left, top, right, bottom = crop_box(width, height, draw)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        if min(size) > 100:
            assert 0.07 < (right - left) * (bottom - top) / (width * height) <= 1
            assert 0.72 < (right - left) / (bottom - top) < 1.38


def pictures(sizes: list[tuple[int, int]]) -> SimpleNamespace:
    """A stand-in for ImageFolder with pictures in memory: red grows to the right, green downwards."""
    image = pytest.importorskip("PIL.Image")

    def draw(name: str) -> Any:
        if name == "broken":
            raise OSError("cannot identify image file")
        width, height = sizes[int(name)]
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0] = np.linspace(0, 255, width)[None, :]
        pixels[..., 1] = np.linspace(0, 255, height)[:, None]
        return image.fromarray(pixels)

    samples = [(str(i), i % 2) for i in range(len(sizes))] + [("broken", 0)]
    return SimpleNamespace(samples=samples, targets=[t for _, t in samples], loader=draw)


def test_images_are_decoded_to_one_size() -> None:
    sizes = [(300, 400), (640, 256), (224, 224), (90, 50)]
    with ThreadPoolExecutor(3) as pool:
        source = ImageSource(pictures(sizes), pool)
        x, y = source.batch(torch.tensor([0, 1, 2, 3]))
        assert x.shape == (4, 3, 224, 224) and y.tolist() == [0, 1, 0, 1]
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        center = x[:, :, 111:113, 111:113].mean((2, 3)) * std + mean
        torch.testing.assert_close(center[:, :2], torch.full((4, 2), 0.5), atol=0.01, rtol=0)
        assert torch.equal(source.batch(torch.arange(4))[0], x)
        with pytest.raises(HpcsgdError, match="cannot decode broken"):
            source.batch(torch.tensor([4]))


def test_crops_are_a_function_of_the_loaders_position() -> None:
    folder = pictures([(300, 400)] * 12)
    folder.samples.pop(), folder.targets.pop()
    with ThreadPoolExecutor(3) as pool:
        batches = list(Loader(ImageSource(folder, pool), 4, seed=1))
        resumed = Loader(ImageSource(folder, pool), 4, seed=1)
        resumed.load_state_dict({"epoch": 0, "batch": 1})
        for (x, _), (again, _) in zip(batches[1:], resumed, strict=True):
            assert torch.equal(x, again)
        first = torch.cat([x for x, _ in batches])
        assert not any(torch.equal(first[i], first[j]) for i in range(12) for j in range(i))
        rising = (first[:, 0, 112, -1] > first[:, 0, 112, 0]).sum()
        assert 0 < int(rising) < 12


def test_imagenet_folders(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    image = pytest.importorskip("PIL.Image")

    def write(part: str, classes: list[str]) -> None:
        for label in classes:
            (tmp_path / part / label).mkdir(parents=True)
            for number in range(3):
                image.new("RGB", (60, 40)).save(tmp_path / part / label / f"{number}.jpeg")

    with pytest.raises(HpcsgdError, match="folders train and val"):
        load(f"imagenet:path={tmp_path}")
    write("train", ["n1", "n2"])
    write("val", ["n1"])
    with pytest.raises(HpcsgdError, match="n2"):
        load(f"imagenet:path={tmp_path}")
    write("val", ["n2"])
    data: Data = load(f"imagenet:path={tmp_path},workers=2")
    assert data.classes == 2 and (len(data.train), len(data.test)) == (6, 6)
    assert data.train.labels is not None and data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert [x.shape for x, _ in Loader(data.train, 4)] == [(4, 3, 224, 224), (2, 3, 224, 224)]
