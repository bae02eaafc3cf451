"""Checks that the memory shared by the ranks of a node works, and that there is enough of it."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator

from hpcsgd.commands.doctor.check import Check, Facts, FactsByRank, Finding, lines_by_value, ranks_by_node
from hpcsgd.commands.doctor.ranks import ExaminedJob
from hpcsgd.mpi import environment
from hpcsgd.mpi.shared_memory import SharedAllocator

_TEST_BYTES = 2**20  # per rank
_MODEL = 100 * 10**6
_BUFFERS = 2  # buffers of the model's size per rank: gradients, and one more with most methods


def collect(job: ExaminedJob) -> Facts:
    problem = "" if environment.read("HPCSGD_SHARED_MEMORY") else "HPCSGD_SHARED_MEMORY=0"
    try:
        space = shutil.disk_usage("/dev/shm")
    except OSError:
        space = None
    return {
        "shm": (space.total, space.free) if space else None,
        "window": problem or _test_window(job),
    }


def _test_window(job: ExaminedJob) -> str:
    """Write a row of shared memory and read the rows of the other ranks; returns "" or the problem."""
    if job.node_comm is None:
        return ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        window = SharedAllocator(job.node_comm).allocate(_TEST_BYTES)
    if window is None:
        return " ".join(str(each.message) for each in caught) or "cannot be allocated"
    window.row[:] = job.node_comm.rank % 251
    job.node_comm.barrier("the rows of all ranks")
    wrong = [rank for rank, row in enumerate(window.rows) if (row != rank % 251).any()]
    job.node_comm.barrier("the rows of all ranks")
    return f"the writes of {len(wrong)} other ranks are not visible" if wrong else ""


def required_bytes(ranks_of_node: int) -> int:
    """Bytes of shared memory for a model of 100 MB."""
    return _MODEL * _BUFFERS * ranks_of_node


def describe(ranks: FactsByRank) -> Iterator[str]:
    yield from lines_by_value(ranks, _text)
    wide = max(map(len, ranks_by_node(ranks).values()))
    if wide > 1:
        yield f"a model of 100 MB needs {required_bytes(wide) / 1e6:,.0f} MB of it for {wide} ranks on a node"


def _text(facts: Facts) -> str:
    window = f"not shared: {facts['window']}" if facts["window"] else "shared memory works"
    if facts["shm"] is None:
        return f"{window}; no /dev/shm"
    total, free = facts["shm"]
    # Rounded, because the ranks of a node read it at different times.
    return f"{window}; /dev/shm has {free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def diagnose(ranks: FactsByRank) -> Iterator[Finding]:
    for members in ranks_by_node(ranks).values():
        facts = ranks[members[0]]
        space, host, need = facts["shm"], facts["host"], required_bytes(len(members))
        if len(members) == 1:
            continue
        if facts["window"]:
            yield Finding(
                "warning",
                f"no shared memory on {host} ({facts['window']}): the ranks of the node send messages, which "
                "is slower",
                "unset HPCSGD_SHARED_MEMORY, or give the node a larger /dev/shm",
            )
        if space is not None and space[1] < need:
            yield Finding(
                "warning",
                f"/dev/shm of {host} has {space[1] / 1e6:,.0f} of {space[0] / 1e6:,.0f} MB free; "
                f"{len(members)} ranks with a model of 100 MB need {need / 1e6:,.0f} MB",
                f"docker run --shm-size={-(-need // 2**30)}g (Apptainer: the host's); "
                f"mount -o remount,size={-(-need // 2**30)}g /dev/shm; remove files of ended jobs from it",
            )


CHECK = Check("memory", collect, describe, diagnose)
