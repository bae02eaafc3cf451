"""One number of steps for ranks whose loaders hold different numbers of batches."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from torch.utils.data import DataLoader

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
    _warn_of_forks(loader)
    join = uneven == "join"
    size = len(loader) if isinstance(loader, Sized) else None
    repeatable = hasattr(loader, "filler")
    told = setting.world.gather((size, repeatable), "an epoch's start")
    if any(size is None for size, _ in told):
        plan = _tell_each_step(loader, setting, join and not repeatable)
    else:
        lengths = [size for size, _ in told]
        if join and any(lengths):
            _check_none_empty([size > 0 or repeatable for size, repeatable in told])
        plan = _from_lengths(loader, lengths, setting)
    last: object = _END
    try:
        for batch, having in plan:
            if not join and not all(having):
                return
            if batch is not _END:
                last = batch
            elif last is _END:
                # It resumes where this rank had run out: the loader knows what it would repeat.
                last = loader.filler()  # type: ignore[attr-defined]
            setting.batch(having)
            yield last  # type: ignore[misc]
    finally:
        setting.begin_step()


def _warn_of_forks(loader: object) -> None:
    if (
        isinstance(loader, DataLoader)
        and loader.num_workers > 0
        and loader.multiprocessing_context is None
        and multiprocessing.get_start_method() == "fork"
    ):
        warnings.warn(
            "this DataLoader forks its workers after MPI has started, which can crash or hang: give it "
            "multiprocessing_context='forkserver'",
            RuntimeWarning,
            stacklevel=2,
        )


def _from_lengths(
    loader: Iterable[object], lengths: list[int], setting: Setting
) -> Iterator[tuple[object, list[bool]]]:
    batches = iter(loader)
    mine = lengths[setting.world.rank]
    for step in range(max(lengths)):
        batch = next(batches, _END) if step < mine else _END
        if step < mine and batch is _END:
            raise _miscounted(setting, mine, str(step))
        yield batch, [step < length for length in lengths]
    if next(batches, _END) is not _END:
        raise _miscounted(setting, mine, f"more than {mine}")


def _tell_each_step(
    loader: Iterable[object], setting: Setting, must_have_one: bool
) -> Iterator[tuple[object, list[bool]]]:
    batches = iter(loader)
    first = True
    while True:
        batch = next(batches, _END)
        having = setting.world.gather(batch is not _END, "whether each rank has one more batch")
        if not any(having):
            return
        if first and must_have_one:
            _check_none_empty(having)
        first = False
        yield batch, having


def _check_none_empty(having: list[bool]) -> None:
    if not all(having):
        raise HpcsgdError(
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
