"""What a strategy is: when ranks communicate, and what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from hpcsgd.strategies.context import Setting
from hpcsgd.tensors.group import Bucket


class Strategy:
    """One method of distributed SGD; a subclass overrides what it does differently from training alone.

    All methods are called on every rank, by the thread that runs the user's loop.

    Attributes
    ----------
    lockstep
        Whether every peer takes every step. Else `turns` says whose turn it is, the loaders begin
        again when they are through, and `step` itself counts `setting.step` up.
    """

    setting: Setting
    lockstep = True

    def options(self) -> dict[str, object]:
        """The options that all ranks must agree on, by name."""
        return {}

    def workers(self, ranks: int) -> int:
        """How many of so many ranks compute gradients: the first ones."""
        return ranks

    def fit(self, peers: int) -> None:
        """Ask for no more than so few peers can do, because others have died."""

    def attach(self, setting: Setting) -> None:
        """Take up a model; it has the same values on all ranks."""
        self.setting = setting

    def detach(self) -> None:
        """Leave the model in memory of its own, without hooks; nothing is in flight any more."""

    def enter(self, turn: int) -> None:
        """Let the module show the model of this rank's peer number `turn`."""

    def turns(self, end: int) -> Iterator[int]:
        """Where not in lockstep: which of this rank's peers is to take a step next, until step `end`.

        Its model is in place when it is yielded; `step` has been called when the next one is asked for.
        """
        raise NotImplementedError

    def accumulate(self) -> AbstractContextManager[None]:
        """Inside, backward adds to the gradients and starts no communication."""
        return nullcontext()

    def bucket_ready(self, bucket: Bucket) -> None:
        """The gradients of a bucket are complete; called in bucket order, from within backward."""

    def synchronize(self) -> None:
        """Bring the gradients to what the optimizer shall see; idempotent until the next backward."""

    def step(self, update: Callable[[], None]) -> None:
        """One training step; `update` lets the optimizer change the model."""
        update()

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model is the consensus of all ranks; afterwards training goes on from its own."""
        return nullcontext()

    def consensus_distance(self) -> float:
        """Root mean square over ranks of the distance of their models from the mean model."""
        return 0.0

    def model_step(self) -> int:
        """Which step's model this rank has: an older one where it rests; -1: that of the start."""
        return self.setting.step

    def figures(self) -> dict[str, Any]:
        """What this method adds to a record of metrics, of this rank, since the last call."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beyond model and optimizer."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
