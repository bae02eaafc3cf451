"""`hpcsgd bench ps`: parameter servers, with and without MPI groups, beside all-reduce."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcsgd.commands.bench.studies.launches import run_study
from hpcsgd.commands.bench.studies.servers_results import ServerStudy

#: For eight workers, on nine ranks: each mode with groups of one rank and of two.
METHODS = ("allreduce", *(f"ps:mode={m},groups={g}" for m in ("sync", "async", "elastic") for g in (8, 4)))


def main(methods: Sequence[str] = METHODS, out: str | Path = "ps", **options: Any) -> None:
    """Run the study on the ranks of this job; options as for `launches.run_study`."""
    run_study(ServerStudy, methods, out, **options)
