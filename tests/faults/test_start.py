"""A rank that never completes its start: the job ends at the deadline, and one error names what it does."""

from __future__ import annotations

import re

import pytest

from tests.support import launch as jobs
from tests.support.failing_jobs import BEGIN, SECONDS, check_end
from tests.support.launch import Finished, launch

pytestmark = pytest.mark.timeout(150)

#: All ranks of these jobs have imported torch, and begin here.
TOGETHER = BEGIN + (
    "import ctypes, signal\n"
    "from mpi4py import MPI\n"
    "MPI.COMM_WORLD.Barrier()\n"
    "rank = MPI.COMM_WORLD.rank\n"
    "def hold_lock(*_): ctypes.PyDLL(None).sleep(1000)\n"
)
#: An import that lasts.
LATE = """
import importlib.abc, sys, time
def late(module):
    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name == module: time.sleep(1000)
    sys.meta_path.insert(0, Finder())
"""
NODE_REDUCE = "hpcsgd.kernels.sums.node_reduce"


def end_of(script: str, *words: str) -> Finished:
    job = launch(script, 3, *words, timeout=SECONDS, env={"HPCSGD_TIMEOUT": "3"})
    check_end(job)
    return job


def assert_named(job: Finished, rank: int, clause: str, operation: str) -> None:
    """One error is printed, which names a rank by what it does."""
    assert job.stderr.count("Traceback") == 1 and job.stderr.count("ends the job:") == 1, job
    assert re.search(rf"DeadlineExceeded: rank \d: waited \d+ s .*in {operation}", job.stderr), job
    assert re.search(rf"\n +rank {rank} \(\S+, process \d+\) {clause}", job.stderr), job
    assert "does not answer" not in job.stderr, job


@pytest.mark.long
def test_a_rank_that_imports_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "UNCOMPILED", "")  # which imports it
    script = LATE + (
        "import os\n"
        "from hpcsgd.commands.cli import main\n"
        "if os.environ.get('PMI_RANK', os.environ.get('OMPI_COMM_WORLD_RANK')) == '0': late('torch')\n"
        "main()\n"
    )
    # The others import it, and may be slow.
    job = launch(script, 3, "train", "--timeout", "12", "--name", "none", timeout=SECONDS + 30)
    check_end(job)
    assert re.search(r"DeadlineExceeded: rank \d: waited 12 s for rank 0 in the start of MPI", job.stderr), (
        job
    )
    clause = r"is importing torch and reading options, for \d+ s"
    assert re.search(rf"\n +rank 0 \(\S+, process \d+\) {clause}", job.stderr), job
    assert job.stderr.count("ends the job:") == 1 and "does not answer" not in job.stderr, job


def test_a_rank_that_compiles_and_holds_the_lock_of_python() -> None:
    script = TOGETHER + (
        "import hpcsgd.collectives.neighbour_exchange as exchange\n"
        "world = World(timeout=60); world.close()\n"
        "if rank == 1: exchange.Exchange._warm_up = hold_lock\n"
        "train(hpcsgd.DSGD(), 1)\n"
    )
    assert_named(end_of(script), 1, r"is compiling kernels, for \d+ s", "the compilation of kernels")


