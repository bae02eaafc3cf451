"""Checksums of parameters, on the host and on a device, and which parameters a comparison includes."""

from __future__ import annotations

import warnings
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


class Codebook(nn.Module):
    """Its output depends on a buffer that each forward pass changes, as a codebook; and normalises."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("mask", torch.ones(2))
        self.register_buffer("codes", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.codes.mul_(0.9).add_(x.mean(0))
        return (self.norm(x) + self.codes) * self.scale * self.mask


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("options", "is_warned"), [({}, True), ({"local": ["codes"]}, False), ({"buffer_period": 1}, False)]
)
def test_a_buffer_that_differs_in_training_is_a_warning(
    world: Any, options: dict[str, Any], is_warned: bool
) -> None:
    """Statistics of BatchNorm differ too, and training does not use them."""
    model = Codebook()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Run(
            model, torch.optim.SGD(model.parameters(), 0.1), comm=world, check_every=2, **options
        ) as run:
            for step in range(6):
                run.zero_grad()
                run.model(torch.randn(4, 2) + world.rank).square().mean().backward()
                run.step()
                if step == 1:
                    texts = [str(each.message) for each in caught if "buffer" in str(each.message)]
                    assert len(texts) == (is_warned and world.rank == 0)
    texts = [str(each.message) for each in caught if "differs between the ranks" in str(each.message)]
    assert len(texts) == (is_warned and world.rank == 0)
    assert all(
        text.startswith("buffer codes differs between the ranks in training (1 in all)") for text in texts
    )


@pytest.mark.mpi
@pytest.mark.parametrize("steps", [3, 4])
def test_models_of_the_ranks_may_change_between_the_last_average_and_the_end(world: Any, steps: int) -> None:
    """As by `optimizer.eval()` of schedule-free optimizers; the consensus is put in place."""
    model = nn.Linear(2, 1)
    with Run(model, torch.optim.SGD(model.parameters(), 0.1), LocalSGD(2), comm=world) as run:
        for _ in range(steps):
            run.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            run.step()
        before = model.weight.detach().clone()
        with torch.no_grad():
            model.weight.add_(world.rank)
    torch.testing.assert_close(model.weight.detach(), before + (world.size - 1) / 2)
