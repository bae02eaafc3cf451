"""Checks that other programs leave the cores to the ranks, from what runs now, not from the load average."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from hpcsgd.commands.doctor.check import Check, Facts, FactsByRank, Finding, ranks_by_node
from hpcsgd.commands.doctor.cores import cores_of_node, usable_cores
from hpcsgd.commands.doctor.ranks import ExaminedJob
from hpcsgd.diagnostics import procfs

_SECONDS = 0.5  # longer than the bursts of an idle machine
_MOST_PROGRAMS = 3  # that are named
_LEAST_SHARE = 0.1  # of a core, of these
_SLACK, _LEAST_SLACK = 0.1, 0.25  # of the cores, and in cores: the rest of an idle machine's programs


def collect(job: ExaminedJob) -> Facts:
    own = [os.getpid()] if job.node_comm is None else job.node_comm.gather_objects(os.getpid(), "process ids")
    facts: Facts = {"busy cores": {}, "programs": []}
    job.barrier()
    started, used = time.monotonic(), time.process_time()
    if job.leader:
        others = sorted(set(procfs.processes()) - set(own))
        before = procfs.busy_seconds()
        shares = procfs.load(others, _SECONDS)
        after, elapsed = procfs.busy_seconds(), time.monotonic() - started
        facts["busy cores"] = {core: (after.get(core, 0.0) - busy) / elapsed for core, busy in before.items()}
        most = sorted(shares, key=shares.__getitem__, reverse=True)[:_MOST_PROGRAMS]
        facts["programs"] = [
            (procfs.name(pid), pid, shares[pid]) for pid in most if shares[pid] >= _LEAST_SHARE
        ]
    else:
        time.sleep(_SECONDS)
    facts["own cores"] = (time.process_time() - used) / (time.monotonic() - started)
    # The other ranks of the node compute again when all have measured.
    job.barrier()
    return facts


def _used_by_others(members: list[int], ranks: FactsByRank) -> float:
    """Cores of a node that others than the ranks use, of those that the ranks may use."""
    busy: dict[int, float] = ranks[members[0]]["busy cores"]
    used = sum(busy.get(core, 0.0) for core in usable_cores(members, ranks))
    own: float = sum(ranks[rank]["own cores"] for rank in members)
    return max(0.0, used - own)


def describe(ranks: FactsByRank) -> Iterator[str]:
    nodes = list(ranks_by_node(ranks).values())
    busiest = max(nodes, key=lambda members: _used_by_others(members, ranks))
    used, total = _used_by_others(busiest, ranks), len(usable_cores(busiest, ranks))
    where = f" of {ranks[busiest[0]]['host']}, the busiest node" if len(nodes) > 1 else ""
    yield f"other programs use {used:.1f} of {total} core{'s' * (total > 1)}{where}"


def diagnose(ranks: FactsByRank) -> Iterator[Finding]:
    for members in ranks_by_node(ranks).values():
        first, used = ranks[members[0]], _used_by_others(members, ranks)
        total = len(usable_cores(members, ranks))
        threads = sum(max(1, ranks[rank]["threads"]) for rank in members)
        needed = min(threads, cores_of_node(members, ranks))
        if needed <= total - used + max(_LEAST_SLACK, _SLACK * total):
            continue
        others = f"other programs use {used:.1f} of {total} core{'s' * (total > 1)}"
        most = ", ".join(f"{name} ({share:.1f}, process {pid})" for name, pid, share in first["programs"])
        yield Finding(
            "warning",
            f"{first['host']} is busy: {others}; the ranks need {needed}" + f"; most by {most}" * bool(most),
            "end these programs, wait for them, or have the node alone (Slurm: --exclusive); until then the "
            "training and the measurements on this page are slowed down",
        )


CHECK = Check("load", collect, describe, diagnose)
