"""Gradients of one step that are set aside, before batches that count with another weight in the mean."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hpcsgd.tensors.gradients import Gradients
from hpcsgd.tensors.group import Bucket


class SetAside:
    """Gradients of a step that were accumulated from batches with other weights than the current one.

    What the loop throws away afterwards (`zero_grad`) is dropped here too.

    Parameters
    ----------
    gradients
        The gradients, of which parts are set aside.

    Attributes
    ----------
    on_any_rank
        Whether a rank may have set parts aside; equal on all ranks.
    """

    def __init__(self, gradients: Gradients) -> None:
        self._gradients, self.on_any_rank = gradients, False
        #: Copies of all gradients, dense and sparse ones, and their factor in the mean.
        self._parts: list[tuple[list[Tensor | None], float]] = []

    def take(self, factor: float) -> None:
        """Set the gradients aside, for the mean with this factor, and begin with zeros; all count as used."""
        self._parts.append((self._gradients.copies(), factor))
        self._gradients.begin_again()
        self._gradients.on_discard = self._drop

    def _drop(self, indices: Sequence[int]) -> None:
        for part, _ in self._parts:
            for index in indices:
                part[index] = None

    def clear(self) -> None:
        """Discard the parts of this rank."""
        self._parts, self._gradients.on_discard = [], None

    def add_to(self, bucket: Bucket) -> None:
        """Add the parts to a bucket that is ready."""
        for part, factor in self._parts:
            self._gradients.add(bucket, part, factor)

    def add_to_rows(self, rows: list[Tensor | None]) -> list[Tensor | None]:
        """Return sparse gradients, in the order of `Gradients.sparse`, plus their parts."""
        for part, factor in self._parts:
            others = part[len(part) - len(rows) :]
            rows = [_sum(mine, other, factor) for mine, other in zip(rows, others, strict=True)]
        return rows

    def put_back(self, *, is_own: bool) -> bool:
        """Add the parts from this rank's own batches to its gradients; return whether these have any.

        The present gradients are discarded, where there are parts, if they are not from an own batch
        (`is_own`).
        """
        self._gradients.report_discarded()
        if self._parts and not is_own:
            self._gradients.begin_again()
        own = [part for part, factor in self._parts if factor]
        for part in own:
            self._gradients.put_back(part)
        self.clear()
        self.on_any_rank = False
        return bool(own) or is_own


def _sum(mine: Tensor | None, other: Tensor | None, factor: float) -> Tensor | None:
    """Return a gradient plus a multiple of another one, of which either may not exist."""
    if other is None:
        return mine
    return other * factor if mine is None else mine + other * factor
