"""Job scripts for Slurm, as text: what `hpcsgd sbatch` prints, and what `jobs/` holds."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from hpcsgd.commands.train import settings, sweep
from hpcsgd.errors import BadOption

#: Forms that Slurm reads a time limit in; a number alone are minutes.
TIMES = ("minutes", "minutes:seconds", "hours:minutes:seconds", "days-hours", "days-hours:minutes")
_TIME = re.compile(r"(?:(\d+)-(\d+)(?::(\d+)(?::(\d+))?)?|(?:(?:(\d+):)?(\d+):)?(\d+))")
#: What starts ranks: srun by one of its plugins, or the mpiexec of the MPI itself.
MPI_TYPES = ("pmi2", "pmix", "mpiexec")

_ENVIRONMENT = """
# The environment that holds hpcsgd; the one that sbatch was called from by default.
# shellcheck source=/dev/null
[ -z "${VENV:-}" ] || . "$VENV/bin/activate"

export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

# What starts the ranks. srun: pmi2 for MPICH and Intel MPI, pmix for Open MPI; `srun --mpi=list` tells what
# this cluster has. mpiexec: that of the MPI itself, if srun has none that fits; it asks Slurm for the nodes.
# With the wrong one every rank would be rank 0 of 1, which hpcsgd notices and refuses.
mpi=${MPI_TYPE:-@mpi@}
if [ "$mpi" = mpiexec ]; then
    # Open MPI would bind ranks to fewer cores than theirs, and fill one node after the other.
    export PRTE_MCA_hwloc_default_binding_policy=none I_MPI_PIN_DOMAIN=omp
    export PRTE_MCA_rmaps_default_mapping_policy="ppr:$SLURM_NTASKS_PER_NODE:node:oversubscribe"
    start=(mpiexec -n "$SLURM_NTASKS")
else
    start=(srun --mpi="$mpi" --cpus-per-task="$SLURM_CPUS_PER_TASK" --cpu-bind=cores)
fi

