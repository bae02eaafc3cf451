"""Order in which the files of a run reach the disk."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from hpcsgd.commands.train.metrics_file import MetricsFile
from hpcsgd.commands.train.settings import Settings
from hpcsgd.commands.train.storage import RunStorage
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
