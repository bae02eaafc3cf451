"""`hpcsgd sbatch`: job scripts for Slurm, as text; those in `jobs/` are its output."""

# ruff: noqa: RUF009 - `option` returns a field

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import click

from hpcsgd import registry
from hpcsgd.commands.options import Value, add_options, option
from hpcsgd.commands.train import settings, sweep
from hpcsgd.errors import BadOption, os_errors, shown
from hpcsgd.registry import Accepted, Text, Within
from hpcsgd.registry.limits import Natural

#: Slurm's formats of a time limit; a number alone means minutes.
TIMES = ("minutes", "minutes:seconds", "hours:minutes:seconds", "days-hours", "days-hours:minutes")
_TIME = re.compile(r"(?:(\d+)-(\d+)(?::(\d+)(?::(\d+))?)?|(?:(?:(\d+):)?(\d+):)?(\d+))".replace("+", "{1,7}"))

_ENVIRONMENT = """
# The environment that hpcsgd is installed in; default: the one in which sbatch was called.
# shellcheck source=/dev/null
[ -z "${VENV:-}" ] || . "$VENV/bin/activate"

export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

# The launcher of the ranks. srun: pmi2 for MPICH and Intel MPI, pmix for Open MPI; `srun --mpi=list` lists
# the plugins of this cluster. mpiexec: that of the MPI itself, if srun has no plugin for it; it asks Slurm
# for the nodes. With the wrong launcher every rank would be rank 0 of 1, which hpcsgd detects and refuses.
mpi=${MPI_TYPE:-@mpi@}
if [ "$mpi" = mpiexec ]; then
    # Open MPI would bind ranks to fewer cores than they have, and fill one node after the other.
    export PRTE_MCA_hwloc_default_binding_policy=none I_MPI_PIN_DOMAIN=omp
    export PRTE_MCA_rmaps_default_mapping_policy="ppr:$SLURM_NTASKS_PER_NODE:node:oversubscribe"
    start=(mpiexec -n "$SLURM_NTASKS")
else
    start=(srun --mpi="$mpi" --cpus-per-task="$SLURM_CPUS_PER_TASK" --cpu-bind=cores)
fi

# Slurm signals this shell, which signals srun or mpiexec, which signal the ranks.
launch() {
    "${start[@]}" "$@" &
    trap 'kill -USR1 $! || true' USR1
    local status
    while
        status=0
        wait $! || status=$?
        kill -0 $! 2>/dev/null # still running: the trap ended the wait
    do :; done
    return "$status"
}
"""

_REQUEUED = """
newest() {
    set -- "$runs/$name"/checkpoints/step-*
    echo "${!#}"
}

before=$(newest)
status=0
@train@ || status=$?
[ ! -e "$runs/$name/done" ] || exit "$status"
# A run that was stopped, or failed, continues in the next slot, unless this slot made no checkpoint.
if [ "$(newest)" = "$before" ]; then
    echo "not requeued: $runs/$name has no newer checkpoint than before this slot" >&2
    exit $((status ? status : 1))
fi
scontrol requeue "$SLURM_JOB_ID"
"""

_ABOUT = {
    "train.sbatch": """
# Training under Slurm. Arguments of the script are options of `hpcsgd train`.
#   sbatch train.sbatch --data cifar10:path=$HOME/cifar --model resnet18
#   sbatch --nodes=4 --ntasks-per-node=8 --time=8:00:00 train.sbatch …
#   sbatch --ntasks-per-node=4 --cpus-per-task=12 --gpus-per-node=4 train.sbatch …     one GPU a rank
""",
    "requeue.sbatch": """
# Training under Slurm in any number of time slots: before the time limit the run writes a checkpoint, and the
# job is requeued, until the run is done. Arguments of the script are options of `hpcsgd train`.
#   sbatch requeue.sbatch --data cifar10:path=$HOME/cifar --model resnet18 --epochs 200
#   sbatch --nodes=4 --time=8:00:00 requeue.sbatch …     and GPUs as with train.sbatch
#   scancel --batch --signal=USR1 JOB     frees the nodes now: a checkpoint, and back into the queue
""",
    "array.sbatch": """
# A sweep under Slurm: one element of a job array for each [[run]] of a TOML file, on top of the settings that
# precede them in the file. Arguments after the file's name are options of `hpcsgd train`, for all runs.
#   sbatch --array=0-5 array.sbatch sweep.toml
#   hpcsgd report runs/JOB/*     when they are done; JOB is the number that sbatch printed
""",
}


