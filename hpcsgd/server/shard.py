"""One shard of a model: its values and pending pushes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpcsgd.server.delta_coding import ServerDeltaCodec
from hpcsgd.server.update_rules import UpdateContext, UpdateRule

#: Number of the push that holds the initial values.
INITIAL_PUSH = 0


class Push(NamedTuple):
    """One push of one client."""

    client: str
    number: int  # number of the client's push to this shard, from 1; or `INITIAL_PUSH`
    weight: float  # number of gradients whose mean is pushed
    #: (nbytes,) uint8: the push, and then its reply. In a code sum: one part of the push; and then the sum
    #: for the first client, and an empty array for the others.
    values: np.ndarray
    terms: int = 0  # in a code sum: the number of pushes that are summed
    staleness: int = 0  # number of updates that the client had missed


@dataclass
class Shard:
    """The values of one bucket, on the server that holds it."""

    #: Index among all shards; type and number of the values.
    index: int
    dtype: torch.dtype
    numel: int
    rule: UpdateRule
    #: (numel,) the values: the model's, or the centre variable of EASGD; None until a client sends some.
    centre: Tensor | None = None
    version: int = 0  # number of updates
    #: By client: number of the last push that was applied or dropped.
    last_pushes: dict[str, int] = field(default_factory=dict)
    #: By client: number of pushes, as if it had been there from the start.
    clocks: dict[str, int] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)  # clients whose last push was dropped
    pending: dict[str, Push] = field(default_factory=dict)  # by client: push that has not been applied yet
    make_codec: Callable[[], ServerDeltaCodec | None] = lambda: None  # makes `codec`, once there are values
    codec: ServerDeltaCodec | None = None  # encodes replies and decodes pushes; None: they are sent as values

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def view(self, values: np.ndarray) -> Tensor:
        """View bytes as values of this shard."""
        return torch.from_numpy(values).view(self.dtype)

    def initialize(self, values: np.ndarray) -> None:
        """Set the initial values."""
        self._set_centre(self.view(values).clone())

    def _set_centre(self, centre: Tensor | None) -> None:
        self.centre = centre
        if centre is not None and self.codec is None:
            self.codec = self.make_codec()

    def copy_to(self, out: np.ndarray) -> None:
        """Copy the values to `out`."""
        assert self.centre is not None
        self.view(out).copy_(self.centre)

    def apply(self, pushes: Sequence[Push], context: UpdateContext) -> None:
        """Make one update of these pushes."""
        assert self.centre is not None
        values = [self.view(push.values) for push in pushes]
        if self.codec is None or self.rule.takes_gradients:
            self.rule.apply(self.centre, values, context)
        else:
            self.rule.apply(self.centre.clone(), values, context)
            differences = [(p.client, p.number, value) for p, value in zip(pushes, values, strict=True)]
            self.codec.apply_elastic(self.centre, differences)
        self.version += 1
        for push in pushes:
            self.last_pushes[push.client] = push.number
            self.clocks[push.client] = self.clocks.get(push.client, 0) + 1

    def state_dict(self) -> dict[str, Any]:
        """State between two updates."""
        return {
            "centre": None if self.centre is None else self.centre.clone(),
            "version": self.version,
            "rounds": dict(self.last_pushes),
            "clocks": dict(self.clocks),
            "left_out": sorted(self.dropped),
            "rule": copy.deepcopy(self.rule.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of `state_dict`."""
        self._set_centre(None if state["centre"] is None else state["centre"].clone())
        self.version = int(state["version"])
        self.last_pushes, self.dropped = dict(state["rounds"]), set(state["left_out"])
        # Clients that the state lacks have the clock of the most advanced one.
        newest = max(state["clocks"].values(), default=0)
        self.clocks = {**dict.fromkeys(self.clocks, newest), **state["clocks"]}
        self.rule.load_state_dict(copy.deepcopy(state["rule"]))
