"""What a model gains from averages that are taken of it while it goes on changing."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hpcsgd.collectives.compressed import Compressed
from hpcsgd.collectives.reducer import Plain
from hpcsgd.tensors.group import TensorGroup

Merge = Literal["damped", "delta", "overwrite"]


class Delta:
    """A snapshot of this rank's model that goes into an average, and what the model gains from that.

    A round is `begin`, `start`, `finish`, and then `merge` before or during a later one. Two threads use it,
    one at a time but for `start` and `finish`. Memory of three more models, of four with compression.

    Parameters
    ----------
    model
        This rank's.
    average
        Tensors like it, which are reduced in place of it.
    sums
        The reduction of `average`.
    merge
        "delta" and "damped": the model goes by as much as the average is away from its snapshot, or by a
        share of that, which keeps what it has learned meanwhile, and the mean of all models. "overwrite": it
        becomes the average.
    changes
        Whether what goes into an average is the change since the last one, for compression.
    """

    def __init__(
        self,
        model: TensorGroup,
        average: TensorGroup,
        sums: Plain | Compressed,
        merge: Merge,
        *,
        changes: bool,
    ) -> None:
        from hpcsgd.kernels.sums import model_delta as kernels

        self._model, self._average, self._sums = model, average, sums
        self._kind: _Kind = _Overwrite() if merge == "overwrite" else _Shift(kernels)
        self._gain = [torch.zeros_like(bucket.flat) for bucket in model]
        self._shot = [torch.zeros_like(bucket.flat) for bucket in model]
        #: The last average, the same on all ranks.
        self._before = [bucket.flat.clone() for bucket in model] if changes else []
        world, dtypes = model.world, [bucket.flat.dtype for bucket in model]
        world.compile(lambda: kernels.warm_up(dtypes, world.device))

    def begin(self, pending: bool) -> None:
        """Take the snapshot, with what the model is yet to gain where that is `pending`."""
        for bucket, target, gain, shot in zip(
            self._model, self._average, self._gain, self._shot, strict=True
        ):
            self._kind.snapshot(bucket.flat, gain, target.flat, shot, pending=pending)
        for target, before in zip(self._average, self._before, strict=False):
            target.flat.sub_(before)

    def start(self, number: int) -> None:
        """Start the average of all ranks' snapshots."""
        for target in self._average:
            self._sums.start(target, 1.0 / target.world.size, number)

    def finish(self) -> None:
        """Wait for the average."""
        self._sums.finish()

    def advance(self, share: float) -> tuple[float, float]:
        """Note what the model gains, a share of what the average brings; the same share on all ranks.

        Returns the squares of the snapshot's distance from the average, and of the average's norm.
        """
        for target, before in zip(self._average, self._before, strict=False):
            before.copy_(target.flat.add_(before))
        squares = [
            self._kind.advance(target.flat, shot, gain, share)
            for target, shot, gain in zip(self._average, self._shot, self._gain, strict=True)
        ]
        norms = [torch.linalg.vector_norm(target.flat, dtype=_wide(target.flat)) for target in self._average]
        return sum(map(float, squares)), sum(float(norm) ** 2 for norm in norms)

    def merge(self) -> None:
        """Give the model what it has gained."""
        for bucket, gain in zip(self._model, self._gain, strict=True):
            self._kind.merge(bucket.flat, gain)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold between rounds, with all gains merged."""
        return {
            "before": [before.cpu().clone() for before in self._before],
            "reduction": self._sums.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for before, saved in zip(self._before, state["before"], strict=True):
            before.copy_(saved)
        self._sums.load_state_dict(state["reduction"])


class _Kind(Protocol):
    def snapshot(self, model: Tensor, gain: Tensor, average: Tensor, shot: Tensor, *, pending: bool) -> None:
        """Write what the model would be after a merge to `average` and `shot`."""

    def advance(self, average: Tensor, shot: Tensor, gain: Tensor, share: float) -> float | Tensor:
        """Add to `gain` a share of what a round brought; returns the sum of squares of average - shot."""

    def merge(self, model: Tensor, gain: Tensor) -> None:
        """Bring the gain into the model."""


class _Shift:
    def __init__(self, kernels: Any) -> None:
        self.advance, self.merge, self._snapshot = kernels.advance, kernels.merge, kernels.snapshot

    def snapshot(self, model: Tensor, gain: Tensor, average: Tensor, shot: Tensor, *, pending: bool) -> None:
        self._snapshot(model, gain, average, shot)


class _Overwrite:
    def snapshot(self, model: Tensor, gain: Tensor, average: Tensor, shot: Tensor, *, pending: bool) -> None:
        shot.copy_(gain if pending else model)
        average.copy_(shot)

    def advance(self, average: Tensor, shot: Tensor, gain: Tensor, share: float) -> float | Tensor:
        gain.copy_(average)
        return shot.sub_(average).double().square().sum()

    def merge(self, model: Tensor, gain: Tensor) -> None:
        model.copy_(gain)


def _wide(values: Tensor) -> torch.dtype:
    """The type in which a norm neither overflows nor is inexact."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32
