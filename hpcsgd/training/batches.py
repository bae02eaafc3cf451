"""Batches for all peers: as many for each, whatever its loader holds, or as many as the method wants."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from hpcsgd.errors import HpcsgdError
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import Setting
from hpcsgd.training.virtual_nodes import Turns

Batch = TypeVar("Batch")
_END = object()


def in_step(loaders: Sequence[Iterable[Batch]], setting: Setting, uneven: str) -> Iterator[Batch]:
    """The loaders' batches, as many for every peer.

    Where loaders have a length it is compared once an epoch and taken at its word; else the ranks tell
    each other before each step whether they have one more batch.

    Parameters
    ----------
    loaders
        Of this rank's peers, which take turns.
    setting
        Its `weight` and `active` are kept up to date for the strategy.
    uneven
        "join": a peer that has run out repeats its last batch with weight 0, so that the user's loop,
        schedulers and counters go on alike on all ranks. "stop": all end with the first.
    """
    for loader in loaders:
        _warn_of_forks(loader)
    join = uneven == "join"
    mine = [(_length(loader), hasattr(loader, "filler")) for loader in loaders]
    told = [entry for entries in setting.world.gather(mine, "an epoch's start") for entry in entries]
    if any(size is None for size, _ in told):
        if len(loaders) > 1:
            raise _unsized(setting)
        plan = _tell_each_step(loaders[0], setting, join and not all(filler for _, filler in told))
    else:
        lengths = [size for size, _ in told]
        if join and any(lengths):
            _check_none_empty([size > 0 or filler for size, filler in told])
        plan = _from_lengths(loaders, lengths, setting)
    last: list[object] = [_END] * len(loaders)
    try:
        for batch, having in plan:
            if not join and not all(having):
                return
            turn = setting.turn
            if batch is not _END:
                last[turn] = batch
            elif last[turn] is _END:
                # It resumes where this peer had run out: the loader knows what it would repeat.
                last[turn] = loaders[turn].filler()  # type: ignore[attr-defined]
            setting.batch(having)
            yield last[turn]  # type: ignore[misc]
    finally:
        setting.begin_step()


class Endless:
    """Batches for peers that do not keep step, in the order in which the strategy wants them.

    Parameters
    ----------
    setting, strategy, turns
        The run's.
    """

    def __init__(self, setting: Setting, strategy: Strategy, turns: Turns) -> None:
        self._setting, self._strategy, self._turns = setting, strategy, turns
        self._loaders: list[Iterable[Any]] = []
        self._iterators: list[Iterator[Any]] = []

    def batches(self, loaders: Sequence[Iterable[Batch]], steps: int | None) -> Iterator[Batch]:
        """Batches until `steps` more have been taken; the same loaders go on where they were."""
        setting = self._setting
        if [id(loader) for loader in loaders] != [id(loader) for loader in self._loaders]:
            for loader in loaders:
                _warn_of_forks(loader)
            self._loaders, self._iterators = list(loaders), [_again(setting, each) for each in loaders]
        lengths = setting.world.gather([_length(loader) for loader in loaders], "the start of some steps")
        flat = [length for entries in lengths for length in entries]
        if steps is None and None in flat:
            raise _unsized(setting)
        end = setting.step + (max(flat) if steps is None else steps)
        try:
            for turn in self._strategy.turns(end):
                self._turns.enter(turn)
                setting.taken = False
                while not setting.taken:  # several of them, where gradients are accumulated
                    yield next(self._iterators[turn])
        finally:
            setting.begin_step()


def _again(setting: Setting, loader: Iterable[Batch]) -> Iterator[Batch]:
    """The loader's batches, again and again."""
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty or iter(loader) is loader:
            raise HpcsgdError(
                "the loader is through" if not empty else "the loader has no batch at all",
                rank=setting.world.rank,
                expected="a loader that can begin again: this method's peers do not take equally many steps",
                do="pass the loader itself, not an iterator of it",
            )


def _length(loader: object) -> int | None:
    return len(loader) if isinstance(loader, Sized) else None


def _unsized(setting: Setting) -> HpcsgdError:
    return HpcsgdError(
        "a loader has no length",
        expected="loaders with len(): with virtual nodes, and where peers do not keep step",
        do="give it __len__, or say run.batches(loader, steps=...) where peers do not keep step",
        everywhere=True,
    )


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
    loaders: Sequence[Iterable[object]], lengths: list[int], setting: Setting
) -> Iterator[tuple[object, list[bool]]]:
    batches = [iter(loader) for loader in loaders]
    mine = [lengths[peer] for peer in setting.peers.local]
    drawn = [0] * len(loaders)
    while drawn[setting.turn] < max(lengths):
        turn = setting.turn
        step, length = drawn[turn], mine[turn]
        batch = next(batches[turn], _END) if step < length else _END
        if step < length and batch is _END:
            raise _miscounted(setting, length, str(step))
        drawn[turn] += 1
        yield batch, [step < length for length in lengths]
    for own, length in zip(batches, mine, strict=True):
        if next(own, _END) is not _END:
            raise _miscounted(setting, length, f"more than {length}")


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
