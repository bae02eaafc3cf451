from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from hpcsgd.errors import BadOption, HpcsgdError
from hpcsgd.training.data import DATASETS, load
from hpcsgd.training.data.base import Source
from hpcsgd.training.data.in_memory import TensorSource


def everything(source: Source) -> tuple[torch.Tensor, torch.Tensor]:
    return source.batch(torch.arange(len(source)))


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_uint8_stays_uint8_until_the_batch() -> None:
    pixels = torch.randint(0, 256, (9, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    source = TensorSource(pixels.byte(), torch.arange(9), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert source.x.dtype == torch.uint8
    x, y = source.batch(torch.tensor([4, 1, 4]))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    torch.testing.assert_close(x, (pixels[[4, 1, 4]] / 255 - mean) / std)
    assert x.dtype == torch.float32 and y.tolist() == [4, 1, 4]


def test_tensors_refuse_what_they_would_get_wrong() -> None:
    with pytest.raises(BadOption, match="differ in length"):
        TensorSource(torch.zeros(3), torch.zeros(2))
    with pytest.raises(BadOption, match="uint8 inputs only"):
        TensorSource(torch.zeros(3, 1, 2, 2), torch.zeros(3), (0.5,), (1.0,))


def test_labels_are_classes_or_none() -> None:
    x = torch.zeros(4, 2)
    labels = TensorSource(x, torch.tensor([1, 0, 2, 1], dtype=torch.int32)).labels
    assert labels is not None and labels.dtype == torch.int64 and labels.tolist() == [1, 0, 2, 1]
    assert TensorSource(x, x).labels is None
    assert TensorSource(x, torch.zeros(4)).labels is None


def test_digits_are_split_by_class() -> None:
    data = load("digits")
    (x, y), (test_x, test_y) = everything(data.train), everything(data.test)
    assert len(y) + len(test_y) == 1797
    assert x.shape[1:] == data.shape and x.dtype == torch.float32
    assert float(x.min()) == 0 and float(x.max()) == 1
    shares = test_y.bincount(minlength=10) / torch.cat([y, test_y]).bincount(minlength=10)
    assert bool(((shares > 0.19) & (shares <= 0.2)).all())
    assert torch.equal(everything(load("digits:seed=0").test)[0], test_x)
    assert not torch.equal(everything(load("digits:seed=1").test)[0], test_x)


def test_synthetic_clusters_can_be_learned() -> None:
    data = load("synthetic:shape=3x8x8,classes=7,samples=350,seed=5")
    assert data.shape == (3, 8, 8) and data.classes == 7
    (x, y), (test_x, test_y) = everything(data.train), everything(data.test)
    assert x.shape == (350, 3, 8, 8) and len(test_y) == 87
    centres = torch.stack([x[y == label].mean(0) for label in range(7)]).flatten(1)
    nearest = torch.cdist(test_x.flatten(1), centres).argmin(1)
    assert float((nearest == test_y).float().mean()) > 0.95
    assert not torch.equal(test_x[0], x[0])


def test_synthetic_data_that_cannot_be_is_refused() -> None:
    for options in ("samples=3", "samples=1000000,shape=3x64x64"):
        with pytest.raises(BadOption, match="too few or too many samples"):
            load(f"synthetic:{options}")


def test_windows_tile_the_text_and_targets_are_shifted_by_one(tmp_path: Path) -> None:
    text = bytes(range(97, 123)) * 40
    write(tmp_path, {"only.txt": text})
    data = load(f"text:files={tmp_path / 'only.txt'},context=16")
    assert data.kind == "language" and data.shape == (16,) and data.classes == 26
    x, y = everything(data.train)
    assert x.dtype == y.dtype == torch.int64
    read = bytes((x.flatten() + 97).tolist())
    assert read == text[: len(read)] and len(text) * 0.9 - 17 <= len(read) <= len(text) * 0.9
    assert torch.equal(x.flatten()[1:], y.flatten()[:-1])
    assert data.train.labels is None
    one_x, one_y = data.train.batch(torch.tensor([3]))
    assert torch.equal(one_x[0], x[3]) and torch.equal(one_y[0], y[3])


def test_whole_files_are_held_out(tmp_path: Path) -> None:
    names = {chr(97 + i): bytes([97 + i]) * 400 for i in range(20)}
    write(
        tmp_path,
        {f"{i % 3}/{name}.txt": content for i, (name, content) in enumerate(names.items())},
    )
    write(tmp_path, {f"copies/{name}": content for name, content in names.items()})
    write(tmp_path, {".hidden/x": b"\0" * 9999, "empty": b""})
    data = load(f"text:files={tmp_path},context=10")
    assert data.classes == 20
    train, test = (set(everything(s)[0].flatten().tolist()) for s in (data.train, data.test))
    assert not train & test and len(train | test) == 20 and len(test) == 2
    again = load(f"text:files={tmp_path}/**/*.txt,context=10")
    assert {len(again.train), len(again.test)} == {len(data.train), len(data.test)}


def test_the_split_does_not_depend_on_where_the_folder_is(tmp_path: Path) -> None:
    files = {f"{i}.txt": bytes([97 + i]) * 300 for i in range(12)}
    for place in ("here", "some/where/else"):
        write(tmp_path / place, files)
    here, there = (load(f"text:files={tmp_path / p}") for p in ("here", "some/where/else"))
    assert torch.equal(everything(here.test)[0], everything(there.test)[0])


def test_two_files_are_one_to_train_and_the_smaller_to_test(tmp_path: Path) -> None:
    write(tmp_path, {"a": b"a" * 500, "b": b"b" * 400})
    data = load(f"text:files={tmp_path}")
    assert everything(data.train)[0].unique().tolist() == [0]
    assert everything(data.test)[0].unique().tolist() == [1]


def test_limit_bounds_what_is_read() -> None:
    data = load("text:limit=0.5")
    length = (len(data.train) + len(data.test)) * 64
    assert 0.5e6 - 3 * 65 <= length <= 0.5e6
    assert data.classes <= 256


def test_text_that_is_missing_or_too_short_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HpcsgdError, match="no text files"):
        load(f"text:files={tmp_path}/none*")
    with pytest.raises(HpcsgdError, match="no text files"):
        load(f"text:files={tmp_path}")
    write(tmp_path, {"empty": b""})
    with pytest.raises(HpcsgdError, match="not enough text"):
        load(f"text:files={tmp_path}")
    write(tmp_path, {"short": b"to be or not to be"})
    with pytest.raises(HpcsgdError, match="not enough text"):
        load(f"text:files={tmp_path}")


def test_unknown_names_and_options_list_the_valid_ones() -> None:
    with pytest.raises(BadOption) as error:
        load("mnits")
    assert all(name in str(error.value) for name in DATASETS)
    with pytest.raises(BadOption, match="seed=int"):
        load("digits:sead=1")


def test_every_missing_file_is_named_with_where_to_get_it(tmp_path: Path) -> None:
    for name, file in [
        ("mnist", "t10k-labels-idx1-ubyte"),
        ("fashion-mnist", "train-images-idx3-ubyte"),
        ("cifar10", "data_batch_5.bin"),
        ("cifar100", "test.bin"),
    ]:
        with pytest.raises(HpcsgdError) as error:
            load(f"{name}:path={tmp_path}")
        for part in (file, str(tmp_path), "download", "path=FOLDER"):
            assert part in str(error.value)


def test_imagenet_without_torchvision_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(HpcsgdError, match="needs torchvision"):
        load("imagenet")
