"""`hpcsgd tune teleportation`: several numbers of active peers at once, and training with the best."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hpcsgd.commands.tune.teleportation import Point, best_number, powers_of_two
from hpcsgd.strategies.teleportation.tokens import Tokens
from tests.support.train_jobs import records, run_commands


class FakePeers:
    size, local = 9, range(9)
    world = SimpleNamespace(collectively=lambda action: action())


def test_groups_of_tokens_share_no_peer_and_average_apart() -> None:
    tokens = Tokens(FakePeers(), (1, 2, 4), "ring", 3)  # type: ignore[arg-type]
    for step in range(20):
        groups = [tokens.group(number, step) for number in range(3)]
        assert [len(group) for group in groups] == [1, 2, 4]
        assert sum(groups, ()) == tokens.holders(step) and len(set(sum(groups, ()))) == 7
        matrix = np.zeros((7, 7))
        for token, row in enumerate(tokens.rows(step)):
            for source, weight in row:
                matrix[token, source] = weight
        blocks = [slice(0, 1), slice(1, 3), slice(3, 7)]
        for first in blocks:
            np.testing.assert_allclose(matrix[first, first].sum(1), 1)
            for second in blocks:
                assert first == second or not matrix[first, second].any()


@pytest.mark.parametrize(
    ("size", "expected"), [(1, [1]), (2, [1]), (3, [1, 2]), (7, [1, 2, 4]), (8, [1, 2, 4])]
)
def test_powers_that_fit(size: int, expected: list[int]) -> None:
    assert powers_of_two(size) == expected


def test_the_smallest_last_loss_is_chosen_and_no_loss_is_none() -> None:
    def at(active: int, step: int, loss: float) -> Point:
        return Point(active, step, loss, 0.0, 0.0)

    assert best_number([at(1, 5, 0.1), at(2, 5, 0.2), at(1, 9, 0.3), at(2, 9, 0.2)]) == 2
    assert best_number([at(1, 9, 0.2), at(2, 9, 0.2)]) == 1
    assert best_number([at(1, 9, float("nan")), at(4, 9, 7.0)]) == 4


@pytest.mark.long
@pytest.mark.timeout(170)
def test_search_and_go_on(tmp_path: Path) -> None:
    given = f"tune teleportation --out {tmp_path} --virtual-nodes 4 --epochs 0.2 --batch 16 --name it"
    outcomes = run_commands(
        tmp_path,
        2,
        f"{given} --search-epochs 0.3 --go-on --strategy teleport:active=2x1,topology=ring".split(),
        f"{given}-of-another --strategy dsgd".split(),
        f"{given} --resume {tmp_path / 'it'}".split(),
        f"{given}-too-many --strategy teleport:active=3x2".split(),
    )
    searched, *refused = outcomes
    assert searched.codes == [0, 0], searched
    curve = records(tmp_path / "it", "tune")
    last = [point for point in curve if point["step"] == curve[-1]["step"]]
    assert sorted(point["active"] for point in last) == [1, 2]
    best = min(last, key=lambda point: point["loss"])["active"]
    assert f"teleport:active={best}" in searched.outs[0] and not searched.outs[1]
    followed = tmp_path / f"it-active-{best}"
    assert f'strategy = "teleport:active={best},topology=ring"' in (followed / "config.toml").read_text()
    assert records(followed, "test")[-1]["accuracy"] > 0
    words = ("has no number of active peers", "cannot be resumed", "at most 4")
    for outcome, word in zip(refused, words, strict=True):
        assert set(outcome.codes) <= {1, 2} and word in "".join(outcome.errs), outcome
