"""The job scripts in a real Slurm of two nodes; in one process, without mpiexec, for they take minutes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcsgd.mpi import launcher
from tests.lab import slurm
from tests.lab.slurm import Slurm
from tests.support.launch import CLI, UNCOMPILED
from tests.support.train_jobs import without_times

JOBS = Path(slurm.__file__).parents[2] / "jobs"
OBSTACLE = slurm.obstacle() or (
    "they take minutes: python -m pytest tests/lab/test_slurm.py" if launcher.size()[1] > 1 else ""
)
pytestmark = [pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE or "none"), pytest.mark.together]

#: Options of every run: the result does not depend on the times of its gradients.
SAME = "--data synthetic:samples=64 --batch 4 --epochs 20 --log-every 1 --evaluate-every 5 --threads 1"
STEPS, RANKS = 80, 4
#: Seconds for operations that take a few on an idle machine.
TIMEOUT = 150.0


class Cluster:
    """The lab, with a `hpcsgd` that starts faster, and a working folder for its jobs."""

    def __init__(self, lab: Slurm, folder: Path) -> None:
        self.lab, self.folder, self.runs = lab, folder, folder / "runs"
        command = folder / "bin" / "hpcsgd"
        command.parent.mkdir()
        command.write_text(f"#!{sys.executable}\n{UNCOMPILED}{CLI}run()\n")
        command.chmod(0o755)
        beside = Path(sys.executable).parent
        path = os.pathsep.join([str(command.parent), str(beside), os.environ["PATH"]])
        lab.environment |= {"PATH": path, "PYTHONPATH": str(JOBS.parent), "HPCSGD_TIMEOUT": "60"}

    def command(self, script: str | Path, *words: str) -> list[str]:
        """Return the sbatch command: options before "--", then the arguments of the script."""
        options, _, arguments = " ".join(words).partition(" -- ")
        files = ["--chdir", str(self.folder), "--output", f"{self.folder}/%j.txt"]
        return ["sbatch", "--parsable", *files, *options.split(), str(JOBS / script), *arguments.split()]

    def submit(self, script: str | Path, *words: str, **variables: str) -> str:
        """Submit a job and return its number."""
        before = dict(self.lab.environment)
        self.lab.environment |= variables
        try:
            return self.lab.run(*self.command(script, *words)).strip()
        finally:
            self.lab.environment = before

    def facts(self, job: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`."""
        return dict(re.findall(r"(\w+)=(\S*)", self.lab.run("scontrol", "show", "job", job)))

    def wait_for_end(self, job: str, *, within: float = TIMEOUT) -> dict[str, str]:
        """Wait for the end of a job and return its fields."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        self.wait(lambda: self.facts(job)["JobState"] in over, job, within)
        return self.facts(job)

    def wait(self, ready: Callable[[], bool], job: str, within: float = TIMEOUT) -> None:
        deadline = time.monotonic() + within
        while not ready():
            assert time.monotonic() < deadline, f"{self.facts(job)}\n{self.output(job)}\n{self.lab.logs()}"
            time.sleep(0.2)

    def output(self, job: str) -> str:
        """Return the output of a job, in all of its time slots."""
        path = self.folder / f"{job}.txt"
        return path.read_text() if path.exists() else ""

    def wait_for_step(self, job: str, step: int) -> None:
        """Wait until the run of a job has taken so many steps."""
        metrics = self.runs / f"hpcsgd-{job}" / "metrics.jsonl"

        def reached() -> bool:
            text = metrics.read_text() if metrics.exists() else ""
            return any(int(found) >= step for found in re.findall(r'"step": (\d+)', text))

        self.wait(reached, job)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Slurm() as lab:
        yield Cluster(lab, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def limited(cluster: Cluster) -> str:
    """A job that exceeds its time limit; started first, because it sleeps most of the time.

    Slurm checks time limits every 30 seconds, and signals up to 30 seconds early: here after 29 to 59.
    """
    options = "--time=1 --signal=B:USR1@1 --job-name=hpcsgd --"
    return cluster.submit("requeue.sbatch", options, SAME, "--delays constant:seconds=0.8")


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, limited: str) -> Path:
    """An uninterrupted run, by `sbatch --wait`."""
    command = cluster.command("train.sbatch", "--wait --time=5 --", SAME, "--name uninterrupted")
    done = subprocess.run(command, env=cluster.lab.environment, capture_output=True, text=True, check=False)
    job = done.stdout.strip()
    assert done.returncode == 0, done.stderr + cluster.output(job)
    assert f"over {RANKS} ranks on 2 nodes" in cluster.output(job)
    assert cluster.facts(job)["NumNodes"] == "2"
    return cluster.runs / "uninterrupted"


def tensors(run: Path, rank: int) -> dict[str, Any]:
    import torch

    folder = max((run / "checkpoints").glob("step-*"))
    state = torch.load(folder / f"rank-{rank:04d}.pt", weights_only=True)["run"]
    momenta = state["optimizer"]["state"].items()
    return {**state["model"], **{f"momentum {n}": value["momentum_buffer"] for n, value in momenta}}


def assert_same_run(one: Path, other: Path) -> None:
    import torch

    assert without_times(one) == without_times(other)
    taken = [record["step"] for record in without_times(one) if record["event"] == "train"]
    assert taken == list(range(1, STEPS + 1))
    for rank in range(RANKS):
        a, b = tensors(one, rank), tensors(other, rank)
        assert a.keys() == b.keys() and len(a) > 4
        assert all(torch.equal(a[name], b[name]) for name in a), f"rank {rank}"
    assert (one / "done").exists() and (other / "done").exists()


@pytest.mark.timeout(400)
def test_a_run_resumes_after_a_signal_and_after_a_kill(cluster: Cluster, uninterrupted: Path) -> None:
    """Once through the shell, once at the ranks, once by killing all ranks."""
    words = "--delays constant:seconds=0.05 --checkpoint-every 1"
    job = cluster.submit("requeue.sbatch", "--time=5 --job-name=hpcsgd --", SAME, words)
    signals = ["--batch --signal=USR1", "--signal=USR1", "--signal=KILL"]
    for slot, options in enumerate(signals):
        cluster.wait_for_step(job, 15 * (slot + 1) + 1)
        target = f"{job}.0" if "KILL" in options else job
        cluster.lab.run("scancel", *options.split(), target)
        cluster.wait(lambda n=slot: int(cluster.facts(job)["Restarts"]) > n, job)
    facts = cluster.wait_for_end(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "3"), cluster.output(job)
    assert cluster.output(job).count("SIGUSR1: checkpoint of step") == 2
    assert_same_run(uninterrupted, cluster.runs / f"hpcsgd-{job}")


@pytest.mark.timeout(300)
def test_a_run_under_mpiexec_resumes_after_a_signal(cluster: Cluster, uninterrupted: Path) -> None:
    words = "--delays constant:seconds=0.05"
    job = cluster.submit("requeue.sbatch", "--time=5 --", SAME, words, MPI_TYPE="mpiexec")
    cluster.wait_for_step(job, 10)
    cluster.lab.run("scancel", "--batch", "--signal=USR1", job)
    facts = cluster.wait_for_end(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), cluster.output(job)
    assert_same_run(uninterrupted, cluster.runs / f"hpcsgd-{job}")


@pytest.mark.timeout(300)
def test_a_job_with_a_permanent_error_is_not_requeued(cluster: Cluster) -> None:
    job = cluster.submit("requeue.sbatch", "--time=5 --", "--model nothing")
    facts = cluster.wait_for_end(job)
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0"), cluster.output(job)
    assert "model 'nothing'" in cluster.output(job) and "not requeued" in cluster.output(job)


@pytest.mark.timeout(300)
def test_a_cancelled_job_is_not_requeued(cluster: Cluster) -> None:
    job = cluster.submit("requeue.sbatch", "--time=5 --", SAME, "--delays constant:seconds=1")
    cluster.wait_for_step(job, 1)
    cluster.lab.run("scancel", job)
    facts = cluster.wait_for_end(job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0"), cluster.output(job)
    assert not (cluster.runs / f"hpcsgd-{job}" / "done").exists()


@pytest.mark.timeout(300)
def test_a_report_collects_a_sweep(cluster: Cluster) -> None:
    sweep = cluster.folder / "sweep.toml"
    sweep.write_text("epochs = 2\n[[run]]\nseed = 3\n[[run]]\nlearning_rate = 0.02\n")
    script = cluster.folder / "sweep.sbatch"
    words = "--nodes 1 --ranks-per-node 1 --time 10 --name sweep -o"
    hpcsgd = cluster.folder / "bin" / "hpcsgd"
    cluster.lab.run(hpcsgd, "sbatch", "sweep", *words.split(), script, "--", sweep, "--threads", "1")
    job = cluster.submit(script, "--export=ALL")
    for element in "01":
        assert cluster.wait_for_end(f"{job}_{element}")["JobState"] == "COMPLETED"
    runs = sorted((cluster.runs / job).iterdir())
    assert [run.name for run in runs] == ["0", "1"] and all((run / "done").exists() for run in runs)
    table = cluster.lab.run(hpcsgd, "report", *runs, "--out", cluster.folder / "report")
    assert "seed 3" in table and "learning rate 0.02" in table, table
    assert (cluster.folder / "report" / "report.html").exists()


@pytest.mark.timeout(300)
def test_a_server_and_groups_as_separate_jobs(cluster: Cluster) -> None:
    file = cluster.folder / "servers"
    server = cluster.submit("ps_server.sbatch", "--time=5 --", f"--listen {file} --mode elastic --linger 1")
    # Long enough that the second group connects before the first, and with it the server, has ended.
    words = (
        f"--connect {file} --strategy ps:mode=elastic --epochs 3 --threads 1 --delays constant:seconds=0.2"
    )
    groups = cluster.submit("ps_group.sbatch", "--time=5 --array=0-1 --", words)
    for element in "01":
        assert cluster.wait_for_end(f"{groups}_{element}")["JobState"] == "COMPLETED"
        run = cluster.runs / f"{groups}-group-{element}"
        assert (run / "done").exists() and without_times(run)[-1]["accuracy"] > 0.5
    assert cluster.wait_for_end(server)["JobState"] == "COMPLETED", cluster.output(server)
    assert not file.exists()


@pytest.mark.timeout(400)
def test_a_run_of_several_time_slots_equals_the_uninterrupted_one(
    cluster: Cluster, uninterrupted: Path, limited: str
) -> None:
    facts = cluster.wait_for_end(limited, within=390)
    assert facts["JobState"] == "COMPLETED" and int(facts["Restarts"]) >= 1, cluster.output(limited)
    assert_same_run(uninterrupted, cluster.runs / f"hpcsgd-{limited}")
