"""Failing jobs: they end within seconds, print one error, and leave no processes or files."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest

from tests.support.failing_jobs import BEGIN, IMPORTED, SECONDS, check_end
from tests.support.launch import has_private_shm, is_open_mpi, launch, rank_processes

pytestmark = pytest.mark.timeout(150)


def test_training_ends_cleanly_with_communication_outstanding() -> None:
    """That of runs that were dropped, and reductions with and without references to them."""
    script = BEGIN + (
        "train(LocalSGD(2), 4).close(); train(AllReduce(), 3).close()\n"
        "for number in range(5):\n"
        "    model = torch.nn.Linear(700, 700)\n"
        "    run = Run(model, torch.optim.SGD(model.parameters(), 0.1), bucket_mib=0.1)\n"
        "    model(torch.ones(2, 700)).sum().backward()\n"
        "    del run, model; gc.collect()\n"
        "    junk = [torch.randn(700, 700) for _ in range(4)]\n"
        "world = World()\n"
        "def begin():\n"
        "    group = TensorGroup(world, [('a', torch.zeros(3_000_000))], 1)\n"
        "    names = ('ring', 'node', 'library') * 3\n"
        "    return group, [collectives.iallreduce(group, None, name) for name in names]\n"
        "held = begin()\n"
        "begin(); gc.collect()\n"
        "print('done', flush=True)\n"
    )
    job = launch(script, 3, timeout=SECONDS)
    check_end(job, 0)
    assert job.stdout.count("done") == 3 and not job.stderr.strip(), job


def test_an_exception_on_one_rank_ends_all_and_is_printed_once() -> None:
    script = BEGIN + (
        "def pause(step):\n"
        "    if step == 2 and rank == 1: bytearray(2**60)\n"
        "rank = World().rank\n"
        "train(AllReduce(), 10**9, pause)\n"
    )
    job = launch(script, 3, timeout=SECONDS)
    check_end(job)
    assert job.stderr.count("\nMemoryError") == 1, job
    assert job.stderr.count("Traceback") == 1 and "rank 1 ends the job" in job.stderr, job


def test_an_error_on_all_ranks_is_printed_once() -> None:
    script = BEGIN + (
        "rank = World().rank\n"
        "model = torch.nn.Linear(2 + rank, 2)\n"
        "Run(model, torch.optim.SGD(model.parameters(), 0.1))\n"
    )
    job = launch(script, 3, timeout=SECONDS)
    check_end(job)
    assert job.stderr.count("Disagreement: ") == 1, job


@pytest.mark.parametrize("call", ["sys.exit(3)", "os._exit(5)"])
def test_a_rank_that_exits_early_ends_all(call: str) -> None:
    script = BEGIN + (
        "def pause(step):\n"
        f"    if step == 2 and run_rank == 1: {call}\n"
        f"{IMPORTED}run_rank = World().rank\n"
        "train(AllReduce(), 10**9, pause)\n"
    )
    job = launch(script, 2, timeout=SECONDS + 10, env={"HPCSGD_TIMEOUT": "3"})
    check_end(job)


def test_ctrl_c_ends_all() -> None:
    def interrupt(processes: dict[int, str]) -> None:
        time.sleep(0.5)
        launchers = [p for p, c in processes.items() if "-n 2" in c and not c.startswith("sh ")]
        os.kill(min(launchers), signal.SIGINT)

    script = BEGIN + "World(); print('begun', flush=True)\ntrain(AllReduce(), 10**9)\n"
    job = launch(script, 2, timeout=SECONDS, meanwhile=interrupt)
    check_end(job)
    assert job.stderr.count("Traceback") <= 1, job


@pytest.mark.parametrize("strategy", ["AllReduce()", "LASGD()"])
def test_a_killed_rank_ends_all(strategy: str) -> None:
    def kill(processes: dict[int, str]) -> None:
        time.sleep(0.5)
        os.kill(rank_processes(processes)[1], signal.SIGKILL)

    script = BEGIN + f"World(); print('begun', flush=True)\ntrain({strategy}, 10**9)\n"
    job = launch(script, 2, timeout=SECONDS, meanwhile=kill)
    check_end(job)
    # Printed by the launcher, which ends the other ranks before they can print.
    assert "signal 9" in job.stdout + job.stderr, job
    if not is_open_mpi():  # which names the rank
        assert re.search(
            r"^hpcsgd: rank \d \(\S+, process \d+\) has ended first, or was killed: ", job.stderr
        ), job


def test_a_small_dev_shm_is_a_warning_and_the_result_is_correct() -> None:
    if not has_private_shm():
        pytest.skip("a /dev/shm of 4 MiB needs a mount namespace: root, or unprivileged ones")
    script = BEGIN + (
        "world = World()\n"
        "for _ in range(2):\n"
        "    group = TensorGroup(world, [('a', torch.zeros(3_000_000))])\n"
        "    group.views['a'].fill_(world.rank)\n"
        "    collectives.allreduce(group)\n"
        "    assert not group.shared and torch.all(group.views['a'] == 0.5)\n"
        "train(AllReduce(), 2, comm=world).close()\n"
        "world.close(); print('right')\n"
    )
    env = {"MPIR_CVAR_CH4_SHM_POSIX_EAGER": "iqueue"}
    job = launch(script, 2, timeout=SECONDS, shm="14m", env=env)
    check_end(job, 0)
    assert job.stdout.count("right") == 2, job
    assert job.stderr.count("RuntimeWarning: no shared memory on this node") == 1, job


def test_a_world_of_one_needs_no_mpiexec() -> None:
    check_end(launch(BEGIN + "train(AllReduce(), 2).close(); train(LocalSGD(2), 3).close()", 1), 0)


def test_a_rank_that_answers_reads_its_own_stacks() -> None:
    """Read by a signal while its threads run, they can end its process."""
    script = BEGIN + (
        "import signal, threading\n"
        "from hpcsgd.diagnostics.activity import this_process\n"
        "def sleep_in_thread(): done.wait()\n"
        "world, done, caught = World(), threading.Event(), []\n"
        "if world.rank:\n"
        "    signal.signal(this_process().signal, lambda *_: caught.append(1))\n"
        "    threading.Thread(target=sleep_in_thread).start()\n"
        "world.gather(None)\n"
        "if not world.rank:\n"
        "    detector = world._runtime.stall_detector\n"
        "    for _ in range(3):\n"
        "        lines = ''.join(detector._details(1, True, detector._states()))\n"
        "        assert 'in sleep_in_thread' in lines and 'in gather' in lines, lines\n"
        "world.gather(None); done.set(); world.close()\n"
        "print(f'end {len(caught)}\\n', end='', flush=True)\n"
    )
    job = launch(script, 2, timeout=SECONDS)
    check_end(job, 0)
    assert job.stdout.count("end 0") == 2, job
