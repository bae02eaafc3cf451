"""Order in which the files of a run reach the disk."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpcsgd.commands.train.metrics import FILE
from hpcsgd.commands.train.metrics_file import MetricsFile
from hpcsgd.commands.train.settings import Settings
from hpcsgd.commands.train.storage import RunStorage
from hpcsgd.errors import HpcsgdError
from hpcsgd.training.checkpoint.checkpoints import Checkpoints


@pytest.mark.mpi
def test_no_checkpoint_is_newer_than_its_records_on_the_disk(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash in between, the records of the steps before the checkpoint would be missing for good."""
    folder = Path(world.gather(str(tmp_path))[0])
    settings = Settings(name="run", out=str(folder), spare=str(folder / "spare"))
    synced = MetricsFile.sync

    def full(self: MetricsFile) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with RunStorage(folder / "run", settings, world) as storage:
        storage.create()
        storage.open_metrics(0, None)
        monkeypatch.setattr(MetricsFile, "sync", full)
        storage.save(3, {"state": world.rank}, {})
        assert storage.checkpoints.steps() == []
        (spare,) = (folder / "spare").iterdir()
        assert Checkpoints(spare / "checkpoints", world.rank, world.size, world.gather).steps() == [3]
        world.gather("all have looked")
        monkeypatch.setattr(MetricsFile, "sync", synced)
        storage.save(4, {"state": world.rank}, {})
        assert storage.checkpoints.steps() == [4]


@pytest.mark.mpi
@pytest.mark.parametrize("kept", ["all", "first", "damaged", "none", "no file"])
def test_records_that_are_gone_are_reported_once(
    world: Any, tmp_path: Path, kept: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(world.gather(str(tmp_path))[0]) / "run"
    settings = Settings(name="run", out=str(folder.parent))
    lines = [f'{{"event": "train", "step": {step}}}\n' for step in (1, 2, 3)]
    with RunStorage(folder, settings, world) as storage:
        storage.create()
        storage.open_metrics(0)
        if storage.metrics is not None:
            for step in (1, 2, 3):
                storage.metrics.write({"event": "train", "step": step})
        storage.save(3, {"state": world.rank}, {})
        _, meta = storage.checkpoints.load()
    assert meta["records"] == 3
    texts = {"all": lines, "first": lines[:1], "damaged": [*lines[:2], lines[2][:9]], "none": []}
    if world.rank == 0:
        (folder / FILE).unlink()
        if kept in texts:
            (folder / FILE).write_text("".join(texts[kept]))
    world.gather("changed")
    left = {"all": 3, "first": 1, "damaged": 2}.get(kept, 0)
    capsys.readouterr()
    with RunStorage(folder, replace(settings, resume=str(folder)), world) as storage:
        storage.open_metrics(3, None, meta["records"])
    shown = capsys.readouterr().err
    notice = f"has {left} of the 3 records until step 3: the others were removed or damaged"
    assert shown.count(notice) == (kept != "all" and world.rank == 0), shown


@pytest.mark.mpi
def test_records_that_are_no_text_are_an_error_that_names_the_file(world: Any, tmp_path: Path) -> None:
    folder = Path(world.gather(str(tmp_path))[0]) / "run"
    settings = Settings(name="run", out=str(folder.parent))
    with RunStorage(folder, settings, world) as storage:
        storage.create()
        if world.rank == 0:
            (folder / FILE).write_bytes(b'{"step": 1}\n{"st\xff\xfe}\n')
        with pytest.raises(HpcsgdError, match=r"metrics.jsonl has a line that is not a record"):
            storage.open_metrics(1)
