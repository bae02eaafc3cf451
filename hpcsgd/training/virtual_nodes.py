"""Virtual nodes: several peers of one rank share one module and one optimizer, one peer at a time."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.tensors.memory import without_repetition
from hpcsgd.training import rng_state


class VirtualNodes:
    """Puts the state of one local peer in place: model, buffers, optimizer state and random generators.

    The strategy stores the parameters; buffers, optimizer states and generator states are stored here.
    With one peer a rank nothing is ever swapped.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, strategy: Strategy, context: StrategyContext
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._strategy, self._context = strategy, context
        each = context.peers.per_rank
        self._buffers: list[list[Tensor]] = []
        if each == 1:
            return
        context.require_torch_optimizer("a rank with several virtual nodes")
        self._buffers = [
            [without_repetition(b).clone().expand_as(b) for b in model.buffers()] for _ in range(each)
        ]
        self._states = [self._copied_state() for _ in range(each)]
        self._generators = [rng_state.state() for _ in range(each)]
        self._put_in_place(context.current_peer_index)

    def _copied_state(self) -> defaultdict[Tensor, Any]:
        state = self._optimizer.state
        return defaultdict(dict, {key: copy.deepcopy(value) for key, value in state.items()})

    def select_peer(self, index: int) -> None:
        """Store the state of the current peer and put that of local peer `index` in place."""
        current = self._context.current_peer_index
        if index == current:
            return
        self._states[current] = self._optimizer.state
        self._generators[current] = rng_state.state()
        # A module may have replaced a buffer by another tensor.
        self._buffers[current] = [buffer.data for buffer in self._model.buffers()]
        self._context.current_peer_index = index
        self._strategy.select_peer(index)
        self._put_in_place(index)
        rng_state.restore(self._generators[index])

    def each(self) -> Iterator[int]:
        """Put every local peer in place and yield its number; the first one is in place at the end."""
        for index, peer in enumerate(self._context.peers.local):
            self.select_peer(index)
            yield peer
        self.select_peer(0)

    def buffers(self) -> list[list[tuple[str, Tensor]]]:
        """Return the (name, buffer) pairs of each local peer; of the one in place the module's."""
        in_place = list(self._model.named_buffers())
        peers = [
            [(name, value) for (name, _), value in zip(in_place, values, strict=False)]
            for values in self._buffers or [[]]
        ]
        peers[self._context.current_peer_index] = in_place
        return peers

    def _put_in_place(self, index: int) -> None:
        self._optimizer.state = self._states[index]
        for buffer, value in zip(self._model.buffers(), self._buffers[index], strict=True):
            buffer.data = value
