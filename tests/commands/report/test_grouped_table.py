"""The grouped table: runs that differ in the seed are one row."""

from __future__ import annotations

import io
import statistics
from pathlib import Path

import pytest
from rich.console import Console

from hpcsgd.commands.report.grouped_table import grouped
from hpcsgd.commands.report.run_reader import load
from hpcsgd.errors import BadOption
from tests.support.sample_run_folders import test as tested
from tests.support.sample_run_folders import train, write_run


def printed(*arguments: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(grouped(*arguments))  # type: ignore[arg-type]
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_runs_that_differ_in_the_seed_alone_make_one_row(tmp_path: Path) -> None:
    accuracies = {"a": [0.5, 0.6, 0.8], "b": [0.25]}
    runs = [
        load(
            write_run(
                tmp_path / f"{strategy}{seed}",
                [train(10), tested(10, accuracy=accuracy)],
                strategy=strategy,
                seed=seed,
            )
        )
        for strategy, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]
    lines = printed(runs, "seed").splitlines()
    row_a, row_b = (next(line for line in lines if line.startswith(f"│ {name} ")) for name in "ab")
    spread = statistics.stdev([50, 60, 80])
    assert f"{statistics.fmean([50, 60, 80]):.4g} ± {spread:.2g}" in row_a
    assert "│    3 │" in row_a and "│    1 │" in row_b
    assert "25" in row_b and "±" not in row_b


def test_unknown_setting_raises_and_lists_the_settings(tmp_path: Path) -> None:
    run = load(write_run(tmp_path / "run"))
    with pytest.raises(BadOption, match=r"no run has a setting 'sed'(.|\n)*seed"):
        grouped([run], "sed")
