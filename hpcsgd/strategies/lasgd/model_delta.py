"""Snapshots of a model that are averaged while it changes, and the corrections that the averages yield."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hpcsgd.collectives.compressed import CompressedReducer
from hpcsgd.collectives.reducer import PlainReducer
from hpcsgd.tensors.group import TensorGroup

Merge = Literal["damped", "delta", "overwrite"]


class ModelDelta:
    """A snapshot of this rank's model, its average over all ranks, and the correction of the model.

    A round is `snapshot`, `start`, `finish`, `accumulate`; `apply` follows at any time. Two threads call
    these methods, one at a time except for `start` and `finish`. Takes the memory of three more models,
    with compression of four.

    Parameters
    ----------
    model
        The model of this rank.
    average
        Tensors of the same shapes, in which snapshots are averaged.
    reducer
        Sums `average` over all ranks.
    merge
        "delta" and "damped": the correction is average - snapshot, or a share of it, which preserves the
        steps since the snapshot and the mean of all models. "overwrite": the average replaces the model.
    changes
        Whether to average the changes since the last average instead of the models, for compression.
    """

    def __init__(
        self,
        model: TensorGroup,
        average: TensorGroup,
        reducer: PlainReducer | CompressedReducer,
        merge: Merge,
        *,
        changes: bool,
    ) -> None:
        from hpcsgd.kernels.sums import model_delta as kernels

        self._model, self._average, self._reducer = model, average, reducer
        self._rule: _MergeRule = _Overwrite() if merge == "overwrite" else _AddCorrection(kernels)
        self._correction = [torch.zeros_like(bucket.flat) for bucket in model]
        self._snapshot = [torch.zeros_like(bucket.flat) for bucket in model]
        #: The last average, equal on all ranks.
        self._last_average = [bucket.flat.clone() for bucket in model] if changes else []
        world, dtypes = model.world, [bucket.flat.dtype for bucket in model]
        world.local.compile_kernels(lambda: kernels.warm_up(dtypes, world.device))

    def snapshot(self, pending: bool) -> None:
        """Take a snapshot, with the correction added if one is `pending`."""
        for bucket, average, correction, snapshot in zip(
            self._model, self._average, self._correction, self._snapshot, strict=True
        ):
            self._rule.snapshot(bucket.flat, correction, average.flat, snapshot, pending=pending)
        for average, last in zip(self._average, self._last_average, strict=False):
            average.flat.sub_(last)

    def start(self, number: int) -> None:
        """Start to average the snapshots of all ranks; `number` is the round."""
        for average in self._average:
            self._reducer.start(average, 1.0 / average.world.size, number)

    def finish(self) -> None:
        """Wait for the average."""
        self._reducer.finish()

    def accumulate(self, share: float) -> tuple[list[float | Tensor], list[Tensor]]:
        """Add a share of average - snapshot, equal on all ranks, to the correction.

        Returns
        -------
        (squared_distances, norms)
            For each bucket the squared 2-norm of average - snapshot, and the norm of the average; a tensor is
            of shape ().
        """
        for average, last in zip(self._average, self._last_average, strict=False):
            last.copy_(average.flat.add_(last))
        squares = [
            self._rule.accumulate(average.flat, snapshot, correction, share)
            for average, snapshot, correction in zip(
                self._average, self._snapshot, self._correction, strict=True
            )
        ]
        norms = [torch.linalg.vector_norm(each.flat, dtype=_wide(each.flat)) for each in self._average]
        return squares, norms

    def apply(self) -> None:
        """Apply the correction to the model, and reset it."""
        for bucket, correction in zip(self._model, self._correction, strict=True):
            self._rule.apply(bucket.flat, correction)

    def state_dict(self) -> dict[str, Any]:
        """Return the state between rounds, with no correction pending."""
        return {
            "before": [last.cpu().clone() for last in self._last_average],
            "reduction": self._reducer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        for last, saved in zip(self._last_average, state["before"], strict=True):
            last.copy_(saved)
        self._reducer.load_state_dict(state["reduction"])


class _MergeRule(Protocol):
    def snapshot(
        self, model: Tensor, correction: Tensor, average: Tensor, snapshot: Tensor, *, pending: bool
    ) -> None:
        """Write the model, with a pending correction applied, to `average` and `snapshot`."""

    def accumulate(
        self, average: Tensor, snapshot: Tensor, correction: Tensor, share: float
    ) -> float | Tensor:
        """Add the result of a round to `correction`; return the sum of squares of average - snapshot."""

    def apply(self, model: Tensor, correction: Tensor) -> None:
        """Apply the correction to the model."""


class _AddCorrection:
    def __init__(self, kernels: Any) -> None:
        self.accumulate, self.apply = kernels.accumulate, kernels.apply_correction
        self._take_snapshot = kernels.take_snapshot

    def snapshot(
        self, model: Tensor, correction: Tensor, average: Tensor, snapshot: Tensor, *, pending: bool
    ) -> None:
        self._take_snapshot(model, correction, average, snapshot)


class _Overwrite:
    def snapshot(
        self, model: Tensor, correction: Tensor, average: Tensor, snapshot: Tensor, *, pending: bool
    ) -> None:
        snapshot.copy_(correction if pending else model)
        average.copy_(snapshot)

    def accumulate(
        self, average: Tensor, snapshot: Tensor, correction: Tensor, share: float
    ) -> float | Tensor:
        correction.copy_(average)
        return snapshot.sub_(average).double().square().sum()

    def apply(self, model: Tensor, correction: Tensor) -> None:
        model.copy_(correction)


def _wide(values: Tensor) -> torch.dtype:
    """Return a dtype in which the norm neither overflows nor loses precision."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32
