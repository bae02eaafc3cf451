"""One shard of a model: its values, and the pushes that wait to be counted in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpcsgd.server.delta_coding import ServerCodes
from hpcsgd.server.update_rules import Rule, Terms

#: The number of the push that brings the first values.
FIRST = 0


class Push(NamedTuple):
    """What one client has pushed.

    Attributes
    ----------
    client
        Whose it is.
    number
        Of the client's pushes of this shard, from 1; or `FIRST`.
    weight
        Of how many gradients it is the mean.
    values
        (nbytes,) uint8: the push, and then its answer. Of a push that is summed as words: one part of it;
        and then, of the first client, the sum, and of the others nothing.
    terms
        Of how many pushes it shall be the sum.
    """

    client: str
    number: int
    weight: float
    values: np.ndarray
    terms: int = 0


@dataclass
class Shard:
    """The values of one bucket, on the server that has it.

    Attributes
    ----------
    index, dtype, numel
        Its place among all shards; the values.
    rule
        How it is updated.
    centre
        (numel,) the values; None before a client has brought some.
    version
        How many updates there were.
    rounds
        Of each client, the number of the last push that has been counted in or left out.
    clocks
        Of each client, how many pushes it has made, as if it had been there from the start.
    left_out
        The clients whose last push was left out.
    waiting
        Pushes that have not been counted in.
    coding
        Makes `codes`, once there are values.
    codes
        What is said of them in codes; None: nothing.
    """

    index: int
    dtype: torch.dtype
    numel: int
    rule: Rule
    centre: Tensor | None = None
    version: int = 0
    rounds: dict[str, int] = field(default_factory=dict)
    clocks: dict[str, int] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    waiting: dict[str, Push] = field(default_factory=dict)
    coding: Callable[[], ServerCodes | None] = lambda: None
    codes: ServerCodes | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def view(self, values: np.ndarray) -> Tensor:
        """Bytes as values of this shard."""
        return torch.from_numpy(values).view(self.dtype)

    def fill(self, values: np.ndarray) -> None:
        """Take the first values."""
        self._begin(self.view(values).clone())

    def _begin(self, centre: Tensor | None) -> None:
        self.centre = centre
        if centre is not None and self.codes is None:
            self.codes = self.coding()

    def read(self, out: np.ndarray) -> None:
        """Copy the values to `out`."""
        assert self.centre is not None
        self.view(out).copy_(self.centre)

    def count_in(self, pushes: Sequence[Push], terms: Terms) -> None:
        """One update by some pushes."""
        assert self.centre is not None
        values = [self.view(push.values) for push in pushes]
        if self.codes is None or self.rule.takes_gradients:
            self.rule.apply(self.centre, values, terms)
        else:
            self.rule.apply(self.centre.clone(), values, terms)
            pulls = [(push.client, push.number, pull) for push, pull in zip(pushes, values, strict=True)]
            self.codes.draw_near(self.centre, pulls)
        self.version += 1
        for push in pushes:
            self.rounds[push.client] = push.number
            self.clocks[push.client] = self.clocks.get(push.client, 0) + 1

    def state_dict(self) -> dict[str, Any]:
        """All of it between two updates."""
        return {
            "centre": None if self.centre is None else self.centre.clone(),
            "version": self.version,
            "rounds": dict(self.rounds),
            "clocks": dict(self.clocks),
            "left_out": sorted(self.left_out),
            "rule": copy.deepcopy(self.rule.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._begin(None if state["centre"] is None else state["centre"].clone())
        self.version = int(state["version"])
        self.rounds, self.left_out = dict(state["rounds"]), set(state["left_out"])
        # Who is new since then is as far as the foremost.
        foremost = max(state["clocks"].values(), default=0)
        self.clocks = {**dict.fromkeys(self.clocks, foremost), **state["clocks"]}
        self.rule.load_state_dict(copy.deepcopy(state["rule"]))
