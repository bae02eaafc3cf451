"""Checks across ranks: actions that fail on all ranks if on one, and values that must be equal on all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from hpcsgd.errors import Disagreement, HpcsgdError

T = TypeVar("T")
#: Returns the values of all ranks, in rank order; its second argument names the operation.
Gather = Callable[[Any, str], list[Any]]


def collectively(gather: Gather, action: Callable[[], T]) -> T:
    """Run an action on every rank, and raise on all ranks if it fails on any; see `World.collectively`."""
    try:
        result, error = action(), None
    except Exception as failure:
        error = failure
    errors = gather(None if error is None else _message(error), "the outcome of a common action")
    failed = [rank for rank, text in enumerate(errors) if text is not None]
    if failed:
        raise HpcsgdError(
            errors[failed[0]],
            rank=None if len(failed) == len(errors) else failed,
            everywhere=True,
        ) from (None if isinstance(error, HpcsgdError) else error)
    return result


def check_consistent(gather: Gather, fields: Mapping[str, object]) -> None:
    """Check that each field is equal on all ranks; see `World.check_consistent`."""
    for name, values in _columns(gather(dict(fields), "the comparison of settings")):
        # NaN is unequal to itself.
        if all(value == values[0] or value != value != values[0] != values[0] for value in values):
            continue
        got, expected = first_difference(values)
        deviating = [rank for rank, value in enumerate(values) if value != values[0]]
        raise Disagreement(
            f"{name} differs from that of rank 0",
            rank=deviating,
            expected=f"{expected} (rank 0)",
            got=f"{got} (rank {deviating[0]})",
            do="start all ranks with the same script, arguments and package versions",
            everywhere=True,
        )


def first_difference(values: list[object]) -> tuple[object, object]:
    """Return the first value unequal to the first one, and the first; of lists, the elements that differ."""
    first = values[0]
    other = next(value for value in values if value != first)
    if isinstance(first, list) and isinstance(other, list):
        for position in range(max(len(first), len(other))):
            a = first[position] if position < len(first) else "nothing"
            b = other[position] if position < len(other) else "nothing"
            if a != b:
                return f"{b} at position {position}", f"{a} at position {position}"
    return other, first


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, HpcsgdError) else f"{type(error).__name__}: {error}"


def _columns(rows: list[dict[str, object]]) -> list[tuple[str, list[object]]]:
    return [(name, [row.get(name) for row in rows]) for name in rows[0]]
