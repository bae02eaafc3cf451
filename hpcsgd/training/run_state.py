"""The state of one peer of a run: model, optimizer and parameters outside of the model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from hpcsgd.training import rng_state
from hpcsgd.training.trained_parameters import TrainedParameters, plain_module


def peer_state(model: nn.Module, optimizer: Any, trained: TrainedParameters) -> dict[str, Any]:
    """Return the state of the peer that is in place; its tensors are those that are trained."""
    state = {"model": plain_module(model).state_dict(), "optimizer": optimizer.state_dict()}
    if trained.outside:
        state["outside"] = {name: p.detach().clone() for name, p in trained.outside}
    return state


def peer_states(
    each_peer: Iterable[int], model: nn.Module, optimizer: Any, trained: TrainedParameters
) -> list[dict[str, Any]]:
    """Return copies of the states of all local peers, with their generators."""
    return [
        {**copy.deepcopy(peer_state(model, optimizer, trained)), "generators": rng_state.state()}
        for _ in each_peer
    ]


def load_peer_state(
    state: dict[str, Any], model: nn.Module, optimizer: Any, trained: TrainedParameters
) -> None:
    """Restore the state that `peer_state` returned, and random generators where it has some."""
    plain_module(model).load_state_dict(state["model"])
    for name, p in trained.outside:
        p.data.copy_(state["outside"][name])
    optimizer.load_state_dict(state["optimizer"])
    if "generators" in state:
        rng_state.restore(state["generators"])
