"""A stopped and resumed run equals the run without a stop, bit for bit."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcsgd.training import data
from hpcsgd.training.data.loader import Loader
from tests.support.launch import launch, rank_processes
from tests.support.train_jobs import CLI, NOISY, newest_state, records, trained, without_times

SAMPLES, BATCH, ALPHA, SEED = 64, 4, 0.3, 7
STOP_AT_PASS = 7  # the first of the two of step 4


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    """A nested state as one flat dict."""
    if isinstance(value, dict):
        value = value.items()
    elif isinstance(value, list | tuple):
        value = enumerate(value)
    else:
        return {key: value}
    return {k: v for name, item in value for k, v in leaves(item, f"{key}/{name}").items()}


def same_bits(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


def assert_same_run(one: Path, other: Path, ranks: int) -> None:
    assert without_times(one) == without_times(other)
    for rank in range(ranks):
        states = [leaves(newest_state(run, rank)) for run in (one, other)]
        assert list(states[0]) == list(states[1])
        timed = [key for key in states[0] if re.search(r"/(spent|logged)/.*seconds", key)]
        for key in states[0].keys() - set(timed):
            assert same_bits(states[0][key], states[1][key]), f"rank {rank}: {key}"


STRATEGIES = {"allreduce": signal.SIGUSR1, "local:period=3": signal.SIGTERM}


@pytest.mark.timeout(170)
def test_resume_is_bit_identical(tmp_path: Path) -> None:
    """Mid-epoch, when one rank has run out of data, with dropout, momentum and accumulation."""
    (tmp_path / "own.py").write_text(NOISY)
    source = data.load(f"synthetic:samples={SAMPLES}").train
    lengths = [len(Loader(source, BATCH, rank, 2, ALPHA, SEED)) for rank in range(2)]
    assert min(lengths) < STOP_AT_PASS < max(lengths) - 2, lengths

    common = (
        f"--data synthetic:samples={SAMPLES} --batch {BATCH} --alpha {ALPHA} --seed {SEED} --accumulate 2"
    )
    common += " --epochs 1.7 --log-every 3 --evaluate-every 0.5 --checkpoint-every 0"
    commands = []
    for strategy, number in STRATEGIES.items():
        name = f"step-{strategy}"  # looks like a checkpoint and is a run
        words = f"{common} --strategy {strategy} --name"
        # As in a requeued job: the same command line for each part.
        auto = number == signal.SIGUSR1
        begin, go_on = f"{words} {name}", f"--resume {tmp_path / name}"
        if auto:
            begin = go_on = f"{begin} --resume auto"
        commands += [
            f"{words} straight-{strategy} --model own:noisy",
            f"{begin} --model own:noisy:stop={STOP_AT_PASS},rank=1,number={int(number)}",
            f"{go_on} --model own:noisy",
        ]
    outputs = trained(tmp_path, 2, *commands)
    for strategy, number in STRATEGIES.items():
        straight, stopped = tmp_path / f"straight-{strategy}", tmp_path / f"step-{strategy}"
        assert f"{number.name}: checkpoint of step 4 written; --resume {stopped}\n" in outputs[1]
        assert "from step 4;" in outputs[2] and outputs[2].endswith(f"done; hpcsgd report {stopped}\n")
        outputs = outputs[3:]
        assert_same_run(straight, stopped, 2)
        assert (straight / "done").exists() and (stopped / "done").exists()
        times = [record["time"] for record in records(stopped)]
        assert times == sorted(times)
        distances = [record["consensus_distance"] for record in records(straight, "test")]
        assert len(distances) > 1 and any(distances) == (strategy != "allreduce")
    check_fewer_ranks(tmp_path, tmp_path / "straight-local:period=3")


def check_fewer_ranks(tmp_path: Path, run: Path) -> None:
    """One rank resumes the run of two: at the same position in the data, with the mean of the models."""
    before, old = records(run), [newest_state(run, rank) for rank in range(2)]
    words = f"--resume {run} --model own:noisy --log-every 1 --on-failure restart --epochs"
    (output,) = trained(tmp_path, 1, f"{words} 3 --learning-rate 0")
    found = records(run)[len(before) :]
    assert "over 1 ranks" in output and {len(record["bytes_sent"]) for record in found} == {1}
    steps = [record["step"] for record in found]
    assert steps == sorted(steps) and found[-1]["epoch"] == 3
    assert all(record["epoch"] >= before[-1]["epoch"] for record in found)
    # Without learning the mean of the models is still there at the end.
    new = newest_state(run, 0)["run"]["model"]
    for name, value in new.items():
        if name.endswith("weight") and "layers.1" not in name:
            mean = torch.stack([state["run"]["model"][name].double() for state in old]).mean(0)
            torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6)


def signal_rank_1(number: int, metrics: Path) -> Any:
    """For `launch`: send a rank a signal once there are metrics."""

    def send(job: dict[int, str]) -> None:
        give_up = time.monotonic() + 60
        while not (metrics.exists() and metrics.read_text()) and time.monotonic() < give_up:
            time.sleep(0.02)
        os.kill(rank_processes(job)[1], number)

    return send


@pytest.mark.timeout(170)
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(tmp_path: Path) -> None:
    """With an asynchronous method, whose ranks exchange signals periodically."""
    run = tmp_path / "run"
    words = f"train --out {tmp_path} --name run --data synthetic:samples=64 --epochs 100000"
    words += " --evaluate-every 0 --checkpoint-every 0 --log-every 1 --strategy lasgd"
    send = signal_rank_1(signal.SIGTERM, run / "metrics.jsonl")
    script = (
        CLI + "from hpcsgd.commands.train import trainer; trainer.ASYNCHRONOUS_EXCHANGE_PERIOD = 0.1; main()"
    )
    job = launch(script, 2, *words.split(), timeout=120, meanwhile=send)
    assert job.returncode == 0 and not job.left and not job.files and not job.timed_out, job
    found = re.search(r"^SIGTERM: checkpoint of step (\d+) written; --resume (.*)$", job.stdout, re.M)
    assert found and job.stdout.count("SIGTERM") == 1 and found[2] == str(run), job
    assert not (run / "done").exists()
    step = int(found[1])
    steps = [record["step"] for record in records(run)]
    assert steps[-1] == step and steps == sorted(set(steps)), steps
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{step:08d}"]
    assert [newest_state(run, rank)["step"] for rank in range(2)] == [step, step]
