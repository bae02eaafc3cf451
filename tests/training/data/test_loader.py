from __future__ import annotations

import importlib.util
import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hpcsgd.errors import BadOption, HpcsgdError
from hpcsgd.training.data import load
from hpcsgd.training.data.augment import crop_and_flip
from hpcsgd.training.data.in_memory import TensorSource
from hpcsgd.training.data.loader import Loader
from hpcsgd.training.data.rng_streams import preserve_python_random

IMAGES = TensorSource(
    torch.arange(50 * 3 * 6 * 6, dtype=torch.float32).view(50, 3, 6, 6), torch.arange(50) % 5
)


def loader(**options: Any) -> Loader:
    return Loader(IMAGES, **({"batch": 8, "seed": 4, "augment": crop_and_flip} | options))


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(u, v) for p, q in zip(a, b, strict=True) for u, v in zip(p, q, strict=True)
    )


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.3])
def test_an_epoch_has_every_sample_once_in_len_batches(alpha: float | None, drop_last: bool) -> None:
    source = TensorSource(torch.arange(50), torch.arange(50) % 5)
    seen: list[int] = []
    for rank in range(3):
        own = Loader(source, 4, rank, 3, alpha, drop_last=drop_last)
        batches = [x.tolist() for x, _ in own]
        assert len(batches) == len(own)
        sizes = {len(batch) for batch in (batches if drop_last else batches[:-1])}
        assert sizes <= {4}
        seen += itertools.chain(*batches)
    assert len(seen) == len(set(seen))
    assert drop_last or len(seen) == 50


def test_each_iteration_is_the_next_epoch() -> None:
    own = loader()
    first, second = list(own), list(own)
    assert own.epoch == 2
    assert not same(first, second)
    again = loader()
    assert same(first, list(again)) and same(second, list(again))


@pytest.mark.parametrize("alpha", [None, 0.3])
@pytest.mark.parametrize("steps", [0, 1, 3, 7, 8, 11])
def test_resuming_gives_the_same_bits(steps: int, alpha: float | None) -> None:
    options = {"rank": 1, "ranks": 2, "alpha": alpha, "batch": 4}

    def stream(own: Loader) -> Any:
        while True:
            yield from own

    straight = list(itertools.islice(stream(loader(**options)), 20))
    stopped = loader(**options)
    head = list(itertools.islice(stream(stopped), steps))
    resumed = loader(**options)
    resumed.load_state_dict(stopped.state_dict())
    remaining = len(resumed)
    rest = list(resumed)
    assert len(rest) == remaining
    rest += itertools.islice(stream(resumed), 20 - len(rest) - steps)
    assert same(straight, head + rest[: 20 - steps])


def test_the_position_is_the_one_after_the_last_batch() -> None:
    own = loader(batch=20)
    positions = [own.state_dict() for _ in own]
    assert positions == [
        {"epoch": 0, "batch": 1},
        {"epoch": 0, "batch": 2},
        {"epoch": 1, "batch": 0},
    ]


def test_leaving_early_ends_the_epoch_but_not_its_position() -> None:
    own = loader(batch=10)
    for _ in own:
        break
    assert own.state_dict() == {"epoch": 0, "batch": 1}
    expected = loader(batch=10)
    expected.load_state_dict({"epoch": 1, "batch": 0})
    assert len(own) == 5 and same(list(own), list(expected))


def test_len_after_leaving_a_resumed_epoch_is_that_of_the_next() -> None:
    own = loader(batch=10)
    own.load_state_dict({"epoch": 0, "batch": 3})
    lengths = [len(own)]
    for _ in own:
        lengths.append(len(own))
        break
    lengths.append(len(own))
    assert lengths == [2, 2, 5] and len(list(own)) == 5


def test_augmentation_differs_by_seed_rank_epoch_and_batch() -> None:
    x = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0)).expand(32, 3, 6, 6)
    source = TensorSource(x, torch.zeros(32, dtype=torch.long))
    batches: list[Tensor] = []
    for seed, rank in itertools.product((0, 1), (0, 1)):
        own = Loader(source, 8, rank, 2, seed=seed, augment=crop_and_flip)
        batches += [images for _ in range(2) for images, _ in own]
    assert len(batches) == 16
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(batches, 2))


def test_augmented_images_are_shifted_and_mirrored_windows() -> None:
    x = torch.rand(64, 2, 5, 7, generator=torch.Generator().manual_seed(0)) + 1
    augmented = crop_and_flip(x, torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    mirrored = 0
    for image, frame in zip(augmented, padded, strict=True):
        windows = [frame[:, r : r + 5, c : c + 7] for r in range(9) for c in range(9)]
        plain = any(torch.equal(image, window) for window in windows)
        flipped = any(torch.equal(image, window.flip(2)) for window in windows)
        assert plain or flipped
        mirrored += flipped
    assert 16 < mirrored < 48


@pytest.mark.parametrize("state", [(0, 7), (-1, 0), (0, -1)])
def test_a_position_that_does_not_exist_is_refused(state: tuple[int, int]) -> None:
    with pytest.raises(HpcsgdError, match="batch 0 to 6"):
        loader().load_state_dict(dict(zip(("epoch", "batch"), state, strict=True)))


def test_bad_options_are_refused() -> None:
    for options, message in [
        ({"rank": 2, "ranks": 2}, "0 to 1"),
        ({"ranks": 51}, "1 to 50 ranks"),
        ({"batch": 26, "ranks": 2, "drop_last": True}, "at most 25"),
    ]:
        with pytest.raises(BadOption, match=message):
            loader(**options)
    language = TensorSource(torch.zeros(8, 4), torch.zeros(8, 4))
    with pytest.raises(BadOption, match="no classes"):
        Loader(language, 2, alpha=0.1)


def test_importing_a_library_leaves_the_random_state() -> None:
    before = random.getstate()
    with preserve_python_random():
        random.random()  # as torchvision does
    assert random.getstate() == before


def test_digits_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.datasets import load_digits

    def ordered(x: Tensor, y: Tensor) -> list[list[float]]:
        return sorted(torch.cat([x.flatten(1), y.float().unsqueeze(1)], 1).tolist())

    data = load("digits")
    parts = [source.batch(torch.arange(len(source))) for source in (data.train, data.test)]
    pixels, target = load_digits(return_X_y=True)
    expected = ordered(torch.from_numpy(pixels / 16).float(), torch.from_numpy(target))
    assert ordered(*map(torch.cat, zip(*parts, strict=True))) == expected
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(HpcsgdError, match=r"got: +no package sklearn"):
        load("digits")


@pytest.mark.parametrize("name", ["digits", "text:limit=0.2", "synthetic:samples=64"])
def test_global_random_states_are_neither_used_nor_changed(name: str) -> None:
    def run() -> list[tuple[Tensor, Tensor]]:
        data = load(name)
        alpha = None if data.train.labels is None else 0.5
        own = Loader(data.train, 16, 1, 2, alpha, seed=3)
        return [next(iter(own)), data.test.batch(torch.arange(3)), *list(loader())]

    def states() -> tuple[Any, ...]:
        numpy = np.random.get_state()  # noqa: NPY002
        return random.getstate(), numpy[1].tobytes(), numpy[2], torch.get_rng_state().tolist()

    before = states()
    first = run()
    assert states() == before
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert same(first, run())
