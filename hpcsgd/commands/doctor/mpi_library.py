"""The MPI library: its thread level, and what it says of device memory and of failed ranks."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpcsgd.commands.doctor.check import Check, Facts, Finding, Ranks, group, name_of, shown
from hpcsgd.commands.doctor.ranks import Job

_FAULT_TOLERANT = "OMPI_MCA_mpi_ft_enable"  # set by mpiexec --with-ft ulfm
_LEVELS = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")


def gather(job: Job) -> Facts:
    if job.mpi is None:
        return {"mpi": "", "mpi problem": job.problem, "mpi cuda": None}
    name = job.mpi.Get_library_version()
    return {
        "mpi": _short(name),
        "mpi problem": "",
        "thread level": next(level for level in _LEVELS if job.mpi.Query_thread() == _value(job.mpi, level)),
        "failed ranks": _fault_tolerance(job.mpi, name),
        "mpi cuda": _cuda_support(),
        "cuda aware": os.environ.get("HPCSGD_CUDA_AWARE", "0") == "1",
    }


def _value(mpi: Any, level: str) -> int:
    return int(getattr(mpi, f"THREAD_{level}"))


def _short(library: str) -> str:
    """ "MPICH 5.0.2" of its many lines."""
    first = library.splitlines()[0].split(",")[0].strip(" \0")
    return re.sub(r"\s*Version:\s*", " ", first)


def _fault_tolerance(mpi: Any, library: str) -> str:
    try:
        mpi.COMM_SELF.Is_revoked()
    except (AttributeError, NotImplementedError):
        return "no ULFM: one dead rank ends the job"
    if "Open MPI" not in library:
        return "its launcher ends the job when one rank dies"
    if os.environ.get(_FAULT_TOLERANT, "").lower() in ("1", "true", "yes"):
        return "ULFM is on: survivors may go on"
    return "ULFM is off; mpiexec --with-ft ulfm lets survivors go on"


def _cuda_support() -> bool | None:
    """What `MPIX_Query_cuda_support` of the loaded library says; None where it has no such function."""
    maps = Path("/proc/self/maps")
    loaded = set(re.findall(r"/\S*/libmpi[^/\s]*\.so\S*", maps.read_text())) if maps.exists() else set()
    for path in sorted(loaded):
        try:
            return bool(ctypes.CDLL(path).MPIX_Query_cuda_support())
        except (OSError, AttributeError):
            continue
    return None


def show(ranks: Ranks) -> Iterator[str]:
    yield from shown(group(ranks, _text), ranks)
    cuda = {True: "yes", False: "no", None: "it does not say"}
    asked = {True: "set", False: "not set"}
    yield from shown(
        group(
            ranks,
            lambda facts: (
                f"takes device memory: {cuda[facts['mpi cuda']]}; "
                f"HPCSGD_CUDA_AWARE {asked[facts.get('cuda aware', False)]}"
            ),
        ),
        ranks,
    )


def _text(facts: Facts) -> str:
    if facts["mpi problem"]:
        return f"none: {facts['mpi problem']}"
    return f"{facts['mpi']}, MPI_THREAD_{facts['thread level']}; {facts['failed ranks']}"


def judge(ranks: Ranks) -> Iterator[Finding]:
    if ranks[0]["mpi problem"]:
        return  # what was to start it is judged by `launch`
    libraries = group(ranks, lambda facts: facts["mpi"])
    if len(libraries) > 1:
        who = "; ".join(f"{name}: {name_of(members, ranks)}" for name, members in libraries.items())
        yield Finding("error", f"ranks use different MPI libraries ({who})", "load one MPI on all nodes")
    low = [rank for rank, facts in enumerate(ranks) if facts["thread level"] != "MULTIPLE"]
    if low:
        level = ranks[low[0]]["thread level"]
        yield Finding(
            "warning",
            f"MPI gives MPI_THREAD_{level} to {name_of(low, ranks)}: communication overlaps with nothing, "
            "and asynchronous methods do not start",
            "use an MPI with MPI_THREAD_MULTIPLE (MPICH: --enable-threads=multiple), or a script that does "
            "not initialise MPI with less",
        )
    wrong = [r for r, facts in enumerate(ranks) if facts["cuda aware"] and facts["mpi cuda"] is False]
    if wrong:
        yield Finding(
            "error",
            f"HPCSGD_CUDA_AWARE=1 on {name_of(wrong, ranks)}, but this MPI says that it takes no device "
            "memory: it will crash",
            "unset HPCSGD_CUDA_AWARE, or use an MPI that is built with CUDA",
        )
    settings = group(ranks, lambda facts: facts["cuda aware"])
    if len(settings) > 1:
        yield Finding(
            "error",
            f"HPCSGD_CUDA_AWARE=1 on {name_of(settings[True], ranks)} only",
            "give all ranks the same environment: mpiexec -genv (MPICH), -x (Open MPI), srun --export=ALL",
        )


CHECK = Check("MPI", gather, show, judge)