def seconds(time: str) -> int:
    """Convert a time limit in one of Slurm's formats to seconds.

    Raises
    ------
    BadOption
        The text has none of these formats.
    """
    match = _TIME.fullmatch(time)
    if match is None:
        expected = ", ".join(TIMES) + " or days-hours:minutes:seconds, such as 8:00:00"
        raise BadOption("the time limit cannot be read", expected=expected, got=shown(time))
    days, hours, minutes, rest, *short = (int(text or 0) for text in match.groups())
    if match[1] is None:
        hours, minutes, rest = short if match[6] else (0, short[2], 0)
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def _check_word(text: str) -> None:
    if not text or re.search(r"[\s/]", text):
        raise ValueError(text)


#: A word that Slurm takes as a name.
Word = Annotated[str, Text(1, 255), Accepted(_check_word, "lasgd-8, without spaces or slashes")]


@dataclass(frozen=True)
class SlurmJob:
    """A job's resources and command, from which its script is written."""

    nodes: Annotated[int, Within(1, 10**6)] = settings.option(2, "Number of nodes.")
    ranks_per_node: Annotated[int, Within(1, 10**4)] = settings.option(2, "Ranks per node.")
    cpus: Annotated[int, Within(1, 10**4)] = settings.option(2, "Cores per rank.")
    gpus: Annotated[int, Within(0, 1000)] = settings.option(0, "GPUs per node; 0: none.")
    time: Annotated[str, Accepted(seconds)] = settings.option(
        "1:00:00", "Time limit: minutes, hours:minutes:seconds, days-hours, ..."
    )
    warn: Annotated[int, Within(1, 10**6)] = settings.option(
        120, "Seconds before the time limit at which the run writes a checkpoint and ends."
    )
    mpi: Literal["pmi2", "pmix", "mpiexec"] = settings.option(
        "pmi2", "Launcher of the ranks: srun with pmi2 or pmix, or mpiexec."
    )
    requeue: bool = settings.option(False, "Requeue the job until the run is done.")
    #: Number of runs of a sweep, one element of the job array each; 0: given to sbatch; None: no sweep.
    array: Natural | None = None
    name: Word = settings.option("hpcsgd", "Name of the job.")
    partition: Word | Literal[""] = settings.option("", "Partition to submit to; default: Slurm's.")
    account: Word | Literal[""] = settings.option("", "Account to charge; default: Slurm's.")
    arguments: Sequence[str] = ()  # arguments of `hpcsgd train`; with a sweep the first is the TOML file

    def __post_init__(self) -> None:
        registry.check_fields(self)
        if seconds(self.time) <= self.warn:
            raise BadOption(
                "--time leaves no time to train before --warn",
                expected=f"more than the {self.warn} seconds of --warn",
                got=self.time,
                do="raise --time, or lower --warn",
            )


def count_runs(path: str) -> int:
    """Return the number of runs of the sweep in a TOML file, after a check of the settings of each.

    Raises
    ------
    BadOption
        The file cannot be read, is no sweep, or a run has a wrong setting.
    """
    count = sweep.count_runs(settings.read_toml(path), path)
    for element in range(max(1, count)):
        settings.validate(settings.merge(settings.from_toml(path, element), {}))
    return count


