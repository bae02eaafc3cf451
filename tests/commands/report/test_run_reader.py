"""The run reader: records are read as written, and corrupt files are named."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from hpcsgd.commands.report.records import Columns
from hpcsgd.commands.report.run_reader import load
from hpcsgd.errors import HpcsgdError
from tests.support.sample_run_folders import test as tested
from tests.support.sample_run_folders import train, usual, write_run


def rows_of(columns: Columns, event: str) -> list[dict[str, object]]:
    names = [field.name for field in fields(columns)]
    return [
        {"event": event} | {name: getattr(columns, name)[row].tolist() for name in names}
        for row in range(len(columns))
    ]


def test_a_run_that_has_not_ended_or_was_never_evaluated_has_a_note(tmp_path: Path) -> None:
    (note,) = load(write_run(tmp_path / "stopped", done=False)).notes
    assert "its last record is of step 50" in note
    (note,) = load(write_run(tmp_path / "blind", [train(1), train(2)])).notes
    assert note == "The run was never evaluated."


def test_records_are_read_as_written(tmp_path: Path) -> None:
    rows = usual()
    run = load(write_run(tmp_path / "run", rows))
    assert rows_of(run.train, "train") == [row for row in rows if row["event"] == "train"]
    assert rows_of(run.test, "test") == [row for row in rows if row["event"] == "test"]
    assert (run.ranks, run.notes) == (4, ())
    assert run.config["world"]["ranks"] == 4 and "[world]" in run.config_text


def test_columns_have_the_promised_types_even_without_rows(tmp_path: Path) -> None:
    run = load(write_run(tmp_path / "run", [train(1, ranks=3, loss=1)]))
    assert run.train.step.dtype == run.test.step.dtype == np.int64
    assert run.train.loss.dtype == run.test.loss.dtype == np.float64
    assert run.test.bytes_sent.shape == (0, 3) and run.test.time.shape == (0,)


def test_a_last_line_cut_short_is_a_note(tmp_path: Path) -> None:
    whole = load(write_run(tmp_path / "whole"))
    for name, end in (
        ("cut", '\n{"event": "train", "st'),
        ("bytes", "\n\x00\x00"),
        ("nl", "\n{\n"),
    ):
        run = load(write_run(tmp_path / name, end=end))
        assert np.array_equal(run.train.step, whole.train.step)
        assert len(run.notes) == 1 and "Line 11" in run.notes[0]


def test_a_corrupt_line_in_the_middle_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines()
    lines[3] = lines[3][:20]
    file.write_text("\n".join(lines))
    with pytest.raises(HpcsgdError, match=r"metrics\.jsonl, line 4 "):
        load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "low"},
        {"loss": None},
        {"loss": [1.0]},
        {"step": 1.5},
        {"step": True},
        {"time": float("nan")},
        {"compute_seconds": [0.1, 0.2, 0.3, float("inf")]},
        {"bytes_sent": 3},
        {"bytes_sent": []},
        {"bytes_sent": [1, 2, 3]},
        {"bytes_sent": [1, 2, 3, 2**63]},
        {"compute_seconds": [0.1, 0.2, 0.3]},
        {"wait_seconds": [0.1, 0.2, 0.3, "x"]},
    ],
)
def test_a_wrong_value_is_named_with_its_line(tmp_path: Path, changes: dict[str, object]) -> None:
    folder = write_run(tmp_path / "run", [train(1), tested(1), train(2) | changes, train(3)])
    with pytest.raises(HpcsgdError, match="line 3 ") as caught:
        load(folder)
    assert next(iter(changes)) in str(caught.value)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    row = tested(1)
    del row["accuracy"]
    with pytest.raises(HpcsgdError, match="'accuracy'"):
        load(write_run(tmp_path / "run", [train(1), row]))


def test_values_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    rows = [tested(1, loss=math.nan), tested(2, loss=math.inf), tested(3)]
    run = load(write_run(tmp_path / "run", rows))
    assert np.isnan(run.test.loss[0]) and np.isinf(run.test.loss[1])
    assert "2 of 3" in run.notes[0]


def test_records_repeated_after_a_resume_replace_the_earlier(tmp_path: Path) -> None:
    before = [train(10), tested(10), train(20), tested(20), train(30), tested(30)]
    after = [train(20, loss=9.0), tested(20, loss=9.0), train(40)]
    run = load(write_run(tmp_path / "run", before + after))
    assert run.train.step.tolist() == [10, 20, 40] and run.test.step.tolist() == [10, 20]
    assert run.train.loss[1] == run.test.loss[1] == 9.0
    assert "4 of 9" in run.notes[0]


def test_the_order_of_two_records_of_one_step_does_not_matter(tmp_path: Path) -> None:
    run = load(write_run(tmp_path / "run", [tested(10), train(10), tested(20), train(20)]))
    assert run.train.step.tolist() == run.test.step.tolist() == [10, 20]
    assert run.notes == ()


def test_events_of_other_kinds_are_left_alone(tmp_path: Path) -> None:
    run = load(write_run(tmp_path / "run", [train(1), {"event": "checkpoint"}, tested(1)]))
    assert len(run.train) == len(run.test) == 1


def test_a_path_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HpcsgdError, match="no such folder"):
        load(tmp_path / "absent")
    with pytest.raises(HpcsgdError, match="not a run folder"):
        load(tmp_path)
    folder = write_run(tmp_path / "run")
    with pytest.raises(HpcsgdError, match="not a run folder"):
        load(folder / "metrics.jsonl")
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(HpcsgdError, match=r"has no metrics\.jsonl"):
        load(folder)


def test_empty_metrics_and_broken_settings_are_errors(tmp_path: Path) -> None:
    with pytest.raises(HpcsgdError, match="no record yet"):
        load(write_run(tmp_path / "empty", []))
    folder = write_run(tmp_path / "run")
    (folder / "config.toml").write_text("batch = ")
    with pytest.raises(HpcsgdError, match=r"config\.toml is not valid TOML"):
        load(folder)
