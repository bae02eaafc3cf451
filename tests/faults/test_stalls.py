"""Stalled ranks: one report names them, their last activity, and their state as observed from outside."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.support.failing_jobs import BEGIN, IMPORTED, SECONDS, check_end
from tests.support.launch import launch

pytestmark = [pytest.mark.timeout(150), pytest.mark.long]
SCRIPT = BEGIN + (
    "import ctypes, signal, subprocess\n"
    "from hpcsgd import Teleportation\n"
    f"{IMPORTED}world = World()\n"
    "world.waiter.warn_after = 3.0\n"
    "def hold_lock(seconds): ctypes.PyDLL(None).sleep(seconds)\n"
    "class Slow:\n"
    "    def __len__(self): return 2\n"
    "    def __getitem__(self, index): time.sleep(1000)\n"
)


def test_stopped_then_in_native_code_then_in_a_data_loader() -> None:
    """The first two continue after a while, each with one warning; the third ends the job."""
    script = SCRIPT + (
        "def pause(step):\n"
        "    if world.rank != 1: return\n"
        "    if step == 2:\n"
        "        subprocess.Popen(['sh', '-c', f'sleep 7; kill -CONT {os.getpid()}'])\n"
        "        os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    if step == 4: hold_lock(7)\n"
        "    if step == 6: next(iter(torch.utils.data.DataLoader(\n"
        "        Slow(), num_workers=1, multiprocessing_context='fork')))\n"
        "train(AllReduce(), 10**9, pause, comm=world)\n"
    )
    job = launch(script, 3, timeout=SECONDS + 20, env={"HPCSGD_TIMEOUT": "11"})
    check_end(job)
    _, stopped, native, rest = re.split(
        r"hpcsgd: . s without progress; after 11 s \(--timeout, HPCSGD_TIMEOUT\) the job ends", job.stderr
    )
    for text, step in ((stopped, 2), (native, 4)):
        assert f"ranks 0, 2 wait for rank 1 in all-reduce of bucket 0 at step {step}" in text, job
        last = f"after the status of step {step - 1}; its step is {step}; it does not answer"
        assert re.search(r"rank 1 \(\S+, process \d+\) has not moved for \d s: " + last, text), job
    assert re.search(r"it is stopped \(SIGSTOP\): `kill -CONT \d+`", stopped), job
    assert "in native code that holds Python's lock" in native, job
    _, error = rest.split("rank 0 ends the job")
    assert job.stderr.count("waited 11 s for rank 1 in all-reduce of bucket 0 at step 6") == 1, job
    assert re.search(r"child \d+ \(pt_data_worker\) sleeps", error), job
    main, child = error.split("main thread of child")
    assert "in pause" in main and "in __getitem__" in child, job
    assert "it does not answer" not in error, job
    assert job.stderr.count("ends the job:") == 1 and job.stderr.count("Traceback") == 1, job


def test_native_code_that_never_releases_the_lock() -> None:
    script = SCRIPT + (
        "def pause(step):\n"
        "    if step == 2 and world.rank == 0: hold_lock(1000)\n"
        "train(LocalSGD(1), 10**9, pause, comm=world)\n"
    )
    job = launch(script, 2, timeout=SECONDS + 10, env={"HPCSGD_TIMEOUT": "3"})
    check_end(job)
    assert job.stderr.count("Traceback") == 1, job
    assert re.search(r"rank 1 waits in the status of step 2\n +rank 0 \(.* has not moved", job.stderr), job
    assert "it does not answer" in job.stderr and "in hold_lock" in job.stderr, job


#: Makes every rank appear on a machine of its own.
SEPARATE_MACHINES = """
import dataclasses, hpcsgd.mpi.stall_detector, hpcsgd.mpi.world
from hpcsgd.diagnostics.activity import ProcessView, this_process
def view(info):
    if info.pid != os.getpid(): raise ProcessLookupError
    return ProcessView(info)
rank = int(os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK")))
hpcsgd.mpi.world.this_process = lambda: dataclasses.replace(this_process(), host=f"node{rank}")
hpcsgd.mpi.stall_detector.ProcessView, hpcsgd.mpi.stall_detector._NOTIFY_INTERVAL = view, 0.5
"""


def test_ranks_that_idle_by_design_then_one_that_sleeps_then_one_that_is_stopped() -> None:
    """The others wait for an active rank, longer than until a warning; then for one that is not."""
    script = SCRIPT.replace("world = World()", f"{SEPARATE_MACHINES}world = World()") + (
        "def epoch(strategy, steps, pause):\n"
        "    model = torch.nn.Linear(3, 3)\n"
        "    run = Run(model, torch.optim.SGD(model.parameters(), 0.01), strategy, comm=world)\n"
        "    for x in run.batches([torch.ones(2, 3)] * 5, steps=steps):\n"
        "        run.zero_grad(); model(x).sum().backward(); run.step(); time.sleep(pause)\n"
        "    run.close()\n"
        "epoch(LASGD(period=2), 6, 1.2 * world.rank)\n"
        "epoch(Teleportation(active=1), 20, 0.7)\n"
        "print('no warning', file=sys.stderr, flush=True)\n"
        "if world.rank == 2: time.sleep(6)\n"
        "epoch(Teleportation(active=1), 3, 0)\n"
        "time.sleep(1.5)\n"
        "if world.rank == 2: os.kill(os.getpid(), signal.SIGSTOP)\n"
        "world.all.barrier('a barrier')\n"
    )
    job = launch(script, 3, timeout=SECONDS + 20, env={"HPCSGD_TIMEOUT": "8"})
    check_end(job)
    *_, rest = job.stderr.split("no warning")
    assert "without progress" not in job.stderr.removesuffix(rest), job
    _, sleeping, stopped = rest.split("without progress")
    assert "rank 2 (node2, process" in sleeping and "it sleeps" in sleeping, job
    assert "ranks 0, 1 wait in a barrier" in stopped, job
    last = r"rank 2 \(node2, process \d+\) has not moved for \d+ s: "
    last += r"after all-reduce of bucket 0 at step 3; its step is 3; it does not answer\n"
    last += r" +no rank on its machine answers"
    assert re.search(last, stopped), job
    assert job.stderr.count("Traceback") == 1 and "waited 8 s for rank 2 in a barrier" in stopped, job


def test_a_rank_without_memory_is_named() -> None:
    """It waits in its control group for memory that is never freed."""
    group = Path(f"/sys/fs/cgroup/memory/hpcsgd-test-{os.getpid()}")
    try:
        group.mkdir()
        (group / "memory.oom_control").write_text("1")
    except OSError as error:
        pytest.skip(f"no control group that holds processes instead of killing them: {error}")
    script = SCRIPT + (
        "def pause(step):\n"
        "    if step != 2 or world.rank != 1: return\n"
        f"    open('{group}/cgroup.procs', 'w').write(str(os.getpid()))\n"
        f"    open('{group}/memory.limit_in_bytes', 'w').write(str(64 * 2**20))\n"
        "    filled = torch.ones(64 * 2**20)\n"
        "train(AllReduce(), 10**9, pause, comm=world)\n"
    )
    try:
        job = launch(script, 2, timeout=SECONDS + 10, env={"HPCSGD_TIMEOUT": "4"})
        check_end(job)
        assert "waited 4 s for rank 1 in all-reduce of bucket 0 at step 2" in job.stderr, job
        assert re.search(r"short of memory: it has .* its control group uses .* of 0.06 GiB", job.stderr), job
    finally:
        group.rmdir()
