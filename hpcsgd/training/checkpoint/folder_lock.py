"""The lock of a folder, on any file system that several hosts share."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hpcsgd.errors import HpcsgdError
from hpcsgd.training.checkpoint.lock_owner import LockOwner

FILE = "lock"
#: Seconds between two signs of life of an owner; and seconds without one, after which an owner is taken for
#: dead whose process cannot be looked up.
BEAT, STALE = 5.0, 60.0
_POLL = 1.0  # seconds
_ATTEMPTS = 100
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}
#: A lock, and the time of its owner's last sign of life by the clock of the file system.
_Found = tuple[LockOwner, float]


class FolderLock:
    """Makes this process the only one that writes a folder, among all hosts that see it.

    The lock is a file that names its owner. A hard link creates it, which succeeds for one process alone, on
    network file systems too; `flock` does not on all of them. A thread renews the time of the file while the
    process lives. The lock of a dead owner is taken over: on the same machine its process is gone; elsewhere
    Slurm has ended its job, or it gives no sign of life.

    Parameters
    ----------
    folder
        The folder, which exists.
    remedy
        What else a process can do that finds the folder in use, for the error.
    notify
        Called with a line when the lock must be watched for a sign of life.

    Attributes
    ----------
    owner
        This process.
    """

    def __init__(self, folder: Path, remedy: str, notify: Callable[[str], None]) -> None:
        self.owner = LockOwner()
        self._folder, self._path = folder, folder / FILE
        self._remedy, self._notify = remedy, notify
        self._predecessor = ""
        self._successor: LockOwner | None = None
        self._renewed = self._attempted = self._disk_time = 0.0
        self._renewing = threading.Lock()
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, predecessor: str = "") -> None:
        """Acquire the lock, or wait until its owner has shown that it lives.

        `predecessor` is the token of a dead owner whose work this process continues, even if the lock cannot
        be written yet; "": none.

        Raises
        ------
        HpcsgdError
            The folder is in use, and the error names the owner; or the lock cannot be written.
        """
        self._predecessor = predecessor
        self._renewed = self._attempted = time.monotonic()
        if predecessor:
            self.renew()
            self.check()
        else:
            self._compete()
            self._renewed = self._attempted = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name="folder lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Check that this process still owns the lock; cheap while its thread gives signs of life.

        Raises
        ------
        HpcsgdError
            Another process has taken the lock over, while this one was stopped or could not reach the folder.
        """
        if time.monotonic() - self._renewed > 2 * BEAT:
            self.renew()
        if self._successor is not None:
            raise HpcsgdError(
                f"{self._folder} belongs to another job now: this one gave no sign of life for {STALE:g} s",
                got=str(self._successor),
                do="let the other job continue: it has begun from the last checkpoint of this one",
            )

    def renew(self) -> None:
        """Give a sign of life; a lock that was removed, with its folder or by hand, is created again."""
        # A file system that is full, read-only or gone is found by those who write to it.
        with self._renewing, contextlib.suppress(OSError):
            now, before = time.monotonic(), self._attempted
            self._attempted = now
            found = self._read(self._path)
            token = None if found is None else found[0].token
            if found is not None and token not in (self.owner.token, self._predecessor):
                self._successor = found[0]
            elif found is None and now - before > STALE / 2:
                # This process was stopped; a successor may have come and ended meanwhile.
                self._successor = LockOwner.parse("")
            elif self._successor is None and (token == self.owner.token or self._write(token is not None)):
                os.utime(self._path)
                self._renewed = time.monotonic()

    def release(self) -> None:
        """Remove the lock, if it is still that of this process; idempotent."""
        if self._end():
            with contextlib.suppress(OSError):
                found = self._read(self._path)
                if found is not None and found[0].token == self.owner.token:
                    self._path.unlink()

    def hand_over(self) -> None:
        """End the signs of life and leave the lock to a process that knows its token."""
        self._end()

    def _end(self) -> bool:
        """End the thread; returns whether this process had the lock."""
        self._released.set()
        if self._thread is None or self.owner.pid != os.getpid():
            return False
        self._thread.join(BEAT)
        self._thread = None
        return True

    def _compete(self) -> None:
        """Acquire the lock among others that may try the same."""
        try:
            for _ in range(_ATTEMPTS):
                if self._try_to_acquire():
                    return
        except OSError as error:
            what = f"cannot lock {self._folder}: {error.strerror} ({self._path})"
            do = "free space there, make the folder writable, or choose another one"
            raise HpcsgdError(what, do=do) from error
        raise HpcsgdError(f"cannot lock {self._folder}: {self._path} appears and vanishes", do=self._remedy)

    def _try_to_acquire(self) -> bool:
        if self._write():
            return True
        found = self._read(self._path)
        if found is None:
            time.sleep(_POLL / 20)  # released meanwhile; or a network file system is late
            return False
        owner, beat = found
        if owner.token == self.owner.token:
            return True  # a network file system lost the reply to the first attempt
        lives = owner.lives(self.owner)
        if lives is None:
            lives = self._watch(owner, beat)
        if lives:
            raise self._in_use(owner)
        if lives is False:
            self._remove(owner)
        return False

    def _write(self, replace: bool = False) -> bool:
        """Create or replace the lock; returns whether it is there. Its text is never seen incomplete."""
        draft = self._folder / f".{FILE}-{self.owner.token}"
        try:
            draft.write_text(self.owner.text())
            self._disk_time = draft.stat().st_mtime
            if not replace:
                return _link(draft, self._path)
            draft.replace(self._path)
            return True
        finally:
            draft.unlink(missing_ok=True)

    def _watch(self, owner: LockOwner, beat: float) -> bool | None:
        """Wait for the next sign of life; None: another process has changed the lock."""
        age = max(0.0, self._disk_time - beat)
        # Two beats at least: clocks of file systems may be those of their hosts.
        patience = max(2 * BEAT, STALE - age)
        self._notify(
            f"{self._folder} belongs to {owner}: waiting for a sign of life, at most {patience:.0f} s; "
            f"the last one was {age:.0f} s ago"
        )
        # Polls are counted, not seconds: those in which the file system does not answer prove nothing.
        for _ in range(math.ceil(patience / _POLL)):
            time.sleep(_POLL)
            found = self._read(self._path)
            if found is None or found[0].token != owner.token:
                return None
            if found[1] != beat:
                return True
        return False

    def _remove(self, dead: LockOwner) -> None:
        """Remove the lock of a dead owner, unless another process has been faster."""
        removed = self._folder / f".{FILE}-{self.owner.token}.removed"
        try:
            self._path.rename(removed)
        except FileNotFoundError:
            return
        found = self._read(removed)
        if found is not None and found[0].token != dead.token:
            _link(removed, self._path)  # that of a faster one
        removed.unlink(missing_ok=True)

    def _in_use(self, owner: LockOwner) -> HpcsgdError:
        return HpcsgdError(
            f"{self._folder} is in use by another job",
            got=str(owner),
            do=f"wait for its end, or end it ({owner.remedy()}), or {self._remedy}; if it is known to be "
            f"gone, remove {self._path}",
        )

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            self.renew()

    def _read(self, path: Path) -> _Found | None:
        try:
            # Opened each time: only then do network file systems ask the server.
            with open(path, errors="replace") as file:
                return LockOwner.parse(file.read()), os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ESTALE:
                return None
            raise


def _link(source: Path, path: Path) -> bool:
    """Give a file a second name, and return whether that did not exist."""
    try:
        os.link(source, path)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
    with contextlib.suppress(FileExistsError), open(path, "x") as file:
        file.write(source.read_text(errors="replace"))
        return True
    return False
