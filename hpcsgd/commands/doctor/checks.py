"""All checks of `hpcsgd doctor`. A new check is one file with a `CHECK`, and one row in `CHECKS`."""

from __future__ import annotations

from hpcsgd.commands.doctor import (
    clock,
    cores,
    gpu,
    kernels,
    launcher,
    leftovers,
    load,
    mpi_library,
    network,
    shared_memory,
    storage,
    versions,
)
from hpcsgd.commands.doctor.check import Check

#: In the order of the page; a check may use the facts of the checks before it.
CHECKS: tuple[Check, ...] = tuple(
    module.CHECK
    for module in (
        versions,
        cores,
        load,
        mpi_library,
        launcher,
        shared_memory,
        leftovers,
        network,
        clock,
        gpu,
        kernels,
        storage,
    )
)
