"""Checks that all ranks use the same package versions."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator

from hpcsgd.commands.doctor.check import (
    Check,
    Facts,
    FactsByRank,
    Finding,
    lines_by_value,
    name_ranks,
    ranks_by_value,
)
from hpcsgd.commands.doctor.ranks import ExaminedJob
from hpcsgd.tensors.fingerprint import package_version

_PACKAGES = ("hpcsgd", "torch", "numpy", "mpi4py", "numba")


def collect(_: ExaminedJob) -> Facts:
    found = {name: package_version(name) for name in _PACKAGES}
    return {"versions": {**found, "Python": platform.python_version()}, "python": sys.executable}


def describe(ranks: FactsByRank) -> Iterator[str]:
    yield from lines_by_value(ranks, _text)
    yield from lines_by_value(ranks, lambda facts: facts["python"])


def _text(facts: Facts) -> str:
    return ", ".join(f"{name} {number}" for name, number in facts["versions"].items())


def diagnose(ranks: FactsByRank) -> Iterator[Finding]:
    for package in ranks[0]["versions"]:
        found = ranks_by_value(ranks, lambda facts, package=package: facts["versions"][package])  # type: ignore[misc]
        if len(found) > 1:
            listed = "; ".join(f"{number}: {name_ranks(members, ranks)}" for number, members in found.items())
            yield Finding(
                "error",
                f"ranks use different versions of {package} ({listed})",
                "start all ranks from one environment: a shared folder, or one container image on all nodes",
            )


CHECK = Check("versions", collect, describe, diagnose)
