"""Checksums of parameters, on the host and on a device, and which parameters a comparison includes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpcsgd import DSGD, LASGD, AllReduce, Disagreement, LocalSGD, Run
from hpcsgd.training import drift


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int8, torch.bool])
@pytest.mark.parametrize("checksum", [drift.checksum, drift.checksum_on_device])
def test_a_checksum_depends_on_every_element_and_its_place(
    monkeypatch: pytest.MonkeyPatch, checksum: Any, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(drift, "_PIECE", 16)  # bytes
    values = torch.arange(30).remainder(2).reshape(5, 6).to(dtype)
    first = checksum(values)
    assert first == checksum(values.t().contiguous().t())
    for index in range(30):
        other = values.clone()
        other.view(-1)[index] = 1 - int(index % 2)
        assert checksum(other) != first
    swapped = values.flatten().roll(1).view_as(values)
    assert checksum(swapped) != first
    # Elements of different pieces.
    parts = values.flatten()
    assert checksum(torch.cat([parts[:10] * 0, parts[10:]])) != checksum(
        torch.cat([parts[:20], parts[20:] * 0])
    )


@pytest.mark.mpi(min_size=2)
def test_ten_comparisons_include_every_frozen_parameter(world: Any) -> None:
    frozen = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(13)).requires_grad_(False)
    model = nn.ModuleDict({"frozen": frozen, "trained": nn.Linear(1, 1)})
    run = Run(model, torch.optim.SGD(model.parameters(), 0.1), AllReduce(), comm=world, check_every=2)
    model["frozen"][7].weight.data += world.rank
    with pytest.raises(Disagreement, match=r"frozen\.7\.weight differs from that of rank 0 at step 14"):
        for _ in range(40):
            run.zero_grad()
            model["trained"](torch.ones(1, 1)).sum().backward()
            run.step()
    assert run.steps == 14


class Estimating(torch.optim.SGD):
    """Keeps an estimate in its group, as Prodigy and D-Adaptation do; from the second step on."""

    def step(self, closure: Any = None) -> Any:
        group = self.param_groups[0]
        group["k"] = group.get("k", 0) + 1
        if group["k"] > 1:
            seen = group["params"][0].grad.sum().clone()
            group["d"] = group.get("d", 0.0) + float(seen)
            group["new"] = seen  # another tensor in each step
            group.setdefault("history", []).append(float(seen))
            group["array"] = np.full(3, float(seen))
        return super().step(closure)


def train(run: Run, steps: int, value: float) -> None:
    for _ in range(steps):
        run.zero_grad()
        (value * run.model(torch.ones(1, 2))).sum().backward()
        run.step()


@pytest.mark.mpi
@pytest.mark.parametrize("strategy", [AllReduce, lambda: LocalSGD(2), lambda: LASGD(2), DSGD])
def test_estimates_of_an_optimizer_differ_where_ranks_take_steps_of_their_own(
    world: Any, strategy: Any
) -> None:
    model = nn.Linear(2, 1)
    with Run(model, Estimating(model.parameters(), 0.01), strategy(), comm=world, check_every=1) as run:
        train(run, 5, world.rank + 1.0)
        with run.averaged():
            pass
        is_equal = len({*world.gather(run.optimizer.param_groups[0]["d"])}) == 1
        assert is_equal == (world.size == 1 or isinstance(run.strategy, AllReduce))


@pytest.mark.mpi(min_size=2)
def test_numbers_that_the_loop_changes_are_compared_beside_estimates(world: Any) -> None:
    model = nn.Linear(2, 1)
    run = Run(model, Estimating(model.parameters(), 0.01), LocalSGD(2), comm=world)
    train(run, 3, world.rank + 1.0)
    run.check()
    run.optimizer.param_groups[0]["lr"] = 0.01 * (1 + world.rank)
    with pytest.raises(
        Disagreement, match=r"lr of parameter group 0 differs .* the ranks were equal at step 3"
    ):
        run.check()
    run.optimizer.param_groups[0]["lr"] = 0.01
    run.close()
