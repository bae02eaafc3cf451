"""A run folder of an earlier version (commit a971d40, before every rename) resumes and reports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpcsgd.commands.cli import cli
from tests.support.train_jobs import records, run_commands

RUN = Path(__file__).parent / "run_of_a971d40"
#: The metrics after the same resume by that commit; after a resume LASGD writes records at other steps.
RESUMED = RUN.with_suffix(".resumed.jsonl")
STEPS = 12  # it ended there; the checkpoint kept here is of step 6


@pytest.mark.timeout(170)
def test_run_of_an_earlier_version_resumes_to_the_same_end_and_reports(tmp_path: Path) -> None:
    old = [json.loads(line) for line in RESUMED.read_text().splitlines()]
    shutil.copytree(RUN, tmp_path / "lasgd")
    resume = ("train", "--resume", tmp_path / "lasgd", "--out", tmp_path)
    (outcome,) = run_commands(tmp_path, 2, resume)
    assert outcome.codes == [0, 0], outcome
    new = records(tmp_path / "lasgd")
    assert [(r["event"], r["step"]) for r in new] == [(r["event"], r["step"]) for r in old]
    assert new[-1]["step"] == STEPS
    for before, after in zip(old, new, strict=True):
        assert set(before) == set(after)
        # The bits are the same on the processor that wrote the folder; others round elsewhere.
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
        assert after["bytes_sent"] == before["bytes_sent"]
    assert (tmp_path / "lasgd" / "done").exists()
    words = ["report", str(tmp_path / "lasgd"), "--out", str(tmp_path / "report")]
    assert CliRunner().invoke(cli, words, catch_exceptions=False).exit_code == 0
    assert (tmp_path / "report" / "report.html").stat().st_size > 0
