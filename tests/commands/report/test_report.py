"""The report as a whole: its files, its errors, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpcsgd.commands.report.writer import write
from hpcsgd.errors import BadOption, HpcsgdError
from tests.support.sample_run_folders import usual, write_run


def test_files_are_written_and_named(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(n), usual(ranks=n)) for n in (1, 3)]
    out = tmp_path / "new" / "out"
    written = write([*runs, runs[0]], out)
    assert [file.name for file in written] == [
        "report.html",
        "accuracy.png",
        "loss.png",
        "training-loss.png",
        "ranks.png",
    ]
    assert "Comparison of 2 runs" in written[0].read_text(encoding="utf-8")
    assert all(file.read_bytes().startswith(b"\x89PNG\r\n") for file in written[1:])


def test_no_runs_and_unwritable_folder_raise(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="no run"):
        write([], tmp_path)
    folder = write_run(tmp_path / "run")
    with pytest.raises(HpcsgdError, match="cannot write"):
        write([folder], folder / "config.toml")


def test_importing_needs_neither_mpi_nor_torch_nor_matplotlib() -> None:
    script = "import sys, hpcsgd.commands.report.writer\n"
    script += "print(*{'mpi4py.MPI', 'torch', 'matplotlib'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_missing_matplotlib_raises_with_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(HpcsgdError, match=r"pip install 'hpcsgd\[report\]'"):
        write([write_run(tmp_path / "run")], tmp_path / "out")
