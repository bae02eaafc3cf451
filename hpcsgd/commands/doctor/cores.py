"""Hosts and nodes, and which cores each rank may use with how many threads."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import torch

from hpcsgd.commands.doctor.check import Check, Facts, Finding, Ranks, group, name_of, nodes_of, shown
from hpcsgd.commands.doctor.ranks import Job

_MOST_HOSTS = 4


def gather(job: Job) -> Facts:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": socket.gethostname(),
        "machine": boot.read_text().strip() if boot.exists() else socket.gethostname(),
        "node": job.nodes.index(job.members),
        "cores": frozenset(os.sched_getaffinity(0)),
        "machine cores": os.cpu_count() or 1,
        "quota": _quota(Path("/sys/fs/cgroup/cpu.max")),
        "threads": max(torch.get_num_threads(), _asked(os.environ.get("OMP_NUM_THREADS", ""))),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def _asked(threads: str) -> int:
    """Of `OMP_NUM_THREADS`, which may name several levels; torch takes no more than there are cores."""
    first = threads.split(",")[0].strip()
    return int(first) if first.isdigit() else 0


def _quota(limits: Path) -> float | None:
    """How many cores' time a container gives, which the cores it shows do not tell."""
    try:
        most, period = limits.read_text().split()
        return int(most) / int(period)
    except (OSError, ValueError):  # of a version without, or "max"
        return None


def show(ranks: Ranks) -> Iterator[str]:
    nodes = nodes_of(ranks)
    hosts = list(dict.fromkeys(facts["host"] for facts in ranks))
    more = f" and {len(hosts) - _MOST_HOSTS} more" if len(hosts) > _MOST_HOSTS else ""
    sizes = sorted({len(members) for members in nodes.values()})
    each = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    yield (
        f"ranks: {len(ranks)}, nodes: {len(nodes)}, ranks on a node: {each}; "
        f"hosts: {', '.join(hosts[:_MOST_HOSTS])}{more}"
    )
    yield from shown(group(ranks, _text), ranks)


def _text(facts: Facts) -> str:
    said = facts["OMP_NUM_THREADS"]
    quota = f", of whose time {facts['quota']:g}" if facts["quota"] is not None else ""
    return (
        f"cores {_list(facts['cores'])} of {facts['machine cores']}{quota}; threads {facts['threads']} "
        f"(OMP_NUM_THREADS {'not set' if said is None else said})"
    )


def _list(cores: frozenset[int]) -> str:
    mine = sorted(cores)
    whole = mine == list(range(mine[0], mine[-1] + 1)) and len(mine) > 1
    return f"{mine[0]}-{mine[-1]}" if whole else ", ".join(map(str, mine))


def judge(ranks: Ranks) -> Iterator[Finding]:
    for members in nodes_of(ranks).values():
        found = [*_binding(members, ranks)] or [*_threads(members, ranks)]
        yield from found
        if found:
            break  # the other nodes are started alike: once is enough to say it
    yield from _names(ranks)


def _binding(members: list[int], ranks: Ranks) -> Iterator[Finding]:
    mine = [ranks[rank]["cores"] for rank in members]
    union = frozenset().union(*mine)
    where, free = ranks[members[0]]["host"], ranks[members[0]]["machine cores"]
    loose = "mpiexec -bind-to none (MPICH), mpiexec --bind-to none (Open MPI), srun --cpu-bind=none"
    if len(union) == 1 and free > 1:
        yield Finding(
            "error" if len(members) > 1 else "warning",
            f"{name_of(members, ranks)} may use one core only, core {min(union)} of {free} on {where}",
            f"start with {loose}; under Slurm ask for --cpus-per-task",
        )
    elif len(union) > 1 and any(len(cores) == 1 for cores in mine):
        alone = [rank for rank in members if len(ranks[rank]["cores"]) == 1]
        yield Finding(
            "warning",
            f"one of the {free} cores of {where} for the two threads of a rank: {name_of(alone, ranks)}",
            f"start with {loose}, or give each rank more cores",
        )


def _threads(members: list[int], ranks: Ranks) -> Iterator[Finding]:
    union = frozenset().union(*(ranks[rank]["cores"] for rank in members))
    first = ranks[members[0]]
    cores = len(union) if first["quota"] is None else min(len(union), max(1, int(first["quota"])))
    threads = sum(ranks[rank]["threads"] for rank in members)
    narrow = [rank for rank in members if ranks[rank]["threads"] > len(ranks[rank]["cores"])]
    if threads <= cores and not narrow:
        return
    share = max(1, min(cores // len(members), *(len(ranks[rank]["cores"]) for rank in members)))
    has = f"{threads} threads of {len(members)} ranks on {_cores(cores)} of {first['host']}"
    if all(ranks[rank]["threads"] == 1 for rank in members):
        yield Finding(
            "warning",
            f"more ranks than cores: {len(members)} on {_cores(cores)} of {first['host']}",
            f"start {cores} on each node, or ask for more cores",
        )
    elif first["OMP_NUM_THREADS"] is None:
        yield Finding(
            "warning",
            f"OMP_NUM_THREADS is not set: {has}; hpcsgd divides the cores by itself, other libraries "
            "of a training script do not",
            f"export OMP_NUM_THREADS={share}",
        )
    else:
        asked = first["OMP_NUM_THREADS"]
        yield Finding(
            "warning",
            f"more threads than cores: {has}, with OMP_NUM_THREADS={asked}",
            f"export OMP_NUM_THREADS={share}",
        )


def _cores(count: int) -> str:
    return f"{count} core{'s' * (count > 1)}"


def _names(ranks: Ranks) -> Iterator[Finding]:
    for members in group(ranks, lambda facts: facts["machine"]).values():
        parts = {ranks[rank]["node"] for rank in members}
        names = sorted({ranks[rank]["host"] for rank in members})
        if len(parts) > 1:
            yield Finding(
                "warning",
                f"{name_of(members, ranks)}: one machine, which MPI takes for {len(parts)} nodes, so these "
                "ranks send messages instead of sharing memory",
                "name the machine once in the host file; start containers with --ipc=host",
            )
        elif len(names) > 1:
            yield Finding(
                "warning",
                f"{name_of(members, ranks)}: one node with several names ({', '.join(names)})",
                "give the containers of a machine one host name, or errors name hosts that are not there",
            )
    for host, members in group(ranks, lambda facts: facts["host"]).items():
        if len({ranks[rank]["machine"] for rank in members}) > 1:
            yield Finding(
                "warning",
                f"several machines are called {host} ({name_of(members, ranks)})",
                "give each its own host name: launchers and errors tell them apart by it",
            )


CHECK = Check("cores", gather, show, judge)
