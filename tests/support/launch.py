"""Real MPI jobs started from a test, independent of the launcher of the test itself."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_LAUNCHERS = ("PMI", "PMIX", "HYDRA", "OMPI", "MPI", "PRTE", "MPIR")
_MARK = "HPCSGD_TEST_JOB"
_EXIT_TIMEOUT = 3.0  # seconds for the ranks of a job to exit after mpiexec

#: The start of every script: imports torch without the compiler, which takes as long as the rest of it and
#: which optimizers import to disable it for themselves. Nor does garbage collection traverse the modules,
#: again and again at the start, and at the end.
UNCOMPILED = """
import gc, sys, types
sys.modules["torch._dynamo"] = types.SimpleNamespace(
    disable=lambda function, *_, **__: function, graph_break=lambda *_, **__: None
)
gc.disable()
import torch
gc.freeze()
gc.enable()
"""
#: The start of a script that calls `hpcsgd`, without what takes longer to import than short runs last:
#: TensorBoard.
CLI = """
import sys
sys.modules["torch.utils.tensorboard"] = None
from hpcsgd.commands.cli import main, run
"""


@dataclass
class Finished:
    """The result of a job.

    Attributes
    ----------
    left
        Command lines of its processes that still ran some seconds after mpiexec had ended.
    files
        The files that remained in its /dev/shm.
    timed_out
        Whether it had to be killed.
    """

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    left: list[str]
    files: list[str]
    timed_out: bool

    def __str__(self) -> str:
        return (
            f"exit {self.returncode} after {self.seconds:.1f} s, timed out: {self.timed_out}, "
            f"left: {self.left} {self.files}\n{self.stdout}\n{self.stderr}"
        )


def launch(
    script: str,
    ranks: int,
    *args: str,
    timeout: float = 40.0,
    env: Mapping[str, str] | None = None,
    shm: str = "256m",
    meanwhile: Callable[[dict[int, str]], None] | None = None,
) -> Finished:
    """Run `mpiexec -n ranks python -c script args`.

    Parameters
    ----------
    timeout
        Seconds until the job is killed.
    env
        Further environment variables.
    shm
        Size of the job's /dev/shm, which is its own where that is allowed (`has_private_shm`).
    meanwhile
        Called with the ids and command lines of the job's processes after its first line of output.
    """
    mark = uuid.uuid4().hex
    command = [*mpiexec(), "-n", str(ranks), sys.executable, "-c", UNCOMPILED + script, *args]
    if has_private_shm():
        # The listing comes from inside: the namespace ends with its last process.
        end = 'code=$?; sleep 0.3; echo "/dev/shm:" $(ls -A /dev/shm) >&2; exit $code'
        command = with_private_shm(command, shm, end)
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(mark, env or {}),
        start_new_session=True,
    )
    timed_out = False
    try:
        if meanwhile is not None:
            assert process.stdout is not None
            first = process.stdout.readline()
            meanwhile(processes(mark))
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        timed_out = True
        _kill(mark)
        out, err = process.communicate()
    except BaseException:  # raised by `meanwhile`
        _kill(mark)
        raise
    seconds = time.monotonic() - started
    left = _wait_for_end(mark)
    out = first + out if meanwhile is not None else out
    err, _, files = err.rpartition("/dev/shm:") if has_private_shm() else (err, "", "")
    return Finished(process.returncode, out, err, seconds, left, files.split(), timed_out)


def run_alone(
    script: str, *args: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -c script args` without mpiexec; `env` has further environment variables."""
    return subprocess.run(
        [sys.executable, "-c", script, *args],
        capture_output=True,
        text=True,
        env=_environment("", env or {}),
        timeout=50,
    )


def mpiexec() -> list[str]:
    """Return the command that starts a job of the MPI that mpi4py uses."""
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    assert found, "there is no mpiexec, neither beside python nor in PATH"
    return [found, "--oversubscribe"] if is_open_mpi() else [found]


@cache
def is_open_mpi() -> bool:
    try:
        version("openmpi")
    except PackageNotFoundError:
        code = "from mpi4py import MPI; print(MPI.Get_library_version())"
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=_environment("", {})
        )
        return "Open MPI" in found.stdout
    return True


def with_private_shm(command: list[str], size: str, end: str = "") -> list[str]:
    """Return a command that runs another one in a namespace with a /dev/shm of its own.

    Parameters
    ----------
    command
        The other command.
    size
        Size of /dev/shm.
    end
        What the shell runs afterwards.
    """
    inside = f'mount -t tmpfs -o size={size} tmpfs /dev/shm; trap : INT; "$@"; {end}'
    return [*_unshare(), "sh", "-c", inside, "sh", *command]


@cache
def has_private_shm() -> bool:
    """Return whether a job can have a /dev/shm of its own."""
    script = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    try:
        return not subprocess.run([*_unshare(), "sh", "-c", script], capture_output=True).returncode
    except FileNotFoundError:
        return False


def processes(mark: str) -> dict[int, str]:
    """Return the process ids and command lines of a job: mpiexec and its helpers, and the ranks."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{_MARK}={mark}".encode() in (folder / "environ").read_bytes():
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(folder.name)] = command[:200]
        except OSError:
            continue
    return found


def rank_processes(job: Iterable[int]) -> dict[int, int]:
    """Return the process of each rank among the processes of a job."""
    found = {}
    for pid in job:
        with contextlib.suppress(OSError):
            variables = Path(f"/proc/{pid}/environ").read_bytes().decode().replace("\0", "\n")
            rank = re.search(r"^(?:PMI|OMPI_COMM_WORLD)_RANK=(\d+)$", variables, re.MULTILINE)
            if rank:
                found.setdefault(int(rank[1]), pid)
    return found


def _unshare() -> list[str]:
    return ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]


def _environment(mark: str, more: Mapping[str, str]) -> dict[str, str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_LAUNCHERS) or name.startswith(("OMPI_ALLOW_RUN_AS", "OMPI_MCA_osc"))
    }
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, _MARK: mark, **more}


def _wait_for_end(mark: str) -> list[str]:
    deadline = time.monotonic() + _EXIT_TIMEOUT
    while processes(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = list(processes(mark).values())
    _kill(mark)
    return left


def _kill(mark: str) -> None:
    for pid in processes(mark):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
