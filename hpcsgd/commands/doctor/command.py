"""`hpcsgd doctor` on the command line."""

from __future__ import annotations

from pathlib import Path

import click

from hpcsgd.commands.options import option


@click.command()
@option("--out", Path, "Folder of the runs: its file system is checked.", "runs", metavar="FOLDER")
def doctor(out: Path) -> int:
    """Check the setup of this cluster: mpiexec -n 4 hpcsgd doctor.

    Use the launcher that trains. Prints one page within seconds: versions, MPI, launcher, cores, shared
    memory, links, clocks, GPUs, kernels, file system; then each mistake with its fix. The exit status is 1 if
    one of them is an error.
    """
    from hpcsgd.commands.doctor.checks import CHECKS
    from hpcsgd.commands.doctor.runner import run_checks

    return run_checks(CHECKS, out)
