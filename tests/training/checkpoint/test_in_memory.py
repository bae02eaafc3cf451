"""Checkpoints in memory, and their conversion for other ranks: mean of the newest models, same position."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcsgd.training.checkpoint.in_memory import InMemoryCheckpoints, redistribute, rescale_progress
from tests.support.devices import normal


def state(rank: int, step: int, model_step: int) -> dict[str, Any]:
    model = {"weight": normal(3, 2, seed=rank), "count": torch.tensor(rank)}
    return {"step": step, "run": {"model": model, "model_step": model_step, "optimizer": {"own": rank}}}


@pytest.mark.mpi
def test_all_go_on_from_the_newest_state_that_all_have(world: Any) -> None:
    """Some ranks have made one copy more, none more than one; a later change of the state changes no copy."""
    checkpoints, live = InMemoryCheckpoints(), torch.zeros(2)
    assert checkpoints.newest_common(world) is None
    for number in range(3 + world.rank % 2):
        live.fill_(number)
        checkpoints.add({"live": live, "nested": [{"live": live}]})
    live.fill_(9)
    found = checkpoints.newest_common(world)
    expected = 2 if world.size > 1 else 2 + world.rank % 2
    assert found is not None
    for value in (found["live"], found["nested"][0]["live"]):
        assert torch.equal(value, torch.full((2,), float(expected), device=value.device))
    checkpoints.add({"live": live})
    again = checkpoints.newest_common(world)
    assert again is not None and torch.equal(again["live"].to(live.device), live)


@pytest.mark.mpi
def test_all_get_the_mean_of_the_newest_models(world: Any) -> None:
    """Each rank has two states, of which every third is old; its own number and optimizer stay."""
    everyone = [state(rank, 8, 5 if rank % 3 == 2 else 8) for rank in range(2 * world.size)]
    own = everyone[world.rank :: world.size]
    before = copy.deepcopy(own)
    found = redistribute(own, world, 2)
    newest = [s["run"]["model"]["weight"].double() for s in everyone if s["run"]["model_step"] == 8]
    mean = (sum(newest) / len(newest)).float()  # type: ignore[union-attr, arg-type]
    torch.testing.assert_close(found["run"]["model"]["weight"], mean)
    assert found["run"]["optimizer"] == {"own": world.rank}
    assert int(found["run"]["model"]["count"]) == world.rank
    assert torch.equal(own[0]["run"]["model"]["weight"], before[0]["run"]["model"]["weight"])


@pytest.mark.mpi
def test_equal_models_keep_their_bits_and_a_rank_that_contributes_none_gets_one(world: Any) -> None:
    same = state(3, 4, 4)
    contributing = 1 if world.rank == 0 else world.rank % 2
    found = redistribute([copy.deepcopy(same)], world, contributing)
    assert torch.equal(found["run"]["model"]["weight"], same["run"]["model"]["weight"])


@given(st.data())
def test_the_position_in_the_epochs_stays(data: st.DataObject) -> None:
    """Nothing is repeated; at most a step of the new ranks is skipped, and never an epoch's end."""
    accumulate = data.draw(st.integers(1, 4))
    batches, before = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    steps_per_epoch, steps_before = -(-batches // accumulate), -(-before // accumulate)
    step = data.draw(st.integers(0, 5 * steps_before))
    saved = {"step": step, "steps_per_epoch": steps_before, "batches": before, "loaders": []}
    found = rescale_progress(saved, steps_per_epoch, batches, accumulate)
    assert found["step"] == found["base"] and found["epoch"] == step // steps_before
    assert 0 <= found["batch"] < batches and found["batch"] % accumulate == 0
    assert found["step"] == found["epoch"] * steps_per_epoch + found["batch"] // accumulate
    if step % steps_before == 0:
        assert found["batch"] == 0
    ends = found["epoch"] * steps_per_epoch + steps_per_epoch - 1
    exact = step / steps_before * steps_per_epoch
    assert found["step"] >= min(exact, ends) - 1e-9 and found["step"] < exact + 1
    if batches == before:
        assert found["step"] == step
    assert found["loaders"] == [{"epoch": found["epoch"], "batch": found["batch"]}]


@given(st.integers(0, 5), st.integers(1, 50), st.integers(1, 50), st.data())
def test_loaders_stay_where_each_of_them_is(epoch: int, before: int, batches: int, data: Any) -> None:
    batch = data.draw(st.integers(0, before - 1))
    place = [{"epoch": epoch, "batch": batch}]
    saved = {"step": 7, "steps_per_epoch": 10, "batches": before, "loaders": place}
    (found,) = rescale_progress(saved, 10, batches, None)["loaders"]
    assert found["epoch"] == epoch and 0 <= found["batch"] < batches
    assert abs(found["batch"] / batches - batch / before) <= 1 / batches