# Slurm warns this shell, which tells srun or mpiexec, which tell the ranks.
launch() {
    "${start[@]}" "$@" &
    trap 'kill -USR1 $! || true' USR1
    local status
    while
        status=0
        wait $! || status=$?
        kill -0 $! 2>/dev/null # it was the trap that ended the wait
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
# A run that was stopped goes on in the next slot; so does one that failed, unless it failed there before.
if [ "$(newest)" = "$before" ]; then
    echo "not requeued: $runs/$name has no newer checkpoint than before this slot" >&2
    exit $((status ? status : 1))
fi
scontrol requeue "$SLURM_JOB_ID"
"""

_ABOUT = {
    "train.sbatch": """
# Training under Slurm. What follows the script's name are options of `hpcsgd train`.
#   sbatch train.sbatch --data cifar10:path=$HOME/cifar --model resnet18
#   sbatch --nodes=4 --ntasks-per-node=8 --time=8:00:00 train.sbatch …
#   sbatch --ntasks-per-node=4 --cpus-per-task=12 --gpus-per-node=4 train.sbatch …     one GPU a rank
""",
    "requeue.sbatch": """
# Training under Slurm in any number of time slots: a checkpoint before the time limit, back into the queue,
# on from there, until the run is done. What follows the script's name are options of `hpcsgd train`.
#   sbatch requeue.sbatch --data cifar10:path=$HOME/cifar --model resnet18 --epochs 200
#   sbatch --nodes=4 --time=8:00:00 requeue.sbatch …     and GPUs as with train.sbatch
#   scancel --batch --signal=USR1 JOB     makes room now: a checkpoint, and back into the queue
""",
    "array.sbatch": """
# A sweep under Slurm: an element of a job array for each [[run]] of a TOML file, on top of what the file says
# before them. What follows the file's name are options of `hpcsgd train`, for all.
#   sbatch --array=0-5 array.sbatch sweep.toml
#   hpcsgd report runs/JOB/*     when they are done; JOB is the number that sbatch said
""",
}


@dataclass(frozen=True)
class Job:
    """What a script is to ask of Slurm.

    Parameters
    ----------
    nodes, ranks_per_node
        How many.
    cpus
        Of each rank.
    gpus
        Of each node; 0: none is asked for.
    time
        Time limit, in one of Slurm's forms, see `TIMES`.
    warn
        Seconds before the time limit at which the run is told to write a checkpoint and end.
    mpi
        One of `MPI_TYPES`.
    requeue
        Whether the job goes back into the queue until the run is done.
    array
        Number of runs of a sweep, of which each is an element; 0: to be given to sbatch; None: no sweep.
    name, partition, account
        Of the job; empty: hpcsgd, and Slurm's defaults.
    words
        Arguments of `hpcsgd train`; with a sweep the first is the TOML file.
    """

    nodes: int = 2
    ranks_per_node: int = 2
    cpus: int = 2
    gpus: int = 0
    time: str = "1:00:00"
    warn: int = 120
    mpi: str = "pmi2"
    requeue: bool = False
    array: int | None = None
    name: str = "hpcsgd"
    partition: str = ""
    account: str = ""
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option, low in ("nodes", 1), ("ranks_per_node", 1), ("cpus", 1), ("gpus", 0), ("warn", 1):
            value = getattr(self, option)
            if value < low:
                what = f"--{option.replace('_', '-')} is too small"
                raise BadOption(what, expected=f"at least {low}", got=value)
        if self.mpi not in MPI_TYPES:
            raise BadOption(f"unknown --mpi {self.mpi!r}", do="use one of: " + ", ".join(MPI_TYPES))
        for option in ("name", "partition", "account"):
            if re.search(r"[\s/]", getattr(self, option)):
                what = f"--{option} cannot have spaces or slashes"
                raise BadOption(what, got=repr(getattr(self, option)))
        if not self.name:
            raise BadOption("--name cannot be empty", do="leave it out")
        if seconds(self.time) <= self.warn:
            raise BadOption(
                "--time leaves nothing before the run is told to end",
                expected=f"more than the {self.warn} seconds of --warn",
                got=self.time,
            )


def seconds(time: str) -> int:
    """Read a time limit as Slurm does.

    Raises
    ------
    BadOption
        It has none of Slurm's forms.
    """
    match = _TIME.fullmatch(time)
    if match is None:
        raise BadOption(
            "--time cannot be read",
            expected=", ".join(TIMES) + " or days-hours:minutes:seconds, such as 8:00:00",
            got=repr(time),
        )
    days, hours, minutes, rest, *short = (int(text or 0) for text in match.groups())
    if match[1] is None:
        hours, minutes, rest = short if match[6] else (0, short[2], 0)
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def elements(path: str) -> int:
    """How many runs the sweep in a TOML file has; each is checked.

    Raises
    ------
    BadOption
        The file cannot be read, or is no sweep, or a run has a wrong setting.
    """
    count = sweep.count(settings.read_toml(path), path)
    for element in range(max(1, count)):
        settings.merge(settings.from_toml(path, element), {})
    return count


def script(job: Job) -> str:
    """Write the script of a job; the same job gives the same text."""
    about = _ABOUT[file_name(job)].strip()
    body = (_REQUEUED if job.requeue else "@train@\n").replace("@train@", _train(job))
    parts = [
        f"#!/usr/bin/env bash\n{about}\n{_directives(job)}\nset -euo pipefail",
        _ENVIRONMENT.strip().replace("@mpi@", job.mpi),
        _where(job),
        body.strip(),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def file_name(job: Job) -> str:
    """What such a script is called in `jobs/`."""
    if job.array is not None:
        return "array.sbatch"
    return "requeue.sbatch" if job.requeue else "train.sbatch"


def _directives(job: Job) -> str:
    return "\n".join(_lines(job))


def _lines(job: Job) -> Iterator[str]:
    yield f"#SBATCH --job-name={job.name}"
    for option in ("partition", "account"):
        if value := getattr(job, option):
            yield f"#SBATCH --{option}={value}"
    yield f"#SBATCH --nodes={job.nodes}"
    yield f"#SBATCH --ntasks-per-node={job.ranks_per_node}"
    yield f"#SBATCH --cpus-per-task={job.cpus}"
    if job.gpus:
        yield "# All GPUs of a node are seen by all of its ranks: hpcsgd takes that of the local rank."
        yield f"#SBATCH --gpus-per-node={job.gpus}"
    if job.array:
        yield f"#SBATCH --array=0-{job.array - 1}"
    yield f"#SBATCH --time={job.time}"
    yield "# So many seconds before the time limit, or up to 60 more, it is told to end with a checkpoint."
    yield f"#SBATCH --signal=B:USR1@{job.warn}"
    if job.requeue:
        yield "# Also when a node fails, or when a job that is more urgent takes its nodes."
        yield "#SBATCH --requeue\n#SBATCH --open-mode=append"


def _where(job: Job) -> str:
    """The lines that say which run this is."""
    lines = []
    if job.array is not None:
        if job.array == 0:
            lines += ["sweep=${1:?the TOML file of the sweep}", "shift"]
        lines += ["runs=${RUNS:-runs}/$SLURM_ARRAY_JOB_ID", "name=$SLURM_ARRAY_TASK_ID"]
    elif job.requeue:
        lines += [
            "# One name in all time slots. With NAME=… a new job goes on with the run of an earlier one.",
            "runs=${RUNS:-runs}",
            "name=${NAME:-$SLURM_JOB_NAME-$SLURM_JOB_ID}",
        ]
    return "\n".join(lines)


def _train(job: Job) -> str:
    """The line that trains; what is given to the script itself comes last and so wins."""
    words = list(map(shlex.quote, job.words))
    if job.array is not None:
        sweep = words.pop(0) if job.array else '"$sweep"'
        words = [f'--config {sweep} --element "$SLURM_ARRAY_TASK_ID"', *words]
    if job.array is not None or job.requeue:
        words = ['--out "$runs" --name "$name" --resume auto', *words]
    return " ".join(["launch hpcsgd train", *words, '"$@"'])
