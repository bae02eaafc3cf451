"""Labels: short, unique, and made of the settings that differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpcsgd.commands.report.labels import MAX_LENGTH, curve_labels, labels
from hpcsgd.commands.report.run_reader import load
from hpcsgd.commands.report.words import in_words
from tests.support.sample_run_folders import usual, write_run


def names(tmp_path: Path, *configs: dict[str, Any]) -> list[str]:
    return labels([load(write_run(tmp_path / f"r{i}", **c)) for i, c in enumerate(configs)])


def test_one_run_has_its_folders_name(tmp_path: Path) -> None:
    assert names(tmp_path, {}) == ["r0"]


def test_strategy_is_shown_without_its_key(tmp_path: Path) -> None:
    both = names(tmp_path, {}, {"strategy": "local:period=8"})
    assert both == ["all-reduce", "local SGD, period 8"]


def test_other_settings_come_with_their_key(tmp_path: Path) -> None:
    both = names(tmp_path, {"batch": 64, "nesterov": True}, {"strategy": "lasgd"})
    assert both == ["all-reduce, batch 64, nesterov", "LASGD, batch 32"]


def test_settings_in_a_table_count(tmp_path: Path) -> None:
    runs = [load(write_run(tmp_path / str(n), usual(ranks=n))) for n in (2, 4)]
    assert labels(runs) == ["2 ranks", "4 ranks"]


def test_equal_runs_fall_back_to_folders(tmp_path: Path) -> None:
    assert names(tmp_path, {}, {}) == ["r0", "r1"]
    same = [load(write_run(tmp_path / parent / "run")) for parent in "ab"]
    assert labels(same) == ["a/run", "b/run"]


def test_runs_that_stay_alike_get_their_folder_beside(tmp_path: Path) -> None:
    three = names(tmp_path, {}, {}, {"strategy": "lasgd"})
    assert three == ["all-reduce (r0)", "all-reduce (r1)", "LASGD"]


def test_a_label_has_the_settings_that_fit_and_the_folder(tmp_path: Path) -> None:
    assert names(tmp_path, {"strategy": "x" * (MAX_LENGTH + 1)}, {}) == ["r0", "all-reduce"]
    long = {"note": "y" * MAX_LENGTH}
    assert names(tmp_path / "long", long, {"strategy": "lasgd"}) == ["all-reduce (r0)", "LASGD"]


def test_usual_values_are_left_out(tmp_path: Path) -> None:
    rates = [{"learning_rate": rate, "seed": seed} for rate, seed in ((0.1, 1), (0.1, 1), (0.2, 2))]
    rows = [{"strategy": f"local:period={period}", **rate} for period, rate in enumerate(rates, 1)]
    local = "local SGD, period"
    assert names(tmp_path, *rows) == [f"{local} 1", f"{local} 2", f"{local} 3, seed 2, learning rate 0.2"]


def test_runs_of_several_tasks_are_compared_within_each(tmp_path: Path) -> None:
    configs = [
        {"strategy": "lasgd"},
        {},
        {"data": "text", "model": "", "batch": 8},
        {"data": "text", "model": "gpt", "batch": 8, "compress": "ef+maxnorm:bits=4"},
    ]
    runs = [load(write_run(tmp_path / f"r{i}", **config)) for i, config in enumerate(configs)]
    curves = ["LASGD", "all-reduce", "all-reduce", "all-reduce, MaxNorm, 4 bits, error feedback"]
    tasks = ["digits · mlp"] * 2 + ["text · GPT"] * 2
    assert curve_labels(runs) == curves
    assert labels(runs) == [f"{curve} · {task}" for curve, task in zip(curves, tasks, strict=True)]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("allreduce", "all-reduce"),
        ("lasgd:period=auto,max_lag=none", "LASGD, period auto, no max lag"),
        ("dsgd:topology=ring,overlap=no", "D-SGD, topology ring, no overlap"),
        ("ps:servers=1,groups=4,lease=10.0", "parameter server, 1 server, 4 groups, lease 10"),
        ("ef+hadamard+topk:ratio=0.01", "top-k, ratio 0.01, error feedback, rotation"),
        ("module:callable", "module:callable"),
        ("a+b, c", "a+b, c"),
        ("", ""),
    ],
)
def test_specs_in_words(spec: str, words: str) -> None:
    assert in_words(spec) == words
