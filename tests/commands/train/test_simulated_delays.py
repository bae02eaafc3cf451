"""`--delays`: simulated stragglers sleep for each gradient, which counts as computing; a resume goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcsgd import BadOption, World
from hpcsgd.collectives.peers import Peers
from hpcsgd.commands.train.settings import Settings
from hpcsgd.commands.train.strategy import build_delays
from hpcsgd.commands.train.trainer import Trainer
from hpcsgd.strategies import delays
from tests.support.train_jobs import records, trained

COMMON = "--data synthetic:samples=64 --batch 8 --accumulate 2 --log-every 1 --evaluate-every 0"

# Prints the sleeps of each rank, one line a run.
PRINT_SLEEPS = """
import hpcsgd.commands.train.trainer as module

class Clock:
    def __getattr__(self, name):
        return getattr(real, name)

    def sleep(self, seconds):
        slept.append(seconds)
        real.sleep(seconds)

def execute(self):
    slept.clear()
    folder = trained(self)
    everyone = self.world.gather(slept)
    if self.world.rank == 0:
        print("slept", everyone)
    return folder

slept, real, module.time = [], module.time, Clock()
trained, module.Trainer.execute = module.Trainer.execute, execute
"""


def slept(output: str) -> list[list[float]]:
    (line,) = (line for line in output.splitlines() if line.startswith("slept "))
    sleeps: list[list[float]] = json.loads(line.removeprefix("slept "))
    return sleeps


@pytest.mark.timeout(170)
def test_each_gradient_is_slept_for_once_and_a_resume_counts_on(tmp_path: Path) -> None:
    spec, slow = "exponential:mean=0.005,seed=3", "slow:peer=1,factor=10,seconds=0.01"
    outputs = trained(
        tmp_path,
        2,
        f"{COMMON} --name run --epochs 2 --delays {spec}",
        f"--resume {tmp_path / 'run'} --epochs 4",
        f"{COMMON} --name slow --epochs 2 --delays {slow} --strategy dsgd",
        f"{COMMON} --name none --epochs 1",
        prelude=PRINT_SLEEPS,
    )
    delay, steps = delays.build(spec), records(tmp_path / "run")[-1]["step"] // 2
    for part, text in enumerate(outputs[:2]):
        assert f"simulated delays: {spec}" in text
        numbers = range(part * steps, (part + 1) * steps)
        assert slept(text) == [[delay.sample(rank, number) for number in numbers] for rank in range(2)]
    for record in records(tmp_path / "run"):
        assert record["gradients"] == [record["step"]] * 2

    # The fast rank waits for the slow one, which computes.
    last = records(tmp_path / "slow")[-1]
    steps = last["step"]
    assert slept(outputs[2]) == [[0.01] * steps, [0.1] * steps]
    assert last["time"] >= 0.1 * steps
    assert last["compute_seconds"][1] >= 0.1 * steps and last["wait_seconds"][0] >= 0.05 * steps

    assert slept(outputs[3]) == [[], []] and "simulated" not in outputs[3]


@pytest.mark.mpi(min_size=2)
def test_slow_ranks_must_exist_at_the_start(world: World) -> None:
    settings, peers = Settings(delays=f"slow:peer={world.size},seconds=0"), Peers(world)
    with pytest.raises(BadOption, match=f"some of the peers 0 to {world.size - 1}"):
        build_delays(settings, peers, clamp=False)
    assert build_delays(settings, peers, clamp=True).sample(0, 0) == 0


def test_virtual_nodes_have_virtual_time(alone: World) -> None:
    settings = Settings(strategy="dsgd", virtual_nodes=2, delays="slow:factor=2,seconds=1")
    with pytest.raises(BadOption, match="virtual nodes cannot have delays in real time") as caught:
        Trainer(settings, alone)
    assert "--strategy backup:delays=slow:factor=2+seconds=1" in str(caught.value)
