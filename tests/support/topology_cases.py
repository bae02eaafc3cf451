"""All families of topologies over many numbers of peers; those that cannot be are left out by rule."""

from __future__ import annotations

from functools import cache

from hpcsgd.topology import TOPOLOGIES, Topology, build

SIZES = [*range(1, 18), 32, 64]
SPECS = [name for name in TOPOLOGIES if name != "file"]
SPECS += ["torus:rows=1", "base:k=2", "base:k=3", "random-regular:degree=4+seed=7"]


def possible(spec: str, size: int) -> bool:
    name, _, options = spec.partition(":")
    if name == "hypercube":
        return size & (size - 1) == 0
    if name == "random-regular":
        degree = 4 if "degree=4" in options else 3
        return size == 1 or (size > degree and size * degree % 2 == 0)
    return True


CASES = [(spec, size) for spec in SPECS for size in SIZES if possible(spec, size)]
IMPOSSIBLE = [(spec, size) for spec in SPECS for size in SIZES if not possible(spec, size)]


@cache
def made(spec: str, size: int) -> Topology:
    return build(spec, size)


def over_sizes(spec: str) -> list[Topology]:
    """One family over all numbers of peers that it can have."""
    return [made(*case) for case in CASES if case[0] == spec]
