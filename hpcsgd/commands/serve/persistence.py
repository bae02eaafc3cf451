"""What one server of `hpcsgd serve` remembers over its end: checkpoints, and the logs of updates since."""

from __future__ import annotations

import fcntl
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hpcsgd.errors import HpcsgdError
from hpcsgd.server import Server, update_log
from hpcsgd.server.shard import Push, Shard
from hpcsgd.server.update_rules import Terms
from hpcsgd.training.checkpoint.checkpoints import Checkpoints

_log = logging.getLogger("hpcsgd.server")
# A log is too long beyond both of these.
_BYTES, _MODELS = 256 * 2**20, 4


class Memory:
    """Writes down every update at once, and everything from time to time, by a thread.

    Parameters
    ----------
    folder
        Made where absent; no other server may use it at the same time.
    every
        Seconds between two checkpoints; where much is pushed they come sooner, so that logs stay short.

    Raises
    ------
    HpcsgdError
        The folder is in use.
    """

    def __init__(self, folder: Path, every: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder / "lock")
        self._checkpoints = Checkpoints(folder, 0, 1, lambda value: [value], keep=1)
        self._keeping = update_log.Keeping(folder)
        self._every = every
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def recall(self, server: Server) -> None:
        """Make a new server what the last one was that had this folder, and begin to write down.

        Raises
        ------
        HpcsgdError
            The folder is damaged.
        """
        self._server, self._number = server, 0
        steps, logs = self._checkpoints.steps(), self._keeping.numbers()
        if steps:
            update_log.restore(server, self._checkpoints.load()[0][0])
        replayed = self._keeping.replay(server, steps[-1] if steps else 0)
        if steps or logs:
            self._number = max([*steps, *logs])
            self._save().result()
            updates = sum(shard.version for shard in server.shards.values())
            _log.info("goes on after %s updates, %s of them from the log", f"{updates:,}", f"{replayed:,}")
        else:
            self._begin()

    def record(self, shard: Shard, pushes: list[Push], terms: Terms) -> None:
        """See `counting.Record`."""
        self._keeping.record(shard, pushes, terms)

    def look(self) -> None:
        """Now and then: notice who came and went, and begin a checkpoint when it is time."""
        self._keeping.note()
        if self._writing is None:
            model = sum(shard.nbytes for shard in self._server.shards.values())
            long = self._keeping.nbytes > max(_BYTES, _MODELS * model)
            due = time.monotonic() - self._saved_at > self._every
            if long or (due and self._keeping.nbytes > self._empty):
                self._writing = self._save()
        elif self._writing.done():
            error, self._writing = self._writing.exception(), None
            if error is not None:
                _log.warning("no checkpoint: %s; the log goes on", error)

    def close(self) -> None:
        """Write the last checkpoint."""
        if self._writing is not None:
            self._writing.exception()
        self._save().result()
        self._keeping.close()
        self._thread.shutdown()
        self._lock.close()

    def _save(self) -> Future[None]:
        saved = update_log.state(self._server)
        self._number += 1
        self._begin()
        return self._thread.submit(self._write, self._number, saved)

    def _begin(self) -> None:
        self._keeping.begin(self._server, self._number)
        self._empty, self._saved_at = self._keeping.nbytes, time.monotonic()

    def _write(self, number: int, saved: dict[str, Any]) -> None:
        self._checkpoints.save(number, saved, {})
        self._keeping.forget(number)


def _lock(path: Path) -> Any:
    """Hold a file that only one process can hold, as long as it lives."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise HpcsgdError(
            f"another server is at work in {path.parent}",
            do="stop it, or name another --listen FILE and --checkpoint FOLDER",
        ) from None
    except OSError:
        pass  # a file system without locks
    return file
