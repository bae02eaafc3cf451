"""Finds files of shared memory that ended jobs have left: they hold memory until they are removed."""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from hpcsgd.commands.doctor.check import Check, Facts, FactsByRank, Finding, ranks_by_node
from hpcsgd.commands.doctor.ranks import ExaminedJob
from hpcsgd.diagnostics import procfs

_FOLDER = Path("/dev/shm")
#: The library by the beginning of the name.
_PREFIXES = {
    "mpich_shm_": "MPICH",
    "mpich_shar_tmp": "MPICH",
    "ucx_shm_posix_": "UCX",
    "sm_segment.": "Open MPI",
    "vader_segment.": "Open MPI",
    "hpcsgd-": "hpcsgd",
}
_LISTED = 8  # files that the page names; a command to remove them names more
_REMOVED = 30


class SharedFile(NamedTuple):
    """A file of shared memory."""

    #: The file, the library that has made it, its owner and its size.
    name: str
    library: str
    owner: str
    nbytes: int
    #: Processes that map it; None if the owner's processes cannot be examined.
    processes: tuple[int, ...] | None

    def __str__(self) -> str:
        pids = self.processes
        state = "of which the processes are not visible" if pids is None else "mapped by no process"
        if pids:
            state = f"mapped by process{'es' * (len(pids) > 1)} {', '.join(map(str, pids[:3]))}"
            state += f" and {len(pids) - 3} more" * (len(pids) > 3)
        return f"{self.name}: {_megabytes([self])}, {self.library}, {self.owner}, {state}"


def collect(job: ExaminedJob) -> Facts:
    return {"shared files": find() if job.leader else []}


def find(folder: Path = _FOLDER) -> list[SharedFile]:
    """Return the files in a folder but for those of this process: of ended jobs first, then by size."""
    files = [(path, _stat(path)) for path in folder.glob("*") if _library(path.name)]
    # After the listing: a job that starts maps its file before the maps are read.
    mapped, hidden = procfs.mappings(str(folder)) if files else ({}, set())
    found = []
    for path, about in files:
        if about is None:
            continue
        pids = mapped.get((about.st_dev, about.st_ino), set())
        if os.getpid() in pids:
            continue
        is_hidden = about.st_uid in hidden or os.geteuid() not in (0, about.st_uid)
        known = None if is_hidden and not pids else tuple(sorted(pids))
        found.append(SharedFile(path.name, _library(path.name), _user(about.st_uid), about.st_size, known))
    return sorted(found, key=lambda file: (file.processes != (), -file.nbytes, file.name))


def _stat(path: Path) -> os.stat_result | None:
    with contextlib.suppress(OSError):  # it has just been removed
        return path.stat()
    return None


def _library(name: str) -> str:
    return next((library for prefix, library in _PREFIXES.items() if name.startswith(prefix)), "")


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _megabytes(files: Sequence[SharedFile]) -> str:
    return f"{sum(file.nbytes for file in files) / 1e6:,.1f} MB"


def describe(ranks: FactsByRank) -> Iterator[str]:
    for members in ranks_by_node(ranks).values():
        facts = ranks[members[0]]
        files, where = facts["shared files"], f"/dev/shm of {facts['host']}"
        if files:
            yield f"{where} has {len(files)} files of other jobs, {_megabytes(files)}"
            yield from map(str, files[:_LISTED])
            if len(files) > _LISTED:
                yield f"and {len(files) - _LISTED} more, {_megabytes(files[_LISTED:])}"
    if not any(facts["shared files"] for facts in ranks):
        yield "no files of other jobs in /dev/shm"


def diagnose(ranks: FactsByRank) -> Iterator[Finding]:
    for members in ranks_by_node(ranks).values():
        facts = ranks[members[0]]
        left = [file for file in facts["shared files"] if file.processes == ()]
        if not left:
            continue
        names = ", ".join(file.name for file in left[:2]) + ", ..." * (len(left) > 2)
        yield Finding(
            "warning",
            f"/dev/shm of {facts['host']} has {len(left)} file{'s' * (len(left) > 1)} of ended jobs, "
            f"{_megabytes(left)} of memory, mapped by no process: {names}",
            f"on {facts['host']}: rm " + " ".join(f"/dev/shm/{file.name}" for file in left[:_REMOVED]),
        )


CHECK = Check("leftovers", collect, describe, diagnose)
