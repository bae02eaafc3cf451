"""`hpcsgd bench async`: methods that wait and that do not, with a slow rank, simulated, or a slow link."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcsgd.commands.bench.studies.asynchronous_results import Study
from hpcsgd.commands.bench.studies.launches import measure

METHODS = ("allreduce", "local:period=8", "sgp", "adpsgd", "lasgd:period=auto")


def main(methods: Sequence[str] = METHODS, out: str | Path = "async", **options: Any) -> None:
    """Measure, with options as of `launches.measure`."""
    measure(Study, methods, out, **options)
