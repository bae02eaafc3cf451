"""Real jobs: the page is printed once, within seconds, with the right exit status, whatever is wrong."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import (
    CLI,
    UNCOMPILED,
    _environment,
    has_private_shm,
    is_open_mpi,
    launch,
    mpiexec,
    with_private_shm,
)

pytestmark = [pytest.mark.together, pytest.mark.long, pytest.mark.timeout(110)]

DOCTOR = CLI + "\nsys.argv = ['hpcsgd', 'doctor', '--out', sys.argv[1]]\nrun()"


def test_healthy_job_gets_a_page_and_status_0(tmp_path: Path) -> None:
    job = launch(DOCTOR, 2, str(tmp_path / "runs"), shm="1g")
    assert job.returncode == 0 and not job.left and not job.files, job
    assert job.stdout.count("hpcsgd doctor: 2 ranks") == 1, job
    assert "  error" not in job.stdout and "failed:" not in job.stdout and "\x1b" not in job.stdout, job
    for name in ("versions", "cores", "MPI", "launcher", "memory", "links", "clock", "kernels", "storage"):
        assert f"\n{name} " in job.stdout, job
    assert "ranks in MPI: 2" in job.stdout and "shared memory works" in job.stdout, job
    assert "GB/s" in job.stdout, job
    assert "visible on 1 other rank after" in job.stdout and len(job.stdout.splitlines()) < 40, job
    assert not (tmp_path / "runs").exists(), "the doctor leaves nothing behind"


# A script that initialises MPI with a lower thread level, and a folder for each rank.
WRONG = """
import mpi4py
mpi4py.rc.thread_level = "funneled"
from mpi4py import MPI
import sys
sys.argv[1] += f"/{MPI.COMM_WORLD.rank}"
"""


def test_mistakes_of_a_job_are_found(tmp_path: Path) -> None:
    env = {"OMP_NUM_THREADS": "64", "HPCSGD_CUDA_AWARE": "1", "HPCSGD_SHARED_MEMORY": "0"}
    job = launch(WRONG + DOCTOR, 2, str(tmp_path), shm="64m", env=env)
    assert job.returncode == 1 and not job.left, job
    found = job.stdout.partition("Found:")[2]
    assert "more threads than cores: 128 threads of 2 ranks" in found, job
    assert "MPI_THREAD_FUNNELED" in found and "is not shared by all nodes" in found, job
    assert "(HPCSGD_SHARED_MEMORY=0)" in found, job
    assert "this MPI is not CUDA-aware" in " ".join(found.split()) or "CUDA-aware: unknown" in job.stdout, job
    if has_private_shm():
        assert "--shm-size=1g" in found, job


# A job whose ranks and launcher are killed; then the doctor, and the command of its page.
KILLED = """
import os, re, signal, subprocess, sys
launcher, program, doctor = eval(sys.argv[1])
start = [*launcher, "-n", "2", sys.executable, "-c"]
job = subprocess.Popen([*start, program], stdout=subprocess.PIPE, text=True)
for pid in [*(int(job.stdout.readline()) for _ in range(2)), job.pid]:
    os.kill(pid, signal.SIGKILL)
job.wait()
files = {name: os.stat(f"/dev/shm/{name}").st_size for name in os.listdir("/dev/shm")}
page = subprocess.run([*start, doctor, sys.argv[2]], capture_output=True, text=True, timeout=80).stdout
subprocess.run(re.search(r"rm(\\s+/dev/shm/\\S+)+", page)[0].split(), check=True)
print(repr((files, os.listdir("/dev/shm"), page)))
"""
ENDLESS = """
from mpi4py import MPI
import os, sys, time
MPI.COMM_WORLD.Barrier()
os.write(1, b"%d\\n" % os.getpid())  # at once: print of two ranks may interleave a number and a newline
time.sleep(60)
"""


@pytest.mark.skipif(not has_private_shm(), reason="a /dev/shm of its own needs a mount namespace")
def test_files_of_a_killed_job_are_named_with_the_command_that_removes_them(
    tmp_path: Path,
) -> None:
    given = repr((mpiexec(), ENDLESS, UNCOMPILED + DOCTOR))
    command = with_private_shm([sys.executable, "-c", KILLED, given, str(tmp_path)], "1g")
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=_environment("", {}))
    assert done.returncode == 0, done
    files, remaining, page = eval(done.stdout)
    assert files and not remaining, (files, remaining, page)
    library = "Open MPI" if is_open_mpi() else "MPICH"
    for name, nbytes in files.items():
        user = getpass.getuser()
        assert f"{name}: {nbytes / 1e6:,.1f} MB, {library}, {user}, mapped by no process" in page, page
    assert f"has {len(files)} file" in page and "of ended jobs" in page, page


# Two real checks, on one core, and three that fail, hang, or are never run.
BROKEN = """
import os, sys, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from pathlib import Path
from hpcsgd.commands.doctor import cores, mpi_library
from hpcsgd.commands.doctor.check import Check
from hpcsgd.commands.doctor.runner import run_checks

def fails_on_one(job):
    if job.rank == 1:
        raise OSError("no such thing")
    job.barrier()
    return {}

def hangs(job):
    time.sleep(60 * job.rank)
    return {}

def nothing(*_):
    return []

import hpcsgd.commands.doctor.ranks as module
module.DEADLINE = 1.0
checks = [Check("breaks", fails_on_one, nothing, nothing), cores.CHECK,
          Check("shows", lambda job: {}, lambda ranks: 1 / 0, nothing), mpi_library.CHECK,
          Check("hangs", hangs, nothing, nothing), Check("never", nothing, nothing, nothing)]
sys.exit(run_checks(checks, Path("runs"), timeout=3.0))
"""


def test_a_check_that_fails_or_hangs_is_a_line_and_the_page_comes() -> None:
    job = launch(BROKEN, 2)
    assert job.returncode != 0 and not job.timed_out and not job.left, job
    assert job.seconds < 20, job
    assert job.stdout.count("hpcsgd doctor:") == 1, job
    assert "OSError: no such thing (rank 1" in job.stdout, job
    assert "\nshows       failed: ZeroDivisionError" in job.stdout and "MPI_THREAD_MULTIPLE" in job.stdout, (
        job
    )
    assert "hangs did not end: no reply from rank 1 on " in job.stdout and "\nnever" not in job.stdout, job
    if (os.cpu_count() or 1) > 1:
        assert "every rank may use one core only" in job.stdout, job


def test_ranks_that_are_each_alone_print_one_page(tmp_path: Path) -> None:
    """The environment under the mpiexec of another MPI."""
    name = ("PMI_RANK", "PMI_SIZE") if is_open_mpi() else ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    launchers = ("PMI", "OMPI_COMM", "MPI_LOCAL", "HYDRA", "PRTE", "PMIX", "SLURM")
    env = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", UNCOMPILED + DOCTOR, str(tmp_path)],
            env={**env, name[0]: str(rank), name[1]: "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    (first, errors), (second, _) = (rank.communicate(timeout=60) for rank in ranks)
    assert ranks[0].returncode == 1 and ranks[1].returncode == 0, (first, errors)
    assert f"started 2 ranks ({name[1]}=2), but each is alone" in first and "fix     start with" in first, (
        first
    )
    assert first.count("Found:") == 1 and not second and "Traceback" not in errors, (second, errors)
