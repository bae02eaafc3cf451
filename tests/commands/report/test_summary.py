"""Summary: its numbers are those of the records."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from hpcsgd.commands.report.records import RunRecord
from hpcsgd.commands.report.run_reader import load
from hpcsgd.commands.report.summary import cells, common_target, summaries
from hpcsgd.commands.report.writer import tables
from tests.support.sample_run_folders import test as tested
from tests.support.sample_run_folders import train, usual, write_run


def test_numbers_equal_those_of_the_records(tmp_path: Path) -> None:
    rows = usual()
    rows[5] = tested(30, accuracy=0.99)
    (found,) = summaries([load(write_run(tmp_path / "run", rows))])
    tests = [row for row in rows if row["event"] == "test"]
    assert found.final_accuracy == tests[-1]["accuracy"]
    assert found.best_accuracy == max(row["accuracy"] for row in tests) == 0.99
    assert found.final_loss == tests[-1]["loss"]
    assert found.time == tests[-1]["time"]
    assert found.time_to_target == next(row["time"] for row in tests if row["accuracy"] >= 0.99)
    assert found.bytes_per_rank == 50_000 + 1.5 and not found.shared
    # Ranks compute 1, 2, 3 and 4 ms a step and wait for the last: 3 + 2 + 1 of 4 x 4 ms.
    assert found.waiting == pytest.approx(6 / 16)
    assert (found.slowest_rank, found.slowdown) == (3, pytest.approx(4 / 2.5))


def test_cells_and_terminal_table_write_those_numbers(tmp_path: Path) -> None:
    run = load(write_run(tmp_path / "run"))
    header, (row,) = cells([run])
    written = dict(zip(header, row, strict=True))
    assert written == {
        "Run": "run",
        "Final accuracy (%)": f"{100 * (1 - 1 / 51):.2f}",
        "Best accuracy (%)": f"{100 * (1 - 1 / 51):.2f}",
        "Final loss": f"{3 / 51:.5f}",
        "Time (s)": "5.0",
        "Time to 98.0% (s)": "5.0",
        "Bytes per rank (kB)": "50.0",
        "Compression (÷)": "—",
        "Waiting (%)": "37.5",
        "Slowest rank (÷ median)": "3 (1.60)",
    }
    assert all(cell in printed([run], 200) for cell in row)


def printed(runs: list[RunRecord], width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(*tables(runs, width), sep="")
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_a_narrow_terminal_gets_several_tables_and_no_broken_word(tmp_path: Path, width: int) -> None:
    runs = [load(write_run(tmp_path / name)) for name in ("20261129-222909-allreduce", "b")]
    header, rows = cells(runs)
    text = printed(runs, width)
    assert all(len(line) <= width for line in text.splitlines())
    words = set(re.findall(r"[^\s┃│]+", text))
    assert words >= {word for line in [header, *rows] for cell in line for word in cell.split()}
    assert text.count("┏") == text.count("20261129-222909-allreduce") == {60: 4, 80: 2, 100: 2}.get(width, 1)


def test_a_label_is_no_markup_for_the_terminal(tmp_path: Path) -> None:
    assert "[red]run" in printed([load(write_run(tmp_path / "[red]run"))], 200)


def test_a_target_on_a_half_point_counts_as_reached(tmp_path: Path) -> None:
    for points in range(1, 201):
        run = load(write_run(tmp_path / f"{points}", [tested(1, accuracy=points / 200)]))
        assert common_target([run]) == points / 200
        assert summaries([run])[0].time_to_target == run.test.time[0]


def test_the_target_is_what_the_worst_run_reaches(tmp_path: Path) -> None:
    good = load(write_run(tmp_path / "good", [tested(s, accuracy=s / 100) for s in (80, 90, 97)]))
    poor = load(write_run(tmp_path / "poor", [tested(s, accuracy=s / 100) for s in (50, 81)]))
    poor_best = load(write_run(tmp_path / "best", [tested(1, accuracy=0.8149)]))
    assert common_target([good, poor]) == 0.81
    assert common_target([good, poor_best]) == 0.81
    assert [row.time_to_target for row in summaries([good, poor])] == [9.05, 8.15]


def test_a_run_on_one_node_counts_shared_memory(tmp_path: Path) -> None:
    rows = usual(bytes_sent=[0] * 4, bytes_shared=[2000, 4000, 6000, 8000])
    run = load(write_run(tmp_path / "run", rows))
    (found,) = summaries([run])
    assert found.shared and found.bytes_per_rank == 5000
    assert "5.0 shared" in cells([run])[1][0]


def test_unrecorded_values_are_none(tmp_path: Path) -> None:
    only_train = load(write_run(tmp_path / "train", [train(1)]))
    only_test = load(write_run(tmp_path / "test", [tested(1, accuracy=math.nan, loss=math.nan)]))
    first, second = summaries([only_train, only_test])
    assert first.final_accuracy is first.best_accuracy is first.time_to_target is None
    assert second.best_accuracy is second.waiting is second.slowest_rank is None
    assert second.final_loss is not None and np.isnan(second.final_loss)
    _, rows = cells([only_train, only_test])
    assert rows[0].count("—") == 5 and rows[1].count("nan") == 2


def test_one_rank_is_not_the_slowest(tmp_path: Path) -> None:
    (found,) = summaries([load(write_run(tmp_path / "run", usual(ranks=1)))])
    assert found.slowest_rank is None and found.waiting == 0
