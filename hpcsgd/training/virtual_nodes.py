"""The peers of one rank, which take turns on one module and one optimizer (virtual nodes)."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hpcsgd.strategies import Setting, Strategy
from hpcsgd.training import rng_state


class Turns:
    """Gives module, optimizer and random generators what belongs to the peer whose turn it is.

    Models are the strategy's; buffers, the optimizer's state and the generators' are kept here. With one
    peer a rank nothing is ever touched.

    Parameters
    ----------
    model, optimizer
        The run's.
    strategy, setting
        Attached; the turn is kept in the setting.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, strategy: Strategy, setting: Setting
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._strategy, self._setting = strategy, setting
        each = setting.peers.each
        self._buffers: list[list[Tensor]] = []
        if each == 1:
            return
        self._buffers = [[b.clone() for b in model.buffers()] for _ in range(each)]
        self._states = [self._copied_state() for _ in range(each)]
        self._generators = [rng_state.state() for _ in range(each)]
        self._show(setting.turn)

    def _copied_state(self) -> defaultdict[Tensor, Any]:
        state = self._optimizer.state
        return defaultdict(dict, {key: copy.deepcopy(value) for key, value in state.items()})

    def enter(self, turn: int) -> None:
        """Let a peer of this rank have its turn."""
        now = self._setting.turn
        if turn == now:
            return
        self._states[now] = self._optimizer.state
        self._generators[now] = rng_state.state()
        self._setting.turn = turn
        self._strategy.enter(turn)
        self._show(turn)
        rng_state.restore(self._generators[turn])

    def each(self) -> Iterator[int]:
        """Every peer of this rank in turn; the first one's turn afterwards."""
        for turn, peer in enumerate(self._setting.peers.local):
            self.enter(turn)
            yield peer
        self.enter(0)

    def average_buffers(self) -> None:
        """Give the first peer the mean of the floating-point buffers of all on this rank."""
        for values in zip(*self._buffers, strict=True):
            if values[0].is_floating_point():
                values[0].copy_(torch.stack(values).mean(0))

    def spread_buffers(self) -> None:
        """Give all peers of this rank the buffers of the first."""
        for own in self._buffers[1:]:
            for target, source in zip(own, self._buffers[0], strict=True):
                target.copy_(source)

    def _show(self, turn: int) -> None:
        self._optimizer.state = self._states[turn]
        for buffer, own in zip(self._model.buffers(), self._buffers[turn], strict=True):
            buffer.data = own
