"""The command line: the group of all commands, and the exit status of each outcome.

No module of this folder imports torch or MPI before its command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

import click

from hpcsgd.commands.bench.commands import bench
from hpcsgd.commands.doctor.command import doctor
from hpcsgd.commands.report.command import report
from hpcsgd.commands.sbatch import sbatch
from hpcsgd.commands.serve.command import serve
from hpcsgd.commands.topology.command import topology
from hpcsgd.commands.trace import trace
from hpcsgd.commands.train.command import train
from hpcsgd.commands.tune.command import tune
from hpcsgd.diagnostics import activity
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi import launcher, shutdown


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="hpcsgd")
def cli() -> None:
    """Communication-efficient distributed SGD over MPI: mpiexec -n 4 hpcsgd train."""


for _command in (bench, doctor, report, sbatch, serve, topology, trace, train, tune):
    cli.add_command(_command)


def run() -> None:
    """Run the command line as a process of its own."""
    try:
        main()
    except SystemExit as end:
        if shutdown.runs_foreign_code() or not isinstance(end.code, int):
            raise
        shutdown.leave_process(end.code)


def main() -> None:
    """Run the command line; an error is printed once, by one rank, instead of a traceback by every rank."""
    if launcher.size()[1] > 1:
        activity.begin_phase("importing torch and reading options")  # until its first World
    try:
        code = cli.main(standalone_mode=False)
    except click.UsageError as error:
        text = _one_line(error)
        _exit(2, lambda: click.echo(text, err=True))
    except click.Abort:
        if _mpi_is_up() and launcher.size()[1] > 1:
            # Perhaps this rank alone was interrupted: the exception ends the others too.
            raise KeyboardInterrupt from None
        _exit(130, lambda: click.echo("interrupted", err=True))
    except HpcsgdError as error:
        text = str(error)
        if _mpi_is_up() and launcher.size()[1] > 1 and not error.everywhere:
            raise  # the others may be inside a collective: the exception ends them too
        _exit(2, lambda: click.echo(f"hpcsgd: {text}", err=True))
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None or launcher.size()[1] > 1:
            raise
        text = f"hpcsgd: the output cannot be written: {error}; free space there, or write it elsewhere"
        _exit(1, lambda: click.echo(text, err=True))
    else:
        shutdown.exit_process(code if isinstance(code, int) else 0)


def _exit(code: int, show: Callable[[], None]) -> None:
    """Exit; all ranks are here for the same reason, and one of them prints it."""
    if shutdown.is_reporting_rank():
        show()
    shutdown.exit_process(code)


def _one_line(error: click.UsageError) -> str:
    """The message of a wrong command line, and where to read on; of an incomplete one the help itself."""
    message, context = error.format_message(), error.ctx
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):  # of click 8.2
        return message
    command = context.command_path if context is not None else "hpcsgd"
    return f"hpcsgd: {' '.join(message.split()).rstrip('.')}; see {command} --help"


def _mpi_is_up() -> bool:
    module = sys.modules.get("mpi4py.MPI")
    return module is not None and module.Is_initialized() and not module.Is_finalized()
