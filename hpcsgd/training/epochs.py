"""Numbers the epochs of samplers and data sets that have `set_epoch`, such as `DistributedSampler`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hpcsgd.training.identity_map import IdentityMap


class Epochs:
    """Calls `set_epoch` at the start of each epoch of a loader, unless the user does.

    It is called for those whose epoch can be read: an epoch that differs from the last one set here is the
    user's, and stays.
    """

    def __init__(self, *, active: bool) -> None:
        self._active = active  # False: nothing is ever set, as in plain training
        self._set: IdentityMap[int] = IdentityMap()

    def begin(self, loader: Any) -> None:
        """Number the epoch that begins with the next `iter(loader)`."""
        for owner in _with_epochs(loader) if self._active else ():
            last = self._set.get(owner)
            expected, following = (0, 0) if last is None else (last, last + 1)
            if _epoch(owner) == expected:
                owner.set_epoch(following)
                self._set.set(owner, following)


def _with_epochs(loader: Any) -> Iterator[Any]:
    seen: list[Any] = []
    batch_sampler = getattr(loader, "batch_sampler", None)
    for owner in (
        loader,
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
        getattr(loader, "dataset", None),
    ):
        if callable(getattr(owner, "set_epoch", None)) and not any(owner is each for each in seen):
            seen.append(owner)
            yield owner


def _epoch(owner: Any) -> int | None:
    value = getattr(owner, "epoch", getattr(owner, "_epoch", None))
    try:
        return int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
