"""The spare folder of a run, for the time in which its own cannot be written."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpcsgd.commands.train import metrics, run_folder
from hpcsgd.commands.train.metrics_file import MetricsFile
from hpcsgd.errors import HpcsgdError, os_errors
from hpcsgd.mpi.world import World
from hpcsgd.training.checkpoint.checkpoints import Checkpoints, NotSaved
from hpcsgd.training.checkpoint.files import delete, sync_folder


class SpareFolder:
    """A complete run folder, with the newest checkpoint and all metrics, on another file system.

    Its path is in `parent`, or, if that is empty, in the folder of temporary files.
    """

    def __init__(self, run: Path, parent: str, world: World) -> None:
        self._run, self._world = run, world
        key = hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:12]
        self.path = Path(parent or tempfile.gettempdir()) / f"hpcsgd-{run.name}-{key}"

    def create(self, config: str) -> None:
        """Create the folder with the `config.toml` of the run, if it is not there.

        Raises
        ------
        OSError
            That is not possible here.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self._is_own():
            raise PermissionError(errno.EACCES, "the folder belongs to another user", str(self.path))
        (self.path / run_folder.CONFIG).write_text(config)

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        meta: Mapping[str, Any],
        config: str,
        metrics_file: MetricsFile | None,
        error: NotSaved,
    ) -> None:
        """Save a checkpoint, and all metrics; collective.

        Parameters
        ----------
        step, state, meta
            As those of `Checkpoints.save`.
        config
            Text of the run's `config.toml`, the same on all ranks.
        metrics_file
            On rank 0: the metrics.
        error
            The reason for which the run's folder does not hold the checkpoint.

        Raises
        ------
        HpcsgdError
            On all ranks: that is not possible here either.
        """
        # Ranks may have different folders for temporary files, and see different ones.
        self.path = self._world.gather(self.path)[0]
        rank, ranks = self._world.rank, self._world.size
        checkpoints = Checkpoints(self.path / run_folder.CHECKPOINTS, rank, ranks, self._world.gather)
        failure = first_failure(self._world, lambda: self._begin(config, metrics_file))
        failure = failure or first_failure(self._world, lambda: self._check_shared(config))
        try:
            if not failure:
                checkpoints.save(step, state, meta)
        except NotSaved as second:
            failure = second.reason
        if failure:
            raise HpcsgdError(
                f"the checkpoint of step {step} can be saved neither in {self._run} nor in the spare folder "
                f"{self.path}",
                got=f"{error.reason}\n            {failure}",
                do="free space in one of them, or give another spare folder (--spare), and resume the run",
                everywhere=True,
            )

    def remove(self) -> None:
        """Remove the folder, as far as that is possible."""
        shutil.rmtree(self.path, ignore_errors=True)

    def bring_home(self, config: str) -> str:
        """Move the newest checkpoint and the metrics to the run's folder where that has older ones; local.

        The folder may be one of an earlier run in the same place, with another `config.toml`. Returns a line
        for the user; "": there is no spare folder.

        Raises
        ------
        HpcsgdError
            The run's folder still cannot be written.
        """
        if not self._is_of(config):
            return ""
        newest, before = _newest_step(self.path), _newest_step(self._run)
        what = f"cannot move the newest files of {self._run} from the spare folder {self.path} to their place"
        do = f"free space there, or continue in the spare folder: --resume {self.path}"
        with os_errors(what, do=do):
            # Metrics first: after a crash in between the checkpoint here is still the newest.
            if _size(self.path / metrics.FILE) > _size(self._run / metrics.FILE):
                _copy(self.path / metrics.FILE, self._run / metrics.FILE)
            if newest > before:
                _copy(_checkpoint(self.path, newest), _checkpoint(self._run, newest))
        self.remove()
        moved = f"the checkpoint of step {newest} and the metrics" if newest > before else "the metrics"
        return f"{moved} of {self._run} are back from the spare folder {self.path}"

    def _begin(self, config: str, metrics_file: MetricsFile | None) -> None:
        if metrics_file is not None:
            self.create(config)
            metrics_file.copy_to(self.path / metrics.FILE)

    def _check_shared(self, config: str) -> None:
        if (self.path / run_folder.CONFIG).read_text() != config:
            raise OSError(f"{self.path} is another folder here than on rank 0")

    def _is_own(self) -> bool:
        return self.path.is_dir() and self.path.stat().st_uid == os.geteuid()

    def _is_of(self, config: str) -> bool:
        try:
            found = self._is_own() and (self.path / run_folder.CONFIG).read_text()
        except OSError:
            return False
        return bool(found) and run_id(str(found)) == run_id(config) != ""


def first_failure(world: World, action: Callable[[], None]) -> str:
    """Run an action that may fail to write or read; returns the first failure of a rank, on all, or ""."""
    failure = ""
    try:
        action()
    except OSError as error:
        failure = f"rank {world.rank}: {error}"
    return next(filter(None, world.gather(failure)), "")


def run_id(config: str) -> str:
    """Return the id of a run, from the text of its `config.toml`; "": it has none."""
    try:
        return str(tomllib.loads(config).get("world", {}).get("run", ""))
    except ValueError:
        return ""


def _newest_step(run: Path) -> int:
    """The newest step with a checkpoint; -1: there is none."""
    steps = Checkpoints(run / run_folder.CHECKPOINTS, 0, 1, lambda value: [value]).steps()
    return max(steps, default=-1)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _checkpoint(run: Path, step: int) -> Path:
    return run / run_folder.CHECKPOINTS / f"step-{step:08d}"


def _copy(source: Path, target: Path) -> None:
    """Copy a file or folder, whole or not at all, and through to the disk."""
    partial = target.with_name(f".{target.name}.partial")
    target.parent.mkdir(exist_ok=True)
    try:
        if source.is_dir():
            shutil.copytree(source, partial)
        else:
            shutil.copyfile(source, partial)
        for file in [*partial.rglob("*"), partial]:
            if file.is_file():
                with open(file, "rb") as copied:
                    os.fsync(copied.fileno())
        partial.replace(target)
    finally:
        delete(partial)
    sync_folder(target.parent)