@pytest.mark.long
@pytest.mark.parametrize(
    ("begin", "rank", "clause", "operation"),
    [
        ("if rank == 1: time.sleep(1000)", 1, "has not begun", "the start of hpcsgd.World"),
        ("if rank == 0: time.sleep(1000)", 0, "has not begun", "the start of hpcsgd.World"),
        ("if rank == 1: sys.exit(0)", 1, "has not begun", "the start of hpcsgd.World"),
        (
            "if rank == 1: os.kill(os.getpid(), signal.SIGSTOP)",
            1,
            r"has not begun.*\n +it is stopped \(SIGSTOP\)",
            "the start of hpcsgd.World",
        ),
        (
            f"if rank == 1: late({NODE_REDUCE!r})",
            1,
            r"is importing numba, for \d+ s",
            "the allocation of shared memory",
        ),
        (
            f"import {NODE_REDUCE} as kernels\nif rank == 0: kernels.warm_up = hold_lock",
            0,
            r"is compiling kernels, for \d+ s",
            "the compilation of kernels",
        ),
        (
            "split = World._split_by_node\n"
            "def stop(*arguments):\n"
            "    if rank == 1: os.kill(os.getpid(), signal.SIGSTOP)\n"
            "    return split(*arguments)\n"
            "World._split_by_node = stop",
            1,
            r"has not moved for \d+ s: it is in the communicators of a world",
            "the communicators of a world",
        ),
    ],
)
def test_a_rank_that_does_not_complete_its_world(begin: str, rank: int, clause: str, operation: str) -> None:
    job = end_of(f"{LATE}{TOGETHER}{begin}\nWorld()\n")
    if "communicators" in operation:  # stopped in MPI, it answers nobody
        job.stderr = job.stderr.replace("; it does not answer", "")
    assert_named(job, rank, clause, operation)


@pytest.mark.long
@pytest.mark.parametrize(
    ("wait", "clause"),
    [
        ("time.sleep(1000)", "has not begun"),
        (
            "subprocess.Popen(['sh', '-c', f'sleep 2; kill -STOP {os.getpid()}'])",
            r"is at the start of MPI, for \d+ s\n +it is stopped \(SIGSTOP\)",
        ),
    ],
)
def test_a_rank_that_never_initializes_mpi(wait: str, clause: str) -> None:
    """The others wait in native code that holds the lock of Python."""
    script = BEGIN + (
        "import subprocess\n"
        "rank = os.environ.get('PMI_RANK', os.environ.get('OMPI_COMM_WORLD_RANK'))\n"
        f"if rank == '1': {wait}\n"
        "elif 'kill' in sys.argv: time.sleep(6)  # the other one is stopped meanwhile\n"
        "World(timeout=12)\n"
    )
    job = launch(script, 3, *(["kill"] if "kill" in wait else []), timeout=SECONDS + 15)
    check_end(job)
    assert "waited 12 s for rank 1 in the start of MPI, which all ranks must reach" in job.stderr, job
    assert re.search(rf"\n +rank 1 \(\S+, process \d+\) {clause}", job.stderr), job
    assert job.stderr.count("ends the job:") == 1, job


@pytest.mark.long
@pytest.mark.parametrize("end", ["raise RuntimeError('on one rank')", "sys.exit(0)"])
def test_a_rank_that_ends_before_it_initializes_mpi(end: str) -> None:
    """The others do not wait for the deadline."""
    from mpi4py.MPI import get_vendor

    script = BEGIN + (
        "rank = os.environ.get('PMI_RANK', os.environ.get('OMPI_COMM_WORLD_RANK'))\n"
        f"if rank == '1': {end}\n"
        "World(timeout=600)\n"
    )
    job = launch(script, 3, timeout=SECONDS + 30)
    assert not job.timed_out and not job.left and not job.files, job
    assert job.stderr.count("RuntimeError: on one rank") == end.startswith("raise"), job
    if get_vendor()[0] == "MPICH":  # Open MPI's launcher ends the job
        assert job.stderr.count("ends the job:") == 1, job
        assert re.search(r"waited \d s for rank 1 in the start of MPI", job.stderr), job
        assert re.search(r"\n +rank 1 of \S+ ended before the start: see the output above", job.stderr), job


@pytest.mark.long
def test_an_error_of_one_rank_in_its_world_ends_the_job() -> None:
    begin = "def fail(*_): raise ValueError('on one rank')\nif rank == 1: hpcsgd.mpi.world.Runtime = fail\n"
    job = end_of(f"{TOGETHER}{begin}World()\n")
    assert "rank 1 ends the job" in job.stderr and job.stderr.count("ValueError: on one rank") == 1, job
    assert job.stderr.count("Traceback") == 1, job
