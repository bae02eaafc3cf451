"""The files of a run: locked by one job, and written somewhere as long as any disk takes them."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from hpcsgd.commands.train import run_folder
from hpcsgd.commands.train.console import print_notice
from hpcsgd.commands.train.metrics import FILE, RECORDS, MetricsWriter
from hpcsgd.commands.train.settings import Settings
from hpcsgd.commands.train.spare_folder import SpareFolder, first_failure
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.world import World
from hpcsgd.training.checkpoint.checkpoints import Checkpoints, NotSaved, not_saved
from hpcsgd.training.checkpoint.folder_lock import FolderLock

T = TypeVar("T")
#: Of a rank: the error of a lost lock, and whether earlier checkpoints are gone.
State = tuple[str, bool]


class RunStorage:
    """The folder of a run, and a spare one for the time in which that cannot be written; collective.

    A context manager, in which rank 0 owns the lock of the folder. `predecessor` is the token of the lock of
    a rank 0 that has died; "": none.
    """

    def __init__(self, folder: Path, settings: Settings, world: World, predecessor: str = "") -> None:
        self._folder, self._settings, self._world = folder, settings, world
        self._predecessor = predecessor
        self._lock = FolderLock(folder, "choose another --name", print_notice)
        self.token = self._config = ""
        self.checkpoints = Checkpoints(folder / run_folder.CHECKPOINTS, world.rank, world.size, world.gather)
        self.metrics: MetricsWriter | None = None
        self._spare = SpareFolder(folder, settings.spare, world)
        self._in_spare = self._lost_checkpoints = False

    def __enter__(self) -> RunStorage:
        try:
            self._on_root(self._claim)
        except BaseException:
            self._release()
            raise
        self.token = self._world.gather(self._lock.owner.token)[0]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.metrics is not None:
            self.metrics.close()
        shrinks = self._settings.on_failure == "shrink"
        if shrinks and error is not None and self._world.has_lost_ranks(error):
            self._lock.hand_over()
        else:
            self._release()

    def create(self) -> None:
        """Write the `config.toml` of a new run."""
        self._on_root(self._write_config)

    def open_metrics(self, step: int, last_record: int | None = None, expected: int | None = None) -> None:
        """Open `metrics.jsonl`, without the records of later steps, see `MetricsWriter`."""
        self.metrics = self._on_root(lambda: self._open_metrics(step, last_record, expected))

    def state(self) -> State:
        """Return the state of the folder, for `check` with those of all ranks; local."""
        return self._lost_lock(), self._lost_checkpoints

    def check(self, states: Sequence[State]) -> bool:
        """Return whether a checkpoint is needed now, for earlier ones are gone with the folder; local.

        Raises
        ------
        HpcsgdError
            On all ranks: another job has taken the lock over.
        """
        if lost := states[0][0]:
            raise HpcsgdError(lost, everywhere=True)
        return states[0][1]

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Save a checkpoint, as `Checkpoints.save`, in the run's folder, else in the spare one.

        Raises
        ------
        HpcsgdError
            On all ranks: neither is possible, or another job has taken the lock over.
        """
        self._on_root(self._lock.check)
        self._restore_on_root()
        metrics = None if self.metrics is None else self.metrics.file
        meta = {**meta, RECORDS: 0 if self.metrics is None else self.metrics.count}
        try:
            # First: after a crash in between no record before a checkpoint may be missing.
            if failure := first_failure(self._world, lambda: metrics.sync() if metrics else None):
                raise not_saved(step, failure)
            self._save_at_home(step, state, meta)
        except NotSaved as error:
            config = self._world.gather(self._config)[0]
            self._spare.save(step, state, meta, config, metrics, error)
            if not self._in_spare:
                self._print(
                    f"{self._folder} cannot be written ({error.reason}): the checkpoint of step {step} and "
                    f"all metrics are in the spare folder {self._spare.path}, and training continues"
                )
            self._in_spare = True
        else:
            if self._in_spare:
                self._print(f"{self._folder} can be written again, and has the checkpoint of step {step}")
            if metrics is not None:
                self._spare.remove()
            self._in_spare = False
        self._lost_checkpoints = False

    def finish(self, done: bool) -> None:
        """Write all files through to the disk; `done`: mark the run as finished.

        Raises
        ------
        HpcsgdError
            On all ranks: something could not be written in the run's folder; the error names the place
            where it is.
        """
        self._on_root(lambda: self._finish(done))

    def _on_root(self, action: Callable[[], T]) -> T | None:
        """Run an action on rank 0, and raise its error on all ranks."""
        return self._world.collectively(lambda: action() if self._world.rank == 0 else None)

    def _print(self, text: str) -> None:
        if self._world.rank == 0:
            print_notice(text)

    def _claim(self) -> None:
        if not self._predecessor:
            run_folder.claim(self._folder, self._settings)
        with self._world.busy("the lock of the run's folder"):
            self._lock.acquire(self._predecessor)
        path = self._folder / run_folder.CONFIG
        self._config = path.read_text(errors="replace") if path.exists() else self._new_config()
        resumes = self._settings.resume and not self._predecessor
        if resumes and (moved := self._spare.bring_home(self._config)):
            print_notice(moved)

    def _release(self) -> None:
        self._lock.release()
        if self._world.rank == 0:
            run_folder.release(self._folder)

    def _new_config(self) -> str:
        # The id distinguishes the spare folder of this run from that of an earlier one in the same place.
        ranks = {"ranks": self._world.size, "nodes": self._world.nodes, "run": self._lock.owner.token}
        return run_folder.config(self._folder, self._settings, ranks)

    def _write_config(self) -> None:
        self._config = self._new_config()
        (self._folder / run_folder.CONFIG).write_text(self._config)

    def _open_metrics(self, step: int, last_record: int | None, expected: int | None) -> MetricsWriter:
        # Survivors of a failure continue on a full disk too; there, nothing is marked as finished.
        survives = bool(self._predecessor)
        if not survives:
            run_folder.mark(self._folder, done=False)
        restore = self._restore_for_metrics
        return MetricsWriter(self._folder, step, last_record, restore, not survives, expected)

    def _lost_lock(self) -> str:
        """The error of rank 0 where another job has taken the lock over; "": none."""
        try:
            if self._world.rank == 0:
                self._lock.check()
        except HpcsgdError as error:
            return str(error)
        return ""

    def _restore_for_metrics(self) -> None:
        if self._lost_lock():
            raise OSError(errno.EBUSY, "another job has taken it over")
        self._restore()

    def _restore(self) -> bool:
        """Create the run's folder again if it was removed, and return whether it was."""
        path = self._folder / run_folder.CONFIG
        if path.exists():
            return False
        self._folder.mkdir(parents=True, exist_ok=True)
        path.write_text(self._config)
        self._lock.renew()
        self._lost_checkpoints = True
        print_notice(f"{self._folder} was removed: it is created again, and a checkpoint follows")
        return True

    def _restore_on_root(self) -> bool:
        """Return on all ranks whether rank 0 has created the folder again."""
        restored = False
        with suppress(OSError):
            restored = self._world.rank == 0 and self._restore()
        return bool(self._world.gather(restored)[0])

    def _save_at_home(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        try:
            self.checkpoints.save(step, state, meta)
        except NotSaved:
            if not self._restore_on_root():
                raise
            self.checkpoints.save(step, state, meta)

    def _finish(self, done: bool) -> None:
        assert self.metrics is not None
        self._lock.check()
        reason = "the disk has not taken a checkpoint" if self._in_spare else ""
        try:
            self.metrics.file.sync()
            if done and not self._in_spare:
                run_folder.mark(self._folder, done=True)
        except OSError as error:
            reason = str(error)
        if not reason:
            return
        home, spare = self._folder, self._spare.path
        try:
            self._spare.create(self._config)
            self.metrics.file.copy_to(spare / FILE)
        except OSError as error:
            raise HpcsgdError(
                f"the last records of {home / FILE} can be written neither there nor in the spare folder "
                f"{spare}",
                got=f"{reason}; {error}",
                do="free space in one of them, and resume from the last checkpoint",
            ) from error
        what = "its files are" if self._in_spare else f"its {FILE} is"
        raise HpcsgdError(
            f"{home} cannot be written at the end of the run ({reason}): {what} in the spare folder {spare}",
            do=f"free space, and --resume {home}, which moves them back; or --resume {spare}",
        )
