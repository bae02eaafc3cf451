"""`hpcsgd doctor`: what a support engineer asks first, on one page, and the mistakes with their fixes.

A new check is one file with a `CHECK`, and one row in `CHECKS`.
"""

from __future__ import annotations

from pathlib import Path

from hpcsgd.commands.doctor import (
    clock,
    cores,
    gpu,
    kernels,
    launcher,
    mpi_library,
    network,
    shared_memory,
    storage,
    versions,
)
from hpcsgd.commands.doctor.check import Check
from hpcsgd.commands.doctor.runner import examine

#: In the order of the page; a check may judge by the facts of those before it.
CHECKS: tuple[Check, ...] = tuple(
    module.CHECK
    for module in (
        versions,
        cores,
        mpi_library,
        launcher,
        shared_memory,
        network,
        clock,
        gpu,
        kernels,
        storage,
    )
)


def main(out: Path) -> int:
    """Examine this job; returns the exit status.

    Parameters
    ----------
    out
        The folder that runs go to.
    """
    return examine(CHECKS, out)
