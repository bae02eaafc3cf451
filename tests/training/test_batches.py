"""One number of steps for all ranks; see also the contract of strategies."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from hpcsgd.errors import HpcsgdError
from hpcsgd.strategies import Setting
from hpcsgd.training.batches import in_step


def setting_among(others: list[tuple[int | None, bool]], rank: int = 0) -> Any:
    """A setting whose world has other ranks with (length, repeatable) loaders, and says what they say."""
    answers = [iter([[other], *(step < (other[0] or 0) for step in range(9))]) for other in others]

    def gather(mine: object, what: str = "") -> list[object]:
        told = [next(answer) for answer in answers]
        return [*told[:rank], mine, *told[rank:]]

    world: Any = SimpleNamespace(rank=rank, size=len(others) + 1, gather=gather)
    return Setting(world, [], 4.0, "auto", "zeros")


class Refillable(list[str]):
    """Batches of a rank that can tell what it would repeat."""

    def filler(self) -> str:
        return "filler"


def steps(setting: Any, loader: Any, uneven: str = "join") -> list[tuple[str, int, int]]:
    """Each batch, its weight, and how many ranks have one of their own."""
    found = []
    for batch in in_step([loader], setting, uneven):
        found.append((batch, setting.weight, setting.active))
        setting.begin_step()
    return found


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_that_has_run_out_repeats_its_last_batch_with_weight_0(rank: int) -> None:
    setting = setting_among([(4, False), (3, False)], rank)
    assert steps(setting, ["a", "b"]) == [("a", 1, 3), ("b", 1, 3), ("b", 0, 2), ("b", 0, 1)]


def test_a_rank_that_resumes_where_it_had_run_out_is_given_its_filler() -> None:
    assert steps(setting_among([(2, True)]), Refillable()) == [("filler", 0, 1)] * 2
    assert steps(setting_among([(2, True)]), Refillable("a")) == [("a", 1, 2), ("a", 0, 1)]
    with pytest.raises(HpcsgdError, match="rank 0: the loader has no batch"):
        steps(setting_among([(2, True)]), [])


def test_stop_ends_with_the_first_that_runs_out() -> None:
    assert steps(setting_among([(1, False)]), ["a", "b"], "stop") == [("a", 1, 2)]
    assert steps(setting_among([(3, False)]), ["a", "b"], "stop") == [("a", 1, 2), ("b", 1, 2)]
    assert steps(setting_among([(3, False)]), [], "stop") == []


def test_without_a_length_the_ranks_ask_before_each_step() -> None:
    unsized = (text for text in "ab")
    assert steps(setting_among([(3, False)]), unsized) == [("a", 1, 2), ("b", 1, 2), ("b", 0, 1)]


def test_the_first_batch_of_a_step_decides_its_weight() -> None:
    setting = setting_among([(4, False)])
    weights = []
    for count, _ in enumerate(in_step([["a"]], setting, "join"), 1):
        weights.append(setting.weight)
        if count % 2 == 0:
            setting.begin_step()
    assert weights == [1, 1, 0, 0]


def test_leaving_the_loop_forgets_the_weight() -> None:
    setting = setting_among([(4, False)])
    batches: Any = in_step([["a"]], setting, "join")
    assert [next(batches), next(batches)] == ["a", "a"]
    setting.begin_step()
    next(batches)
    assert setting.weight == 0
    batches.close()
    assert (setting.weight, setting.active) == (1, 2)


@pytest.mark.parametrize(
    ("workers", "context", "warned"), [(1, None, True), (1, "spawn", False), (0, None, False)]
)
def test_forked_workers_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, workers: int, context: str | None, warned: bool
) -> None:
    monkeypatch.setattr("multiprocessing.get_start_method", lambda: "fork")
    data = TensorDataset(torch.zeros(2, 1))
    loader: Any = DataLoader(data, num_workers=workers, multiprocessing_context=context)
    monkeypatch.setattr(loader, "_get_iterator", lambda: iter("ab"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(steps(setting_among([(2, False)]), loader)) == 2
    assert [w.category for w in caught] == [RuntimeWarning] * warned
    assert all("forkserver" in str(w.message) for w in caught)
