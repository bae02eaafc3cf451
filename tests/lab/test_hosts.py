"""Hosts on one machine: nodes for MPI, links of limited rate, and complete removal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.lab import hosts
from tests.support.launch import UNCOMPILED

LAB = Path(hosts.__file__)

pytestmark = pytest.mark.skipif(bool(hosts.obstacle()), reason=hosts.obstacle() or "none")

#: Prefixes of the variables of mpiexec, which must not reach the ranks of another job.
LAUNCHERS = ("PMI", "HYD", "MPI")

JOB = """
import json, time, torch
from hpcsgd import TensorGroup, World, collectives
with World(device="cpu") as world:
    group = TensorGroup(world, [("x", torch.empty(2**19))])
    seconds = []
    for _ in range(5):
        group.views["x"].fill_(world.rank)
        started = time.perf_counter()
        collectives.allreduce(group)
        seconds.append(time.perf_counter() - started)
    mean = group.views["x"]
    facts = [world.rank, world.host, world.node, world.nodes, world.local_size]
    row = [*facts, mean.min().item(), mean.max().item(), min(seconds)]
    for other in world.gather(row):
        if world.rank == 0:
            print(json.dumps(other), flush=True)
"""

METHODS = """
import torch
from torch import nn
from hpcsgd import ADPSGD, DSGD, LASGD, SGP, BackupWorkers, QSGDMaxNorm, Run, Teleportation, World

with World(device="cpu", timeout=30) as world:
    torch.manual_seed(0)
    x = torch.randn(64, 300)
    y = x[:, :1] + 0.1 * world.rank
    by_time = [ADPSGD("star"), BackupWorkers(), BackupWorkers(backups=1)]
    beside = [LASGD(), LASGD(2, compress=QSGDMaxNorm(4))]
    for method in [DSGD("ring"), SGP(overlap=True), *by_time, Teleportation(2), *beside]:
        model = nn.Sequential(nn.Linear(300, 600), nn.Linear(600, 1))  # too large for an eager message
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.5)
        with Run(model, optimizer, method, comm=world) as run:
            for _ in range(2):
                for a, b in run.batches([(x, y)] * 15, steps=15):
                    run.zero_grad()
                    nn.functional.mse_loss(model(a), b).backward()
                    run.step()
                with run.averaged():
                    loss = float(nn.functional.mse_loss(model(x), x[:, :1] + 0.1))
        if world.rank == 0:
            print(type(method).__name__, run.steps, loss, flush=True)
"""


def start(*options: str, program: list[str]) -> subprocess.Popen[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    return subprocess.Popen(
        [sys.executable, str(LAB), *options, "--", *program],
        env={**inherited, "PYTHONPATH": str(LAB.parents[2]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def remaining(name: str) -> str:
    """Return the links and namespaces of one run that still exist."""
    seen = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    seen += subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    return "\n".join(line for line in seen.splitlines() if re.search(rf"\b{name}(p\d|-\d|\b)", line))


def test_two_hosts_of_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(JOB)
    program = [sys.executable, str(script)]
    job = start("--hosts", "2", "--ppn", "2", "--rate", "100mbit", program=program)
    output, errors = job.communicate(timeout=100)
    assert job.returncode == 0, errors
    ranks = sorted(json.loads(line) for line in output.splitlines())
    assert [rank for rank, *_ in ranks] == [0, 1, 2, 3]
    names = {host.rsplit("-", 1)[0] for _, host, *_ in ranks}
    assert len(names) == 1 and len({host for _, host, *_ in ranks}) == 2
    assert [node for _, _, node, *_ in ranks] == [0, 0, 1, 1]
    assert {(nodes, local) for _, _, _, nodes, local, *_ in ranks} == {(2, 2)}
    assert all(low == high == 1.5 for *_, low, high, _ in ranks), "the mean of ranks 0 to 3"
    # 2 MiB over each link of 100 Mbit/s, less the burst that the token bucket lets through.
    assert min(seconds for *_, seconds in ranks) > 0.12, "the link was not used"
    assert remaining(names.pop()) == ""


@pytest.mark.timeout(120)
def test_methods_complete_between_hosts(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(UNCOMPILED + METHODS)
    job = start("--hosts", "3", "--rate", "1gbit", program=[sys.executable, str(script)])
    output, errors = job.communicate(timeout=110)
    assert job.returncode == 0, errors
    lines = [line.split() for line in output.splitlines()]
    names = ["DSGD", "SGP", "ADPSGD", *["BackupWorkers"] * 2, "Teleportation", *["LASGD"] * 2]
    assert [name for name, *_ in lines] == names
    assert all(steps == "30" and float(loss) < 0.2 for _, steps, loss in lines), output


def test_extra_ranks_are_on_the_last_host() -> None:
    job = start(
        "--hosts", "2", "--ppn", "2", "--extra", "1", program=["bash", "-c", "echo $PMI_RANK $(hostname)"]
    )
    output, errors = job.communicate(timeout=60)
    assert job.returncode == 0, errors
    where = [name.rsplit("-", 1)[1] for _, name in sorted(line.split() for line in output.splitlines())]
    assert where == ["1", "1", "2", "2", "2"]


def test_the_exit_status_is_returned() -> None:
    job = start("--hosts", "1", program=["bash", "-c", "hostname; exit 3"])
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 3
    assert remaining(output.strip().rsplit("-", 1)[0]) == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_removes_everything(number: signal.Signals) -> None:
    job = start("--hosts", "2", program=["bash", "-c", "hostname; sleep 1000"])
    assert job.stdout is not None
    name = job.stdout.readline().strip().rsplit("-", 1)[0]
    assert remaining(name) != ""
    started = time.monotonic()
    job.send_signal(number)
    job.communicate(timeout=60)
    assert job.returncode != 0 and time.monotonic() - started < 30
    assert remaining(name) == ""


def test_an_invalid_rate_is_an_error() -> None:
    job = start("--hosts", "1", "--rate", "fast", program=["true"])
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 1 and "fast" in errors
    name = re.findall(r"hpcsgd\d+", errors)[0]
    assert remaining(name) == ""
