"""Checkpoint files: the loaded state is the saved one, and any other file is refused."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpcsgd.training.checkpoint.files import Fault, read_manifest, read_state, write_manifest, write_state


def same(a: Any, b: Any) -> bool:
    """Compare two states bit for bit: types, order of keys, strides, NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        stored = (bytes(t.untyped_storage()) for t in (a, b))
        kinds = ((t.dtype, t.shape, t.stride(), t.storage_offset()) for t in (a, b))
        return len(set(stored)) == len(set(kinds)) == 1
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def there_and_back(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    return read_state(path, write_state(path, state))


def test_everything_in_a_state_survives(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
    dtypes = [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    ]
    state = {
        "tensors": [torch.tensor([0, 1, 3]).to(dtype) for dtype in dtypes],
        "special": torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.bfloat16),
        "shapes": [torch.tensor(1.5), torch.empty(0, 3), torch.ones(2, 3).t(), torch.arange(9)[3:]],
        "plain": [None, True, -1, 2**80, 0.1, float("-inf"), "text ü", (1, (2.5, None)), 1j],
        "nested": OrderedDict(a={"b": [{"c": {}}, []]}, n={0: "integer key", (1, 2): "pair"}),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "torch": [torch.float16, torch.device("cpu"), torch.Size([2])],
        "others": [Counter("aab"), {1, 2}, b"bytes"],
    }
    assert same(there_and_back(tmp_path / "a.pt", state), state)


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator, device="cpu")
    found = there_and_back(tmp_path / "a.pt", {"rng": generator.get_state()})
    again = torch.Generator()
    again.set_state(found["rng"])
    expected = torch.rand(4, generator=generator, device="cpu")
    assert torch.equal(torch.rand(4, generator=again, device="cpu"), expected)


def test_tensors_that_share_memory_share_it_again(tmp_path: Path) -> None:
    flat = torch.zeros(1000)
    views = {"a": flat[:400].view(20, 20), "b": flat[400:], "tied": flat[:400]}
    found = there_and_back(tmp_path / "a.pt", views)
    assert (tmp_path / "a.pt").stat().st_size < 2 * flat.nbytes
    found["a"].fill_(7)
    assert found["tied"].eq(7).all() and found["b"].eq(0).all()


def test_no_file_is_overwritten(tmp_path: Path) -> None:
    write_state(tmp_path / "a.pt", {})
    with pytest.raises(FileExistsError):
        write_state(tmp_path / "a.pt", {})


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    entry = write_state(tmp_path / "rank-0000.pt", {"weights": torch.arange(50.0)})
    body = {"format": 1, "files": {"rank-0000.pt": entry}, "meta": {"epoch": 0.1}}
    write_manifest(tmp_path, body)
    for path in (tmp_path / "rank-0000.pt", tmp_path / "manifest.json"):
        content = path.read_bytes()
        for place in range(len(content)):
            flipped = bytearray(content)
            flipped[place] ^= 1 << place % 8
            path.write_bytes(flipped)
            with pytest.raises(Fault, match=f"{path.name} is damaged"):
                read_state(tmp_path / "rank-0000.pt", read_manifest(tmp_path)["files"]["rank-0000.pt"])
        path.write_bytes(content)
    assert read_manifest(tmp_path) == body
    assert read_state(tmp_path / "rank-0000.pt", entry)["weights"].tolist() == [*range(50)]


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"sha256": 1}', b"{", b"\xff", b"3"])
def test_a_manifest_that_is_none_is_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(Fault, match=r"manifest\.json is damaged"):
        read_manifest(tmp_path)


def test_a_manifest_of_another_format_names_the_version_that_wrote_it(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"format": 2, "hpcsgd": "9.9"})
    with pytest.raises(Fault, match="has another format") as caught:
        read_manifest(tmp_path)
    assert (caught.value.expected, caught.value.got) == ("1", "2")
    assert "9.9" in str(caught.value.do)


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def write_pickle(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


def read_pickle(path: Path, **_: object) -> object:
    return pickle.loads(path.read_bytes())


@pytest.mark.parametrize(("dump", "load"), [(torch.save, torch.load), (write_pickle, read_pickle)])
def test_a_malicious_file_is_refused_and_not_run(
    tmp_path: Path, dump: Callable[..., None], load: Callable[..., object]
) -> None:
    file, marker = tmp_path / "a.pt", tmp_path / "marker"
    dump({"weights": Evil(marker)}, file)
    content = file.read_bytes()
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    with pytest.raises(Fault, match="is refused: it contains more than tensors and plain values") as e:
        read_state(file, entry)
    assert "weights_only" not in str(e.value)
    assert not marker.exists()
    load(file, weights_only=False)
    assert marker.exists(), "the file would have done no harm: this test shows nothing"


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.float64(1.0), "numpy.float64"),
        (np.zeros(3), "numpy.ndarray"),
        (Path("a"), "pathlib.PosixPath"),
        (test_no_file_is_overwritten, "builtins.function"),
        (lambda: None, "builtins.function"),
        (np.random.default_rng(0), "numpy.random._generator.Generator"),
        (torch.zeros(2, device="cpu").as_subclass(Tagged), "test_files.Tagged"),
    ],
)
def test_what_cannot_be_loaded_is_an_error_when_saving(tmp_path: Path, value: object, kind: str) -> None:
    with pytest.raises(Fault) as caught:
        write_state(tmp_path / "a.pt", {"optimizer": {"state": [0, {"seen": value}]}})
    assert caught.value.what.startswith("state['optimizer']['state'][1]['seen'] cannot be saved")
    assert str(caught.value.got).endswith(kind)
    assert not list(tmp_path.iterdir())


def test_attributes_and_keys_that_cannot_be_loaded_are_found(tmp_path: Path) -> None:
    tagged = torch.zeros(2)
    tagged.note = Path("a")  # type: ignore[attr-defined]
    with pytest.raises(Fault, match=r"^state\['w'\] cannot be saved"):
        write_state(tmp_path / "a.pt", {"w": tagged})
    with pytest.raises(Fault, match=r"^the key .*Path\('a'\) of state cannot be saved"):
        write_state(tmp_path / "a.pt", {Path("a"): 1})  # type: ignore[dict-item]


def test_a_fault_keeps_its_words_between_processes() -> None:
    fault = Fault("w", "e", "g", "d")
    copy = pickle.loads(pickle.dumps(fault))
    assert vars(copy) == vars(fault)
