"""`hpcsgd bench ps`: parameter servers, with and without MPI groups, beside all-reduce."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcsgd.commands.bench.studies.launches import measure
from hpcsgd.commands.bench.studies.servers_results import Study

#: Of eight workers, as on nine ranks: pure parameter servers, and groups of two.
METHODS = ("allreduce", *(f"ps:mode={m},groups={g}" for m in ("sync", "async", "elastic") for g in (8, 4)))


def main(methods: Sequence[str] = METHODS, out: str | Path = "ps", **options: Any) -> None:
    """Measure, with options as of `launches.measure`."""
    measure(Study, methods, out, **options)