def script(job: SlurmJob) -> str:
    """Return the script of a job; the same job gives the same text."""
    about, directives = _ABOUT[file_name(job)].strip(), "\n".join(_directives(job))
    body = (_REQUEUED if job.requeue else "@train@\n").replace("@train@", _train(job))
    parts = [
        f"#!/usr/bin/env bash\n{about}\n{directives}\nset -euo pipefail",
        _ENVIRONMENT.strip().replace("@mpi@", job.mpi),
        _run_variables(job),
        body.strip(),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def file_name(job: SlurmJob) -> str:
    """Return the name of such a script in `jobs/`."""
    if job.array is not None:
        return "array.sbatch"
    return "requeue.sbatch" if job.requeue else "train.sbatch"


def _directives(job: SlurmJob) -> Iterator[str]:
    yield f"#SBATCH --job-name={job.name}"
    for name in ("partition", "account"):
        if value := getattr(job, name):
            yield f"#SBATCH --{name}={value}"
    yield f"#SBATCH --nodes={job.nodes}"
    yield f"#SBATCH --ntasks-per-node={job.ranks_per_node}"
    yield f"#SBATCH --cpus-per-task={job.cpus}"
    if job.gpus:
        yield "# Each rank sees all GPUs of its node: hpcsgd takes the one of the local rank."
        yield f"#SBATCH --gpus-per-node={job.gpus}"
    if job.array:
        yield f"#SBATCH --array=0-{job.array - 1}"
    yield f"#SBATCH --time={job.time}"
    yield "# SIGUSR1 this many seconds, or up to 60 more, before the limit: the run ends with a checkpoint."
    yield f"#SBATCH --signal=B:USR1@{job.warn}"
    if job.requeue:
        yield "# Also requeued when a node fails, or when a job of higher priority takes the nodes."
        yield "#SBATCH --requeue\n#SBATCH --open-mode=append"


def _run_variables(job: SlurmJob) -> str:
    """Return the lines that set the folder and the name of the run."""
    lines = []
    if job.array is not None:
        if job.array == 0:
            lines += ["sweep=${1:?the TOML file of the sweep}", "shift"]
        lines += ["runs=${RUNS:-runs}/$SLURM_ARRAY_JOB_ID", "name=$SLURM_ARRAY_TASK_ID"]
    elif job.requeue:
        lines += [
            "# One name in all time slots. With NAME=… a new job continues the run of an earlier one.",
            "runs=${RUNS:-runs}",
            "name=${NAME:-$SLURM_JOB_NAME-$SLURM_JOB_ID}",
        ]
    return "\n".join(lines)


def _train(job: SlurmJob) -> str:
    """Return the line that trains; the script's own arguments come last and take precedence."""
    arguments = list(map(shlex.quote, job.arguments))
    if job.array is not None:
        file = arguments.pop(0) if job.array else '"$sweep"'
        arguments = [f'--config {file} --element "$SLURM_ARRAY_TASK_ID"', *arguments]
    if job.array is not None or job.requeue:
        arguments = ['--out "$runs" --name "$name" --resume auto', *arguments]
    return " ".join(["launch hpcsgd train", *arguments, '"$@"'])


@click.command()
@click.argument("kind", type=Value(Literal["train", "sweep"]))
@click.argument("arguments", nargs=-1, type=Value(str), metavar="[ARGUMENTS]...")
@partial(add_options, SlurmJob)
@option("--out", Path, "File to write the script to; default: standard output.", metavar="FILE", short="-o")
def sbatch(kind: str, arguments: tuple[str, ...], out: Path | None, **options: Any) -> None:
    """Write a job script for Slurm.

    For example: hpcsgd sbatch train --nodes 4 -- --data text > job.sbatch. ARGUMENTS are those of
    `hpcsgd train`; of a sweep the first is its TOML file, with a table [[run]] for each run. Without
    ARGUMENTS the script takes them from sbatch: sbatch job.sbatch ARGUMENTS. The scripts in jobs/ are of this
    kind.
    """
    array = None if kind == "train" else count_runs(arguments[0]) if arguments else 0
    text = script(SlurmJob(**options, array=array, arguments=arguments))
    if out is None:
        click.echo(text, nl=False)
        return
    with os_errors(f"cannot write {out}", do="give --out a file that can be written"):
        out.write_text(text)
