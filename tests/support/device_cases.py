"""Short trainings that together use each path between the device and the communication."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hpcsgd
from hpcsgd import (
    ADPSGD,
    DSGD,
    LASGD,
    SGP,
    AllReduce,
    BackupWorkers,
    LocalSGD,
    ParameterServer,
    Run,
    Strategy,
    Teleportation,
    World,
)

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "allreduce": AllReduce,
    "local": lambda: LocalSGD(2),
    "lasgd": lambda: LASGD(2, 2, "all"),
    "lasgd-overwrite": lambda: LASGD(2, 2, "all", "overwrite"),
    "dsgd": lambda: DSGD("ring"),
    "dsgd-overlap": lambda: DSGD("ring", True),
    "sgp": lambda: SGP("ring", True),
    "adpsgd": lambda: ADPSGD("star", "drawn"),
    "backup": lambda: BackupWorkers(backups=0),
    "ps": lambda: ParameterServer("sync"),
    "teleport": lambda: Teleportation(topology="ring"),
}
SCHEMES = ("maxnorm", "multiscale", "powersgd", "randk", "signsgd", "topk", "fp16")
#: (strategy, options of Run) by name.
CASES: dict[str, tuple[Callable[[], Strategy], dict[str, Any]]] = {
    **{name: (make, {}) for name, make in STRATEGIES.items()},
    **{
        f"{scheme}-{algorithm}": (AllReduce, {"compress": scheme, "algorithm": algorithm})
        for scheme in SCHEMES
        for algorithm in ("ring", "auto")
    },
}


def train(world: World, name: str) -> bytes:
    """Return the parameters of this rank after some steps of a case."""
    make, options = CASES[name]
    with torch.device("cpu"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 30), nn.ReLU(), nn.Linear(30, 10))
        generator = torch.Generator().manual_seed(world.rank)
        data = [
            (torch.randn(16, 20, generator=generator), torch.randint(10, (16,), generator=generator))
            for _ in range(6)
        ]
    model.to(world.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    # Several buckets, and a case of 6 steps in which each is reduced 6 times.
    with Run(model, optimizer, make(), comm=world, bucket_mib=0.004, **options) as run:
        for x, y in run.batches(data):
            run.zero_grad()
            nn.functional.cross_entropy(model(x.to(world.device)), y.to(world.device)).backward()
            run.step()
        with run.averaged():
            pass
        run.consensus_distance()
    return vector(model).tobytes()


def train_beside_rounds(world: World) -> bytes:
    """Return the consensus of LASGD whose steps go on during rounds, and change all models by known amounts.

    Whatever the times, an average changes no sum of models.
    """
    model = nn.Linear(300, 10, bias=False, dtype=torch.float64, device=world.device)
    nn.init.zeros_(model.weight)
    with Run(model, torch.optim.SGD(model.parameters(), 1.0), LASGD(1), comm=world, bucket_mib=0.01) as run:
        for step in range(30):
            model.weight.grad = torch.full_like(model.weight, float((step + world.rank) % 5))
            time.sleep(1e-3)
            run.step()
    return np.round(vector(model), 6).tobytes()


def vector(model: nn.Module) -> np.ndarray:
    return np.concatenate([p.numpy(force=True).ravel() for p in model.parameters()])


#: Variables of the environment that a world reads.
LAYOUTS = {
    "windows": {},
    "staged": {"HPCSGD_DEVICE_WINDOWS": "0"},
    "nodes": {"HPCSGD_RANKS_PER_NODE": "2"},
    "staged nodes": {"HPCSGD_RANKS_PER_NODE": "2", "HPCSGD_DEVICE_WINDOWS": "0"},
}


def world_on(device: str, layout: str, timeout: float = 20) -> World:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LAYOUTS[layout].items():
            patch.setenv(name, value)
        return hpcsgd.World(device=device, timeout=timeout)
