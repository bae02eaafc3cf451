"""Checks hosts and nodes, and the cores and threads of each rank."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from hpcsgd.commands.doctor.check import (
    Check,
    Facts,
    FactsByRank,
    Finding,
    lines_by_value,
    name_ranks,
    ranks_by_node,
    ranks_by_value,
)
from hpcsgd.commands.doctor.ranks import ExaminedJob
from hpcsgd.mpi import environment

_MAX_HOSTS = 4


def collect(job: ExaminedJob) -> Facts:
    boot, quota = Path("/proc/sys/kernel/random/boot_id"), environment.cpu_quota()
    return {
        "host": socket.gethostname(),
        "machine": boot.read_text().strip() if boot.exists() else socket.gethostname(),
        "node": job.nodes.index(job.members),
        "cores": frozenset(os.sched_getaffinity(0)),
        "machine cores": os.cpu_count() or 1,
        "quota": quota if math.isfinite(quota) else None,  # in cores; None without one
        "threads": max(torch.get_num_threads(), _requested_threads(os.environ.get("OMP_NUM_THREADS", ""))),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def _requested_threads(threads: str) -> int:
    """The first number in `OMP_NUM_THREADS`, which may list several levels; torch caps it at the cores."""
    first = threads.split(",")[0].strip()
    return int(first) if first.isdigit() else 0


def usable_cores(members: Sequence[int], ranks: FactsByRank) -> frozenset[int]:
    """The cores that ranks of a node may use."""
    return frozenset().union(*(ranks[rank]["cores"] for rank in members))


def cores_of_node(members: Sequence[int], ranks: FactsByRank) -> int:
    """The number of cores for ranks of a node, within the quota of a container."""
    cores, quota = len(usable_cores(members, ranks)), ranks[members[0]]["quota"]
    return cores if quota is None else min(cores, max(1, int(quota)))


def describe(ranks: FactsByRank) -> Iterator[str]:
    nodes = ranks_by_node(ranks)
    hosts = list(dict.fromkeys(facts["host"] for facts in ranks))
    more = f" and {len(hosts) - _MAX_HOSTS} more" if len(hosts) > _MAX_HOSTS else ""
    sizes = sorted({len(members) for members in nodes.values()})
    each = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    yield (
        f"ranks: {len(ranks)}, nodes: {len(nodes)}, ranks on a node: {each}; "
        f"hosts: {', '.join(hosts[:_MAX_HOSTS])}{more}"
    )
    yield from lines_by_value(ranks, _text)


def _text(facts: Facts) -> str:
    variable = facts["OMP_NUM_THREADS"]
    quota = f", with a quota of {facts['quota']:g} cores" if facts["quota"] is not None else ""
    return (
        f"cores {_list(facts['cores'])} of {facts['machine cores']}{quota}; threads {facts['threads']} "
        f"(OMP_NUM_THREADS {'not set' if variable is None else variable})"
    )


def _list(cores: frozenset[int]) -> str:
    numbers = sorted(cores)
    contiguous = numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 1
    return f"{numbers[0]}-{numbers[-1]}" if contiguous else ", ".join(map(str, numbers))


def diagnose(ranks: FactsByRank) -> Iterator[Finding]:
    for members in ranks_by_node(ranks).values():
        found = [*_binding(members, ranks)] or [*_threads(members, ranks)]
        yield from found
        if found:
            break  # all nodes are started alike, so one node is enough
    yield from _names(ranks)


def _binding(members: list[int], ranks: FactsByRank) -> Iterator[Finding]:
    affinities = [ranks[rank]["cores"] for rank in members]
    union = usable_cores(members, ranks)
    host, total = ranks[members[0]]["host"], ranks[members[0]]["machine cores"]
    unbound = "mpiexec -bind-to none (MPICH), mpiexec --bind-to none (Open MPI), srun --cpu-bind=none"
    if len(union) == 1 and total > 1:
        yield Finding(
            "error" if len(members) > 1 else "warning",
            f"{name_ranks(members, ranks)} may use one core only, core {min(union)} of {total} on {host}",
            f"start without binding: {unbound}; under Slurm request --cpus-per-task",
        )
    elif len(union) > 1 and any(len(cores) == 1 for cores in affinities):
        bound = [rank for rank in members if len(ranks[rank]["cores"]) == 1]
        yield Finding(
            "warning",
            f"bound to one of the {total} cores of {host}, with two threads per rank: "
            f"{name_ranks(bound, ranks)}",
            f"start without binding: {unbound}; or give each rank more cores",
        )


def _threads(members: list[int], ranks: FactsByRank) -> Iterator[Finding]:
    first, cores = ranks[members[0]], cores_of_node(members, ranks)
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
            f"start {cores} on each node (--ntasks-per-node), or request more cores",
        )
    elif first["OMP_NUM_THREADS"] is None:
        yield Finding(
            "warning",
            f"OMP_NUM_THREADS is not set: {has}; hpcsgd divides the cores between the ranks itself, other "
            "libraries of a training script do not",
            f"export OMP_NUM_THREADS={share}",
        )
    else:
        variable = first["OMP_NUM_THREADS"]
        yield Finding(
            "warning",
            f"more threads than cores: {has}, with OMP_NUM_THREADS={variable}",
            f"export OMP_NUM_THREADS={share}",
        )


def _cores(count: int) -> str:
    return f"{count} core{'s' * (count > 1)}"


def _names(ranks: FactsByRank) -> Iterator[Finding]:
    for members in ranks_by_value(ranks, lambda facts: facts["machine"]).values():
        parts = {ranks[rank]["node"] for rank in members}
        names = sorted({ranks[rank]["host"] for rank in members})
        if len(parts) > 1:
            yield Finding(
                "warning",
                f"{name_ranks(members, ranks)}: one machine that MPI treats as {len(parts)} nodes, so these "
                "ranks send messages instead of sharing memory",
                "list the machine once in the host file; start containers with --ipc=host",
            )
        elif len(names) > 1:
            yield Finding(
                "warning",
                f"{name_ranks(members, ranks)}: one node with several names ({', '.join(names)})",
                "give all containers of a machine one host name; else error messages name hosts that do not "
                "exist",
            )
    for host, members in ranks_by_value(ranks, lambda facts: facts["host"]).items():
        if len({ranks[rank]["machine"] for rank in members}) > 1:
            yield Finding(
                "warning",
                f"several machines have the host name {host} ({name_ranks(members, ranks)})",
                "give each machine its own host name, by which launchers and error messages identify it",
            )


CHECK = Check("cores", collect, describe, diagnose)
