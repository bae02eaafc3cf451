"""A file of records that survives a full disk, a read-only file system, and its own removal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

_NOT_OPEN = -1


class MetricsFile:
    """Appends lines to a file, and keeps each in memory until the disk has it.

    Parameters
    ----------
    path
        The file, which is replaced.
    lines
        Its first lines.
    restore_folder
        Called before the file is created, also again where it was removed: its folder may be gone too.
    notify
        Called with a line when the file cannot be written, and when it can again.
    must_begin
        Whether it is an error if the first lines cannot be written now. Default True.

    Raises
    ------
    OSError
        The first lines cannot be written.
    """

    def __init__(
        self,
        path: Path,
        lines: Iterable[str],
        restore_folder: Callable[[], None],
        notify: Callable[[str], None],
        must_begin: bool = True,
    ) -> None:
        self._path, self._restore_folder, self._notify = path, restore_folder, notify
        self._head = "".join(lines).encode()  # first lines of the file, while it is not open
        self._descriptor, self._size, self._synced = _NOT_OPEN, 0, 0
        #: Lines since the last `sync`, and how many of them have been written.
        self._lines: list[bytes] = []
        self._written = 0
        self._torn = False  # the file ends with a part of a line
        self._failed = False
        if must_begin:
            self._write()
        else:
            self._try_to_write()

    def append(self, line: str) -> None:
        """Append a line with its newline; the file has it on return, unless it cannot be written."""
        self._lines.append(line.encode())
        self._try_to_write()

    def sync(self) -> None:
        """Write all lines through to the disk.

        Raises
        ------
        OSError
            That is not possible now; the lines are kept.
        """
        self._write()
        try:
            os.fsync(self._descriptor)
        except OSError:
            # The kernel may have dropped what it could not write, and does not fail for it again.
            self._size, self._written, self._torn = self._synced, 0, True
            raise
        self._synced, self._written = self._size, 0
        self._lines.clear()

    def copy_to(self, path: Path) -> None:
        """Write all lines to another file, and through to its disk.

        Raises
        ------
        OSError
            The other file cannot be written.
        """
        with open(path, "wb") as file:
            file.write(self._earlier())
            file.writelines(self._lines)
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        with suppress(OSError):
            self._write()
        if self._descriptor != _NOT_OPEN:
            os.close(self._descriptor)

    def _try_to_write(self) -> None:
        try:
            self._write()
        except OSError as error:
            if not self._failed:
                self._notify(
                    f"{self._path} cannot be written ({error.strerror}): training continues, and its records "
                    "are kept in memory until it can"
                )
            self._failed = True

    def _write(self) -> None:
        if self._descriptor != _NOT_OPEN:
            self._follow()
        if self._descriptor == _NOT_OPEN:
            self._begin()
        size = os.fstat(self._descriptor).st_size
        if size < self._size:
            self._size = self._end_of_lines(size)
        elif self._torn:
            os.ftruncate(self._descriptor, self._size)
        else:
            self._size = size
        self._torn = False
        rest = memoryview(b"".join(self._lines[self._written :]))
        size = self._size + len(rest)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            self._torn = True
            raise
        self._size, self._written = size, len(self._lines)
        if self._failed:
            self._failed = False
            self._notify(f"{self._path} can be written again, and has all records")

    def _end_of_lines(self, size: int) -> int:
        """Cut what another program, which has shortened the file, left of a line; returns the length."""
        start = size
        while start and os.pread(self._descriptor, 1, start - 1) != b"\n":
            start -= 1
        os.ftruncate(self._descriptor, start)
        self._synced = min(self._synced, start)
        return start

    def _follow(self) -> None:
        """Close the file if it was removed or replaced, and take over what was put in its place."""
        here = os.fstat(self._descriptor)
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            self._head = self._earlier()
        else:
            if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
                return
            self._head = self._path.read_bytes()
            del self._lines[: self._written]
        os.close(self._descriptor)
        self._descriptor, self._written, self._torn = _NOT_OPEN, 0, False

    def _begin(self) -> None:
        """Write the first lines."""
        self._restore_folder()
        partial = self._path.with_suffix(".partial")
        try:
            partial.write_bytes(self._head)
            partial.replace(self._path)
        finally:
            partial.unlink(missing_ok=True)
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND)
        self._size = self._synced = len(self._head)
        self._head = b""

    def _earlier(self) -> bytes:
        """The lines before the last `sync`: a removed file can be read as long as it is open."""
        if self._descriptor == _NOT_OPEN:
            return self._head
        parts, start = [], 0
        try:
            while start < self._synced and (part := os.pread(self._descriptor, self._synced - start, start)):
                parts.append(part)
                start += len(part)
        except OSError as error:  # removed by another host of a network file system
            self._notify(f"the earlier records of {self._path} are lost with the file ({error.strerror})")
        return b"".join(parts)
