"""Labels: short, unique, and made of the settings that differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpcsgd.commands.report.labels import MAX_LENGTH, labels
from hpcsgd.commands.report.run_reader import load
from tests.support.sample_run_folders import usual, write_run


def names(tmp_path: Path, *configs: dict[str, Any]) -> list[str]:
    return labels([load(write_run(tmp_path / f"r{i}", **c)) for i, c in enumerate(configs)])


def test_one_run_has_its_folders_name(tmp_path: Path) -> None:
    assert names(tmp_path, {}) == ["r0"]


def test_strategy_is_shown_without_its_key(tmp_path: Path) -> None:
    both = names(tmp_path, {}, {"strategy": "local:period=8"})
    assert both == ["allreduce", "local:period=8"]


def test_other_settings_come_with_their_key(tmp_path: Path) -> None:
    both = names(tmp_path, {"batch": 64, "nesterov": True}, {"strategy": "lasgd"})
    assert both == ["allreduce, batch=64, nesterov=true", "lasgd, batch=32"]


def test_settings_in_a_table_count(tmp_path: Path) -> None:
    runs = [load(write_run(tmp_path / str(n), usual(ranks=n))) for n in (2, 4)]
    assert labels(runs) == ["ranks=2", "ranks=4"]


def test_equal_runs_fall_back_to_folders(tmp_path: Path) -> None:
    assert names(tmp_path, {}, {}) == ["r0", "r1"]
    same = [load(write_run(tmp_path / parent / "run")) for parent in "ab"]
    assert labels(same) == ["a/run", "b/run"]


def test_runs_that_stay_alike_get_their_folder_beside(tmp_path: Path) -> None:
    three = names(tmp_path, {}, {}, {"strategy": "lasgd"})
    assert three == ["allreduce (r0)", "allreduce (r1)", "lasgd"]


def test_too_long_a_name_falls_back_to_folders(tmp_path: Path) -> None:
    assert names(tmp_path, {"strategy": "x" * (MAX_LENGTH + 1)}, {}) == ["r0", "r1"]
