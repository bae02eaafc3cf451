"""Records that cannot be written are kept, and written whole and once when they can."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpcsgd.commands.train.metrics_file import MetricsFile


class Records:
    """A file of numbered lines, with its notices."""

    def __init__(self, folder: Path, first: int = 0) -> None:
        self.path, self.notices = folder / "records", list[str]()
        lines = [self.line(number) for number in range(first)]
        self.file = MetricsFile(self.path, lines, lambda: folder.mkdir(exist_ok=True), self.notices.append)
        self.count = first

    @staticmethod
    def line(number: int) -> str:
        return f"record {number} {'.' * 100}\n"

    def append(self, count: int = 1) -> None:
        for _ in range(count):
            self.file.append(self.line(self.count))
            self.count += 1

    def whole(self, path: Path | None = None) -> bool:
        """Whether a file has each line once, in order."""
        return (path or self.path).read_text() == "".join(map(self.line, range(self.count)))


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file may become larger than `size`: what would be beyond is not written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_lines_are_in_the_file_at_once(tmp_path: Path) -> None:
    records = Records(tmp_path, 2)
    for _ in range(3):
        records.append()
        assert records.whole()
    records.file.sync()
    records.file.close()
    assert records.whole() and os.listdir(tmp_path) == ["records"] and not records.notices


@pytest.mark.parametrize("synced", [False, True])
def test_lines_without_room_are_kept_until_there_is_some(tmp_path: Path, synced: bool) -> None:
    """The limit cuts a line in two, of which the file must not keep a part."""
    records = Records(tmp_path, 2)
    records.append(3)
    if synced:
        records.file.sync()
    with limited(800):
        records.append(9)
        with pytest.raises(OSError, match="File too large"):
            records.file.sync()
    records.file.copy_to(tmp_path / "copy")
    assert records.whole(tmp_path / "copy") and not records.whole()
    assert len(records.notices) == 1 and "records cannot be written (File too large)" in records.notices[0]
    records.append()
    assert records.whole()
    assert len(records.notices) == 2 and "has all records" in records.notices[1]
    with limited(1600):
        records.append(9)
    records.file.close()
    assert records.whole()


def test_a_failure_of_the_disk_that_comes_late_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network file system, which reports it at the sync, and may have dropped the data."""
    records = Records(tmp_path, 2)
    records.append(3)
    records.file.sync()
    records.append(3)

    def fail(descriptor: int) -> None:
        os.pwrite(descriptor, bytes(100), records.path.stat().st_size - 100)
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output"):
            records.file.sync()
    records.append()
    assert records.whole()
    records.file.sync()
    records.append()
    assert records.whole()


@pytest.mark.parametrize("synced", [False, True])
def test_a_removed_file_comes_again_with_all_lines(tmp_path: Path, synced: bool) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    records = Records(folder, 2)
    records.append(3)
    if synced:
        records.file.sync()
    shutil.rmtree(folder)
    records.append()
    assert records.whole()
    records.path.unlink()
    records.append()
    assert records.whole()
    shutil.rmtree(folder)
    records.file.sync()
    assert records.whole() and not records.notices


def test_a_file_that_was_replaced_is_continued(tmp_path: Path) -> None:
    """As by an editor, or a copy of a backup."""
    records = Records(tmp_path, 2)
    records.append(3)
    shutil.copy(records.path, tmp_path / "copy")
    (tmp_path / "copy").replace(records.path)
    records.append(2)
    assert records.whole()
    records.file.sync()
    records.file.copy_to(tmp_path / "copy")
    assert records.whole(tmp_path / "copy")


@pytest.mark.parametrize("synced", [False, True])
@pytest.mark.parametrize("rest", [0, 1.0, 1.5, 4.2])
def test_a_file_that_was_shortened_has_whole_lines(tmp_path: Path, synced: bool, rest: float) -> None:
    records = Records(tmp_path)
    records.append(5)
    if synced:
        records.file.sync()
    os.truncate(records.path, int(rest * len(records.line(0))))
    records.append(2)
    with limited(records.path.stat().st_size):
        records.append()
    records.file.sync()
    copy = tmp_path / "copy"
    records.file.copy_to(copy)
    expected = [*map(records.line, range(int(rest))), *map(records.line, (5, 6, 7))]
    assert records.path.read_text() == "".join(expected)
    assert copy.read_text() == "".join(expected)


def test_a_file_that_cannot_be_begun_leaves_nothing(tmp_path: Path) -> None:
    with limited(100), pytest.raises(OSError, match="File too large"):
        Records(tmp_path, 2)
    assert not os.listdir(tmp_path)
