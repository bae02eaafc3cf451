"""`hpcsgd bench async`: synchronous and asynchronous methods with a simulated slow rank or a slow link."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcsgd.commands.bench.studies.asynchronous_results import AsyncStudy
from hpcsgd.commands.bench.studies.launches import run_study

METHODS = ("allreduce", "local:period=8", "sgp", "adpsgd", "lasgd:period=auto")


def main(methods: Sequence[str] = METHODS, out: str | Path = "async", **options: Any) -> None:
    """Run the study on the ranks of this job; options as for `launches.run_study`."""
    run_study(AsyncStudy, methods, out, **options)
