"""All checks of `hpcsgd doctor`. A new check is one file with a `CHECK`, and its name in `CHECKS`."""

from __future__ import annotations

from importlib import import_module

from hpcsgd.commands.doctor.check import Check

#: In the order of the page; a check may use the facts of the checks before it.
CHECKS: tuple[Check, ...] = tuple(
    import_module(f"{__package__}.{name}").CHECK
    for name in (
        *("versions", "cores", "load", "mpi_library", "launcher", "shared_memory"),
        *("leftovers", "network", "clock", "gpu", "kernels", "storage"),
    )
)
