"""The search for the files of a data set, and the errors for missing and corrupt files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hpcsgd.errors import HpcsgdError


def find_folder(names: Iterable[str], folders: Iterable[Path], suffixes: Iterable[str], page: str) -> Path:
    """Return the first folder with all files of a data set, each with one of the suffixes after its name.

    The page is the source of the files, for the error.

    Raises
    ------
    HpcsgdError
        No folder has all files; names those that are missing in the first folder.
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
        got="none in " + ", ".join(str(folder.absolute()) for folder in folders),
        do=f"download them from {page}, and set the option path=FOLDER of --data",
    )


def corrupt_file(file: Path, expected: object, got: object, page: str) -> HpcsgdError:
    """Return the error for a file with unexpected content."""
    what = f"{file} is truncated, corrupt, or of another format"
    return HpcsgdError(what, expected=expected, got=got, do=f"download it again from {page}")
