"""Small file systems for tests that fill them, or make them read-only."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def small_disk(folder: Path, size: str = "2m") -> Iterator[Path]:
    """A file system in memory, which can be filled."""
    folder.mkdir()
    _run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def failing_disk(folder: Path) -> Iterator[Path]:
    """A file system that `mount -o remount,abort` makes read-only, as an error of its disk does."""
    image = folder.with_suffix(".image")
    image.write_bytes(bytes(8 * 2**20))
    folder.mkdir()
    _run("mkfs.ext4", "-q", str(image))
    _run("mount", "-o", "loop,errors=remount-ro", str(image), str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def obstacle() -> str:
    """Return the reason why no file system can be mounted here, or an empty string."""
    if os.geteuid() != 0:
        return "mounting a file system needs root"
    try:
        with tempfile.TemporaryDirectory() as folder, failing_disk(Path(folder, "disk")):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no file system of a file can be mounted here: {error}"


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, check=True)
