"""Memory that the ranks of a node share: does it work, and is there enough."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator

from hpcsgd.commands.doctor.check import Check, Facts, Finding, Ranks, group, nodes_of, shown
from hpcsgd.commands.doctor.ranks import Job
from hpcsgd.mpi.shared_memory import Windows

_TRIED = 2**20  # bytes a rank
_MODEL = 100 * 10**6
_BUFFERS = 2  # of the model's size a rank: gradients, and one more of most methods


def gather(job: Job) -> Facts:
    problem = "HPCSGD_SHARED_MEMORY=0" if os.environ.get("HPCSGD_SHARED_MEMORY", "1") == "0" else ""
    try:
        room = shutil.disk_usage("/dev/shm")
    except OSError:
        room = None
    return {
        "shm": (room.total, room.free) if room else None,
        "window": problem or _try(job),
    }


def _try(job: Job) -> str:
    """Write into a window and read what the others wrote; "" or the problem."""
    if job.node is None:
        return ""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        window = Windows(job.node).allocate(_TRIED)
    if window is None:
        return " ".join(str(each.message) for each in said) or "cannot be allocated"
    window.row[:] = job.node.rank % 251
    job.node.barrier("the rows of all ranks")
    wrong = [rank for rank, row in enumerate(window.rows) if (row != rank % 251).any()]
    job.node.barrier("the rows of all ranks")
    return f"what {len(wrong)} other ranks wrote is not seen" if wrong else ""


def needed(ranks_of_node: int) -> int:
    """Bytes that windows of a 100 MB model take."""
    return _MODEL * _BUFFERS * ranks_of_node


def show(ranks: Ranks) -> Iterator[str]:
    yield from shown(group(ranks, _text), ranks)
    wide = max(map(len, nodes_of(ranks).values()))
    yield f"a model of 100 MB needs {needed(wide) / 1e6:,.0f} MB of it for {wide} ranks on a node" * (
        wide > 1
    )


def _text(facts: Facts) -> str:
    window = f"no windows: {facts['window']}" if facts["window"] else "windows work"
    if facts["shm"] is None:
        return f"{window}; no /dev/shm"
    total, free = facts["shm"]
    # Rounded, for the ranks of a node look at it one after the other.
    return f"{window}; /dev/shm has {free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def judge(ranks: Ranks) -> Iterator[Finding]:
    for members in nodes_of(ranks).values():
        facts = ranks[members[0]]
        room, host, need = facts["shm"], facts["host"], needed(len(members))
        if len(members) == 1:
            continue
        if facts["window"]:
            yield Finding(
                "warning",
                f"no shared memory on {host} ({facts['window']}): ranks of the node send messages, slower",
                "unset HPCSGD_SHARED_MEMORY, or give the node a larger /dev/shm",
            )
        if room is not None and room[1] < need:
            yield Finding(
                "warning",
                f"/dev/shm of {host} has {room[1] / 1e6:,.0f} of {room[0] / 1e6:,.0f} MB free; "
                f"{len(members)} ranks with a model of 100 MB need {need / 1e6:,.0f} MB",
                f"docker run --shm-size={-(-need // 2**30)}g (Apptainer: the host's); "
                f"mount -o remount,size={-(-need // 2**30)}g /dev/shm; remove what dead jobs left in it",
            )


CHECK = Check("memory", gather, show, judge)
