"""The folder of a run: its path, its creation, and the file `done`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hpcsgd.commands.train import run_folder
from hpcsgd.commands.train.settings import Settings, from_toml, merge
from hpcsgd.errors import BadOption


def test_a_run_that_goes_on_by_itself_goes_to_the_folder_of_its_name(tmp_path: Path) -> None:
    settings = Settings(out=str(tmp_path), name="run", resume="auto")
    assert run_folder.path_of(settings) == tmp_path / "run"
    with pytest.raises(BadOption, match="--name"):
        run_folder.path_of(replace(settings, name=""))


def test_it_may_begin_again_where_it_was_killed_before_its_first_checkpoint(tmp_path: Path) -> None:
    settings = Settings(out=str(tmp_path), name="run", epochs=3.0)
    run_folder.claim(tmp_path / "run", settings)
    with pytest.raises(BadOption, match="exists"):
        run_folder.claim(tmp_path / "run", settings)
    again = replace(settings, resume="auto")
    run_folder.claim(tmp_path / "run", again)
    # Run again by its config.toml it is a new run, not this one.
    (tmp_path / "run" / "config.toml").write_text(run_folder.config(tmp_path / "run", again, {}))
    assert merge(from_toml(tmp_path / "run" / "config.toml"), {}) == settings


def test_there_must_be_a_folder_to_resume(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="no run to resume"):
        run_folder.claim(tmp_path / "run", Settings(resume=str(tmp_path / "run")))


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path: Path) -> None:
    for name in ("empty", "used"):
        run_folder.claim(tmp_path / name, Settings())
    (tmp_path / "used" / "config.toml").touch()
    for name in ("empty", "used"):
        run_folder.release(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["used"]


def test_done_stands_there_only_while_there_is_no_more_to_do(tmp_path: Path) -> None:
    run_folder.mark(tmp_path, done=True)
    assert [path.name for path in tmp_path.iterdir()] == ["done"]
    for _ in range(2):
        run_folder.mark(tmp_path, done=False)
    assert not list(tmp_path.iterdir())
