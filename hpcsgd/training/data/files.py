"""Files of a data set: found, or named in an error; and of the right size, or refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hpcsgd.errors import HpcsgdError


def find(names: Iterable[str], folders: Iterable[Path], suffixes: Iterable[str], page: str) -> Path:
    """The first folder that holds all the files.

    Parameters
    ----------
    names
        Files that are needed.
    folders
        Where to look, in order.
    suffixes
        A file may have any of these appended to its name.
    page
        Where to get them.

    Raises
    ------
    HpcsgdError
        No folder holds all of them; names those missing in the first folder.
    """
    names, folders, suffixes = list(names), list(folders), list(suffixes)
    missing: list[str] = []
    for folder in folders:
        lacking = [n for n in names if not any((folder / (n + s)).is_file() for s in suffixes)]
        if not lacking:
            return folder
        missing = missing or lacking
    raise HpcsgdError(
        "files of the data set are missing: " + ", ".join(missing),
        expected=", ".join(names),
        got="looked in " + ", ".join(str(folder.absolute()) for folder in folders),
        do=f"download them from {page}, and give their folder: path=FOLDER",
    )


def corrupt(file: Path, expected: object, got: object, page: str) -> HpcsgdError:
    """The error for a file that is not what its name says."""
    what = f"{file} is truncated, corrupt, or of another format"
    return HpcsgdError(what, expected=expected, got=got, do=f"download it again from {page}")
