"""Sweeps: a table for each run, on top of the common settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcsgd.commands.train.settings import from_toml, merge
from hpcsgd.errors import BadOption

SWEEP = 'epochs = 2\nseed = 5\n[[run]]\nseed = 1\n[[run]]\nstrategy = "local:period=4"\nclip = "none"\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP)
    return path


def test_a_run_has_its_own_settings_over_the_common_ones(path: Path) -> None:
    first, second = (merge(from_toml(path, element), {}) for element in range(2))
    assert (first.epochs, first.seed, first.strategy) == (2.0, 1, "allreduce")
    assert (second.epochs, second.seed, second.strategy, second.clip) == (2.0, 5, "local:period=4", None)


@pytest.mark.parametrize("element", [None, -1, 2])
def test_element_is_required_and_must_exist(path: Path, element: int | None) -> None:
    with pytest.raises(BadOption, match="--element 0 to 1"):
        from_toml(path, element)


def test_what_is_no_sweep(path: Path) -> None:
    path.write_text("seed = 1\n")
    assert from_toml(path) == {"seed": 1}
    with pytest.raises(BadOption, match=r"\[\[run\]\]"):
        from_toml(path, 0)
    for text in ("run = 3\n", "run = [1]\n", "[run]\nseed = 1\n"):
        path.write_text(text)
        with pytest.raises(BadOption, match=r"\[\[run\]\]"):
            from_toml(path, 0)


def test_a_wrong_setting_of_one_run_is_named(path: Path) -> None:
    path.write_text("[[run]]\nseed = 1\n[[run]]\nsed = 1\n")
    assert from_toml(path, 0) == {"seed": 1}
    with pytest.raises(BadOption, match="unknown option 'sed'"):
        from_toml(path, 1)
