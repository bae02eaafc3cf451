"""`Strategy`, the interface of all methods: when ranks communicate, and which tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from hpcsgd import registry
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.tensors.group import Bucket


class Strategy:
    """One method of distributed SGD; the base class is training without communication.

    A strategy with options is a dataclass, without `eq` and `repr`: its fields are the options, and their
    annotations the limits that are checked. All methods are called on every rank, by the compute thread (the
    one that runs the user's loop).

    Attributes
    ----------
    title
        Name of the method in errors; "": that of the class.
    context
        The context of the run, set by `attach`.
    accepts_compression, accepts_virtual_nodes
        Whether the method can be used with these options of `Run`; see `hpcsgd.strategies.attach`.
    synchronous
        Whether every peer takes every step. If not, `peer_schedule` yields the local peer of the next step,
        loaders are started again at their end, and `step` itself advances `context.step`.
    deterministic
        Whether runs with equal options, seed and ranks have the same bits, wherever their loops end; known
        after `attach`. One peer alone always has.
    averages_gradients
        Whether each step uses the mean gradient of all ranks.
    accepts_weights
        Whether the gradients or models of the ranks may have different weights in the mean.
    averages_in_background
        Whether the communication threads average beside training: no step waits for a step of another rank,
        and `state_dict` is collective, for it waits for the end of all averages.
    """

    title = ""
    context: StrategyContext
    accepts_compression = False
    accepts_virtual_nodes = False
    synchronous = True
    deterministic = True
    averages_gradients = False
    accepts_weights = False
    averages_in_background = False

    def __post_init__(self) -> None:
        registry.check_fields(self)

    def options(self) -> dict[str, object]:
        """Return the options by name; they must be equal on all ranks."""
        return registry.field_values(self)

    def workers(self, ranks: int) -> int:
        """Return how many of `ranks` ranks compute gradients: always the first ones."""
        return ranks

    def clamp_to(self, peers: int) -> None:
        """Reduce options to values that `peers` peers allow, after ranks have failed."""

    def attach(self, context: StrategyContext) -> None:
        """Start with the model of `context`, which has the same values on all ranks; collective."""
        self.context = context

    def check_memory(self, *, in_update: bool = False) -> None:
        """Check that what the strategy exchanges is still what is trained; before steps and exchanges.

        Compares addresses; a parameter with other memory of the same shape, dtype and device is taken in.

        Parameters
        ----------
        in_update
            Whether the update of a step calls, which does not wait for exchanges in flight. Default False.

        Raises
        ------
        HpcsgdError
            A parameter has another shape, dtype or device, or has become the memory of another one.
        """

    def taken_in(self) -> AbstractContextManager[None]:
        """Context in which other memory is taken in as by `check_memory`; afterwards all is as before.

        A loop that swaps averages in for an evaluation swaps the memory of the parameters back.
        """
        return nullcontext()

    def detach(self) -> None:
        """Put the consensus in place, finish all communication, remove hooks and free memory; collective.

        The model then has memory of its own, and the same values on all ranks.
        """

    def disconnect(self) -> None:
        """Remove hooks after the run was dropped or left; local, also called by the garbage collector."""
        if hasattr(self, "context"):
            self.context.unscale = bool  # the former one refers to this strategy: its memory is freed at once

    def select_peer(self, index: int) -> None:
        """Make the module's parameters those of local peer `index`."""

    def peer_schedule(self, end: int) -> Iterator[int]:
        """Yield the index of the local peer of each next step, until iteration `end`; asynchronous only.

        The caller puts the peer's model in place and calls `step` before it asks for the next index.
        """
        raise NotImplementedError

    def accumulate(self) -> AbstractContextManager[None]:
        """Context manager for backward passes that add to the gradients and start no communication."""
        return nullcontext()

    def bucket_ready(self, bucket: Bucket) -> None:
        """Handle a bucket whose gradients are complete; called in bucket order, from within backward."""

    def synchronize(self, weight: float | None = None) -> None:
        """Complete the reduction of the gradients; idempotent until the next backward pass.

        Parameters
        ----------
        weight
            Weight of this rank's gradients in the mean, above or equal to 0. Default: equal weights.
        """

    def complete_gradients(self) -> bool:
        """Complete the gradients before an update; return False where all ranks leave the step out."""
        return not self.context.loop.skipped

    def step(self, update: Callable[[], None]) -> None:
        """Take one training step; `update` makes the optimizer change the model."""
        update()

    def restart(self) -> bool:
        """Start again with the parameters of `context`, of which more are trained; collective.

        Returns False where the method cannot: then nothing has changed.
        """
        return False

    def has_equal_models(self) -> bool:
        """Return whether the models of all ranks must be equal at the end of the last step."""
        return False

    def quiesce(self) -> None:
        """Wait until nothing is averaged in the background, nor will be before the next step; collective.

        Jobs of the background come in an order of their own: other collective operations may not meet them.
        """

    def check_consensus(self) -> None:
        """Raise where there is no consensus now, as peers wait for their models; local."""

    def averaged(self) -> AbstractContextManager[None]:
        """Context manager in which the model is the consensus of all peers; collective."""
        return nullcontext()

    def consensus_distance(self) -> float:
        """Return the root mean square over peers of the models' distances from the consensus; collective."""
        return 0.0

    def model_step(self) -> int:
        """Return the step of this rank's model: an earlier one if the rank is idle; -1: the initial model."""
        return self.context.step

    def metrics(self) -> dict[str, Any]:
        """Return this rank's additional fields of a metrics record, measured since the last call."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint beyond those of model and optimizer."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
