"""Ranks that are stopped or killed while they train, with any method, are named, with their steps."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from tests.support.failing_jobs import SECONDS
from tests.support.launch import CLI, Finished, is_open_mpi, launch, rank_processes

METHODS = (
    *("allreduce", "local:period=3", "lasgd", "dsgd:topology=ring,overlap=yes", "sgp", "sgp:overlap=yes"),
    *("adpsgd", "adpsgd:topology=ring,schedule=drawn", "backup", "teleport:active=4"),
    *("ps", "ps:mode=elastic,groups=2"),
)
TIMEOUT = 10  # seconds, enough for a start on a busy machine
ENDLESS = (
    "--data synthetic:samples=2048 --epochs 100000 --evaluate-every 0 --checkpoint-every 0 --log-every 3"
)


class Trial:
    """A job of which one rank gets a signal after some steps.

    Attributes
    ----------
    job
        The job, after its end.
    process
        The process of the rank.
    """

    def __init__(self, folder: Path, method: str, ranks: int, victim: int, pause: float, number: int) -> None:
        self.process, metrics = 0, folder / "run" / "metrics.jsonl"

        def send(job: dict[int, str]) -> None:
            give_up = time.monotonic() + SECONDS
            while not (metrics.exists() and metrics.read_text()) and time.monotonic() < give_up:
                time.sleep(0.02)
            time.sleep(pause)
            self.process = rank_processes(job)[victim]
            os.kill(self.process, number)

        words = (
            f"train --out {folder} --name run {ENDLESS} --threads 1 --timeout {TIMEOUT} --strategy {method}"
        )
        self.job: Finished = launch(CLI + "run()", ranks, *words.split(), timeout=150, meanwhile=send)
        assert self.job.returncode != 0 and not self.job.timed_out and not self.job.left, self.job
        self.named = rf"rank {victim} \(\S+, process {self.process}\)"


def assert_stopped_is_named(trial: Trial) -> None:
    error = trial.job.stderr
    assert re.search(rf"{trial.named} (.*\n)+? +it is stopped \(SIGSTOP\)", error), trial.job
    assert error.count("ends the job:") == 1, trial.job


def assert_killed_is_named(trial: Trial) -> None:
    if is_open_mpi():  # which names it
        return
    found = re.search(
        rf"^hpcsgd: {trial.named} has ended first, or was killed: (.*)\n(  .*\n)+", trial.job.stderr, re.M
    )
    assert found and "step" in found[1] and "rank" in found[2], trial.job
    assert trial.job.stderr.count("hpcsgd:") == 1, trial.job


@pytest.mark.timeout(150)
def test_a_stopped_rank_of_sgp_is_named(tmp_path: Path) -> None:
    assert_stopped_is_named(Trial(tmp_path, "sgp:overlap=yes", 4, 2, 0.1, signal.SIGSTOP))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.timeout(300)
def test_any_rank_of_eight_is_named(tmp_path: Path, number: int, seed: int) -> None:
    draw = random.Random(seed)
    trial = Trial(tmp_path, draw.choice(METHODS), 8, draw.randrange(8), draw.random(), number)
    (assert_stopped_is_named if number == signal.SIGSTOP else assert_killed_is_named)(trial)
