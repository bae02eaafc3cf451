"""One number of steps for ranks whose loaders hold different numbers of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from hpcsgd.errors import HpcsgdError
from hpcsgd.strategies.base import Setting

Batch = TypeVar("Batch")
_END = object()


def in_step(loader: Iterable[Batch], setting: Setting, uneven: str) -> Iterator[Batch]:
    """The loader's batches, as many on every rank.

    Where loaders have a length it is compared once an epoch and taken at its word; else the ranks tell
    each other before each step whether they have one more batch.

    Parameters
    ----------
    loader
        This rank's batches.
    setting
        Its `weight` and `active` are kept up to date for the strategy.
    uneven
        "join": a rank that has run out repeats its last batch with weight 0, so that the user's loop,
        schedulers and counters go on alike on all ranks. "stop": all end with the first.
    """
    world = setting.world
    lengths = world.gather(len(loader) if isinstance(loader, Sized) else None, "an epoch's start")
    if None in lengths:
        plan = _tell_each_step(loader, setting)
    else:
        plan = _from_lengths(loader, lengths, setting)
    last: object = _END
    try:
        for batch, having in plan:
            if uneven == "stop" and not all(having):
                return
            if last is _END and batch is _END:
                raise _empty(having)
            last = last if batch is _END else batch
            setting.weight = int(batch is not _END)
            setting.active = sum(having)
            yield last  # type: ignore[misc]
    finally:
        setting.weight, setting.active = 1, world.size


def _from_lengths(
    loader: Iterable[object], lengths: list[int], setting: Setting
) -> Iterator[tuple[object, list[bool]]]:
    batches = iter(loader)
    mine = lengths[setting.world.rank]
    if 0 in lengths and any(lengths):
        raise _empty([length > 0 for length in lengths])
    for step in range(max(lengths)):
        batch = next(batches, _END) if step < mine else _END
        if step < mine and batch is _END:
            raise _miscounted(setting, mine, str(step))
        yield batch, [step < length for length in lengths]
    if next(batches, _END) is not _END:
        raise _miscounted(setting, mine, f"more than {mine}")


def _tell_each_step(loader: Iterable[object], setting: Setting) -> Iterator[tuple[object, list[bool]]]:
    batches = iter(loader)
    while True:
        batch = next(batches, _END)
        having = setting.world.gather(batch is not _END, "whether each rank has one more batch")
        if not any(having):
            return
        yield batch, having


def _empty(having: list[bool]) -> HpcsgdError:
    return HpcsgdError(
        "the loader has no batch at all, that of other ranks has",
        rank=[rank for rank, has in enumerate(having) if not has],
        expected="at least one batch on every rank",
        do="give each rank some data, or run with uneven='stop'",
        everywhere=True,
    )


def _miscounted(setting: Setting, promised: int, found: str) -> HpcsgdError:
    return HpcsgdError(
        "the loader's len() is not the number of its batches",
        rank=setting.world.rank,
        expected=f"{promised} batches, its len()",
        got=found,
        do="correct its __len__, or hide it (pass iter(loader)): the ranks then ask before each step",
    )
