"""Comparison of the ranks during training: replicas that must be equal never drift apart in silence."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcsgd.collectives.step_status import StepStatus
from hpcsgd.errors import Disagreement
from hpcsgd.mpi.world import World
from hpcsgd.training.trained_parameters import Named

_CAUSES = (
    "a weight that one rank changes by itself, an Embedding with max_norm, a gradient that is changed on one "
    "rank or by a random number, a second optimizer, one that uses the graph of p.grad (AdaHessian), "
    "a schedule that follows the loss or the steps of one rank (ReduceLROnPlateau: pass run.mean(loss)), or "
    "whose state one rank alone has loaded"
)


_PIECE = 2**22  # bytes whose checksum is computed at once on a GPU, in eight times as much memory
_SMALL = 4096  # bytes of a buffer that is always compared

NamedBuffers = Sequence[tuple[str, Tensor]]


class DriftCheck:
    """Compares parameters, and the numbers in the optimizer's groups, over all ranks; every 0 steps: never.

    Attributes
    ----------
    equal_step
        The last step at which the ranks were equal.
    """

    def __init__(self, world: World, optimizer: Any, every: int) -> None:
        self._world, self._optimizer, self.every = world, optimizer, every
        self._status = StepStatus(world)
        self._estimates: set[tuple[int, str]] = set()
        self._marks: dict[str, tuple[int, int]] = {}
        self._has_warned = False
        self.equal_step = 0

    def begin(self, buffers: NamedBuffers) -> None:
        """Begin with buffers that training may use."""
        self._marks = _marks(buffers)

    def is_due(self, step: int) -> bool:
        """Return whether the ranks are to be compared after a step."""
        return self._world.size > 1 and self.every > 0 and step % self.every == 0

    def number(self, step: int) -> int:
        """Return the number of comparisons due until a step."""
        return step // self.every if self.every else 0

    @contextmanager
    def of_own_step(self) -> Iterator[None]:
        """Context of an optimizer's step on this rank's gradients alone.

        Numbers of the groups that it changes (the step size of Prodigy or D-Adaptation) are estimates of this
        rank, and may differ from now on.
        """
        before = self._numbers()
        yield
        for key, (value, state) in self._numbers().items():
            former, state_before = before.get(key, (None, None))
            is_replaced = isinstance(value, Tensor) and value is not former
            if is_replaced or state != state_before:
                self._estimates.add(key)

    def _numbers(self) -> dict[tuple[int, str], tuple[object, object]]:
        """Return each value in the groups, with what shows a change of it in place."""
        return {
            (number, key): (value, value._version if isinstance(value, Tensor) else _plain(value))
            for number, group in enumerate(self._optimizer.param_groups)
            for key, value in group.items()
            if key != "params"
        }

    def compare(
        self,
        step: int,
        batches: int,
        parameters: Sequence[Named] | None,
        *,
        settings: bool = True,
        buffers: NamedBuffers = (),
    ) -> None:
        """Compare the ranks; collective.

        Parameters
        ----------
        step, batches
            The number of steps and of batches taken.
        parameters
            Parameters that must be equal; None: those of the ranks differ.
        settings
            Whether learning rates, steps and batches must be equal. Default True.
        buffers
            Buffers of which those that have changed should be equal: else a warning. Default: none.

        Raises
        ------
        Disagreement
            On all ranks, with the first parameter or number that differs, the ranks and the steps.
        """
        if self._world.size == 1:
            return
        numbers = {"parameters": 0, "settings": 0, "step": 0, "batches": 0, "buffers": 0}
        if not self._has_warned and (changed := self._changed(buffers)):
            numbers["buffers"] = _combined(checksum(b) for _, b in changed)
        if parameters is not None:
            numbers["parameters"] = _combined(checksum(p) for _, p in parameters)
        if settings:
            values = self._settings()
            numbers |= {"settings": zlib.crc32(repr(values).encode()), "step": step, "batches": batches}
        if not self._status.are_equal(numbers, f"the comparison of the ranks at step {step}"):
            # A number that one rank has not changed yet is an estimate too.
            self._estimates = set().union(*self._world.gather(self._estimates, "the numbers of optimizers"))
            error = self._difference(step, batches, parameters if numbers["parameters"] else None, settings)
            if error is not None:
                raise error
            if not self._has_warned:
                self._warn_of_buffers(buffers)
        self.equal_step = step

    def _changed(self, buffers: NamedBuffers) -> NamedBuffers:
        """Return the buffers that have been written or replaced since the start; and small ones.

        What fused kernels write changes no version.
        """
        marks = _marks(buffers)
        return [(n, b) for n, b in buffers if self._marks.get(n) != marks[n] or b.nbytes <= _SMALL]

    def _warn_of_buffers(self, buffers: NamedBuffers) -> None:
        """Warn, once and on one rank, of buffers that differ; collective."""
        rows = self._world.gather({name: checksum(b) for name, b in buffers}, "the comparison of buffers")
        names = [name for name, value in rows[0].items() if any(row.get(name) != value for row in rows)]
        self._has_warned = bool(names)
        if names and self._world.rank == 0:
            warnings.warn(
                f"buffer {names[0]} differs between the ranks in training ({len(names)} in all), where "
                "DistributedDataParallel sends those of rank 0 in each forward pass. If the loss depends on "
                "it, pass buffer_period=1 to Run, or update it from all ranks' values; if each rank has its "
                f"own, local=[{names[0]!r}]",
                RuntimeWarning,
                stacklevel=6,
            )

    def _settings(self) -> list[tuple[str, object]]:
        return [
            (f"{key} of parameter group {number}", _plain(value))
            for number, group in enumerate(self._optimizer.param_groups)
            for key, value in group.items()
            if key != "params" and (number, key) not in self._estimates
        ]

    def _difference(
        self, step: int, batches: int, parameters: Sequence[Named] | None, settings: bool
    ) -> Disagreement | None:
        values: list[tuple[str, object]] = []
        if settings:
            values += [("number of steps", step), ("number of batches", batches), *self._settings()]
        values += [(name, f"values of checksum {checksum(p):08x}") for name, p in parameters or ()]
        rows = self._world.gather(values, "the comparison of the ranks")
        ranks, index = _first_difference(rows)
        if not ranks:
            return None
        (name, first), (_, other) = (_entry(rows[rank], index) for rank in (0, ranks[0]))
        numbers = self._world.all.ranks
        return Disagreement(
            f"{name} differs from that of rank {numbers[0]} at step {step}; the ranks were equal at step "
            f"{self.equal_step}",
            rank=[numbers[rank] for rank in ranks],
            expected=f"{first} (rank {numbers[0]})",
            got=f"{other} (rank {numbers[ranks[0]]})",
            do=f"find what one rank does by itself. Usual causes: {_CAUSES}. For an earlier error lower "
            "check_every",
            everywhere=True,
        )


def checksum(tensor: Tensor) -> int:
    """Return a checksum of a tensor's bits; on a GPU one that needs no copy to the host."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if not tensor.numel():
        return 0
    if tensor.device.type != "cpu":
        return checksum_on_device(tensor)
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def checksum_on_device(tensor: Tensor) -> int:
    """Return a weighted sum of a tensor's bytes, computed where the tensor is."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for piece in tensor.contiguous().reshape(-1).view(torch.uint8).split(_PIECE):  # type: ignore[no-untyped-call]
        weights = torch.arange(1, piece.numel() + 1, device=piece.device)
        total = 31 * total + (piece * weights).sum()
    return int(total) % 2**32


def _marks(buffers: NamedBuffers) -> dict[str, tuple[int, int]]:
    # Tensors made in inference mode have no version.
    return {name: (id(b), 0 if b.is_inference() else b._version) for name, b in buffers}


def _combined(checksums: Iterable[int]) -> int:
    return zlib.crc32(np.fromiter(checksums, np.uint32).tobytes()) or 1


def _first_difference(rows: list[list[tuple[str, object]]]) -> tuple[list[int], int]:
    """Return the ranks that differ from the first one in the first unequal entry, and its index; or none."""
    for index in range(max(map(len, rows))):
        entries = [_entry(row, index) for row in rows]
        ranks = [rank for rank, entry in enumerate(entries) if entry != entries[0]]
        if ranks:
            return ranks, index
    return [], 0


def _entry(row: list[tuple[str, object]], index: int) -> tuple[str, object]:
    return row[index] if index < len(row) else ("a parameter", "no such parameter")


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() < 100 else tuple(value.shape)
    if isinstance(value, int | float | str | bool | None):
        return value
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return type(value).__name__
