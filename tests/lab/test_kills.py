"""Ranks killed at random times, repeatedly: the survivors continue to train (ULFM)."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.background import Job
from tests.support.launch import is_open_mpi

ULFM = ("--with-ft", "ulfm")
#: Kills in total; for each strategy all ranks but one are killed.
KILLS, RANKS = 54, 10
STRATEGIES = ("allreduce", "local:period=4", "lasgd", "dsgd", "backup", "teleport:active=3")
TRAIN = ("--data", "synthetic:samples=1500", "--delays", "constant:seconds=0.01", "--progress", "plain")
SHRINK = ("--on-failure", "shrink", "--keep-every", 0.5, "--checkpoint-every", 0, "--timeout", 30)

pytestmark = [
    pytest.mark.skipif(not is_open_mpi(), reason="MPICH ends all ranks when one dies"),
    pytest.mark.timeout(240),
]


@pytest.mark.parametrize("mode", ["stop", "restart"])
def test_the_survivors_end_and_one_of_them_prints_the_error(mode: str, tmp_path: Path) -> None:
    """Also when rank 0 has died; with "restart" any number of ranks can resume."""
    words = ("train", *TRAIN, "--on-failure", mode, "--out", tmp_path, "--name", "run")
    with Job(tmp_path, "job", *words, "--epochs", 9999, ranks=3, options=ULFM) as job:
        job.wait_for("epoch 2.00/", seconds=100)
        job.kill(min(job.pids()))
        job.end(20)
        others = ", with any number of ranks" if mode == "restart" else ""
        assert job.text.count("rank 0: died") == 1 and "Traceback" not in job.text, job.text
        assert f"--resume {tmp_path / 'run'}{others}\n" in job.text, job.text
    words = ("train", "--resume", tmp_path / "run", "--epochs", 5)
    with Job(tmp_path, "again", *words, ranks=2, options=ULFM) as again:
        assert (again.end() == 0) == (mode == "restart"), again.text
        expected = (
            "over 2 ranks"
            if mode == "restart"
            else "start 3 ranks; or resume with any number of ranks: --on-failure restart"
        )
        assert expected in again.text, again.text


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_strategy_has_enough_kills() -> None:
    assert len(STRATEGIES) * (RANKS - 1) >= KILLS >= 50


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_are_killed_until_one_is_left(strategy: str, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    words = ("train", "--strategy", strategy, *TRAIN, *SHRINK, "--epochs", 9999, "--name", "run")
    with Job(tmp_path, "job", *words, "--out", tmp_path, ranks=RANKS, options=ULFM) as job:
        job.wait_for("epoch 1.00/", seconds=100)
        for _ in range(RANKS - 1):
            # Also while the others still recover from the previous kill.
            time.sleep(rng.uniform(0.0, 1.5))
            victims = job.pids()
            victim = rng.choice(victims)
            job.kill(victim)
        job.wait_for("over 1 ranks")
        job.wait_for_more("test loss", 3)
        job.send(signal.SIGUSR1)
        assert job.end() == 0, (seed, job.text)
    found = records(tmp_path / "run")
    steps = [record["step"] for record in found]
    assert steps == sorted(steps), (seed, steps)
    tests = [record for record in found if record["event"] == "test"]
    assert tests[-1]["loss"] < tests[0]["loss"] and tests[-1]["accuracy"] > 0.9, (seed, tests)
    assert "rank" in job.text and "surviving ranks continue" in job.text and "Traceback" not in job.text, (
        job.text
    )
