"""Persistent state of one server of `hpcsgd serve`: checkpoints, and logs of the updates since."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from hpcsgd.server import Server, update_log
from hpcsgd.server.shard import Push, Shard
from hpcsgd.server.update_rules import UpdateContext
from hpcsgd.training.checkpoint.checkpoints import Checkpoints
from hpcsgd.training.checkpoint.folder_lock import FolderLock

_log = logging.getLogger("hpcsgd.server")
# A log longer than both of these starts a checkpoint.
_LOG_BYTES, _LOG_MODELS = 256 * 2**20, 4


class ServerPersistence:
    """Writes every update to a log, and checkpoints at intervals, in a thread; has the folder while entered.

    Parameters
    ----------
    folder
        Folder of the server, created if absent; no other server may use it at the same time.
    every
        Seconds between two checkpoints; a long log starts one earlier.
    """

    def __init__(self, folder: Path, every: float) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(folder, "give another --listen FILE and --checkpoint FOLDER", _log.warning)
        self._checkpoints = Checkpoints(folder, 0, 1, lambda value: [value], keep=1)
        self._update_log = update_log.UpdateLog(folder)
        self._every = every
        self._thread = ThreadPoolExecutor(1)
        self._pending_checkpoint: Future[None] | None = None

    def __enter__(self) -> Self:
        """Raises `HpcsgdError` if the folder is in use."""
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def restore(self, server: Server) -> None:
        """Restore the last server of this folder in a new one, and start to log its updates.

        Raises
        ------
        HpcsgdError
            If the folder is damaged.
        """
        self._server, self._number = server, 0
        steps, logs = self._checkpoints.steps(), self._update_log.numbers()
        if steps:
            update_log.restore_server(server, self._checkpoints.load()[0][0])
        replayed = self._update_log.replay(server, steps[-1] if steps else 0)
        if steps or logs:
            self._number = max([*steps, *logs])
            self._start_checkpoint().result()
            updates = sum(shard.version for shard in server.shards.values())
            _log.info(
                "resumed after %s updates, %s of them from the update log", f"{updates:,}", f"{replayed:,}"
            )
        else:
            self._start_log()

    def record_update(self, shard: Shard, pushes: list[Push], context: UpdateContext) -> None:
        """Write an update that is about to be made to the log."""
        self._update_log.record_update(shard, pushes, context)

    def maintain(self) -> None:
        """Log changes of the sessions, and start a checkpoint if one is due; called periodically.

        Raises
        ------
        HpcsgdError
            The log cannot be written, or another server has taken the folder over.
        """
        self._lock.check()
        self._update_log.record_sessions()
        if self._pending_checkpoint is None:
            model = sum(shard.nbytes for shard in self._server.shards.values())
            log_is_long = self._update_log.nbytes > max(_LOG_BYTES, _LOG_MODELS * model)
            is_due = time.monotonic() - self._checkpoint_started_at > self._every
            if log_is_long or (is_due and self._update_log.nbytes > self._initial_log_bytes):
                self._pending_checkpoint = self._start_checkpoint()
        elif self._pending_checkpoint.done():
            error, self._pending_checkpoint = self._pending_checkpoint.exception(), None
            if error is not None:
                _log.warning(
                    "the checkpoint was not written: %s; updates are still written to the update log", error
                )

    def close(self) -> None:
        """Write the last checkpoint."""
        if self._pending_checkpoint is not None:
            self._pending_checkpoint.exception()
        self._start_checkpoint().result()
        self._update_log.close()
        self._thread.shutdown()

    def _start_checkpoint(self) -> Future[None]:
        state = update_log.server_state(self._server)
        self._number += 1
        self._start_log()
        return self._thread.submit(self._write_checkpoint, self._number, state)

    def _start_log(self) -> None:
        self._update_log.start(self._server, self._number)
        self._initial_log_bytes, self._checkpoint_started_at = self._update_log.nbytes, time.monotonic()

    def _write_checkpoint(self, number: int, state: dict[str, Any]) -> None:
        self._checkpoints.save(number, state, {})
        self._update_log.remove_before(number)
