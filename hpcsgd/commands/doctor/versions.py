"""Which packages each rank runs."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from hpcsgd.commands.doctor.check import Check, Facts, Finding, Ranks, group, name_of, shown
from hpcsgd.commands.doctor.ranks import Job

_PACKAGES = ("hpcsgd", "torch", "numpy", "mpi4py", "numba")


def gather(_: Job) -> Facts:
    found = {name: _version(name) for name in _PACKAGES}
    return {"versions": {**found, "Python": platform.python_version()}, "python": sys.executable}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def show(ranks: Ranks) -> Iterator[str]:
    yield from shown(group(ranks, _text), ranks)
    yield from shown(group(ranks, lambda facts: facts["python"]), ranks)


def _text(facts: Facts) -> str:
    return ", ".join(f"{name} {number}" for name, number in facts["versions"].items())


def judge(ranks: Ranks) -> Iterator[Finding]:
    for package in ranks[0]["versions"]:
        found = group(ranks, lambda facts, package=package: facts["versions"][package])  # type: ignore[misc]
        if len(found) > 1:
            who = "; ".join(f"{number}: {name_of(members, ranks)}" for number, members in found.items())
            yield Finding(
                "error",
                f"{package} is not the same everywhere ({who})",
                "start all ranks from one environment: a shared folder, or one container image on all nodes",
            )


CHECK = Check("versions", gather, show, judge)
