"""The states of random generators: of every kind, and restored where there are fewer GPUs, or none."""

from __future__ import annotations

import random

import numpy as np
import torch

from hpcsgd.training import rng_state


def draw() -> list[float]:
    on_host = torch.rand(3, device="cpu").tolist()
    return [random.random(), np.random.rand(), *on_host, *torch.rand(3).tolist()]  # noqa: NPY002


def test_a_seed_and_a_state_give_the_same_numbers_again() -> None:
    rng_state.seed(3)
    state = rng_state.state()
    first = draw()
    assert draw() != first
    rng_state.restore(state)
    assert draw() == first
    rng_state.seed(3)
    assert draw() == first


def test_states_of_gpus_that_are_not_here_are_left_out() -> None:
    state = rng_state.state()
    first = draw()
    state["cuda"] = [*state["cuda"], torch.zeros(16, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8)]
    rng_state.restore(state)
    assert draw() == first
