"""Checkpoints that are whole or absent, and on which all ranks agree."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hpcsgd.errors import BadOption, Disagreement, HpcsgdError
from hpcsgd.training.checkpoint.files import (
    FORMAT,
    Fault,
    read_manifest,
    read_state,
    sync_folder,
    write_manifest,
    write_state,
)

T = TypeVar("T")
Loaded = tuple[list[dict[str, Any]], dict[str, Any]]


class Checkpoints:
    """The checkpoints of one run: a folder a step, with one file a rank and a manifest.

    `save` and `load` are collective: all ranks call them with the same step, and either all return
    or all raise the same error.

    Parameters
    ----------
    folder
        Holds ``step-00000040/`` with ``rank-0003.pt`` and ``manifest.json``; made where absent. All
        ranks must see the same folder.
    rank, ranks
        Of this process, and how many there are.
    gather
        All-gather of a small picklable object over the ranks, in order of rank; waits for all.
    keep
        How many checkpoints stay; at least 1, default 2.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        ranks: int,
        gather: Callable[[object], list[object]],
        keep: int = 2,
    ) -> None:
        if keep < 1:
            raise BadOption("cannot keep so few checkpoints", expected="at least 1", got=keep)
        self._folder = Path(folder)
        self._rank = rank
        self._ranks = ranks
        self._gather = gather
        self._keep = keep

    def steps(self) -> list[int]:
        """List the steps that have a checkpoint, oldest first; does not read the files."""
        found = (re.fullmatch(r"step-(\d{8,})", p.name) for p in self._folder.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> Path:
        """Write the checkpoint of a step, then remove those no longer kept.

        Checkpoints of later steps are removed too: a run that saves step 30 has left the course on
        which it once saved step 40.

        Parameters
        ----------
        step
            Of the run; at least 0. A checkpoint of the same step is replaced.
        state
            Of this rank: tensors, numbers, text and None in dicts, lists and tuples. Tensors that
            share a storage are saved with all of it, once, and share one again when loaded.
        meta
            What JSON can hold; that of rank 0 is saved.

        Returns
        -------
        Path
            The checkpoint's folder.

        Raises
        ------
        HpcsgdError
            On all ranks where one failed, and names it. The earlier checkpoints stay.
        """
        self._agree(step)
        final = self._path(step)
        aside = _aside(final, "partial")
        self._settle(step, self._on_root(lambda: self._prepare(aside)))
        write = _attempt(lambda: write_state(aside / _file_name(self._rank), state))
        files = self._settle(step, write)
        body = {
            "format": FORMAT,
            "step": step,
            "ranks": self._ranks,
            "hpcsgd": _version(),
            "files": {_file_name(rank): entry for rank, entry in enumerate(files)},
            "meta": meta,
        }
        self._settle(step, self._on_root(lambda: _publish(aside, final, body)))
        if self._rank == 0:
            self._prune(step)
        return final

    def load(self, step: int | None = None, *, of_others: bool = False) -> Loaded:
        """Read the checkpoint of a step, the newest by default, checked on all ranks.

        Parameters
        ----------
        step
            Which one.
        of_others
            Whether it may be that of another number of ranks.

        Returns
        -------
        (states, meta)
            The states of this rank, on the CPU, and what `save` got as ``meta``. It is one, or of more
            ranks than there are now several: each of them is some rank's. Where there are more ranks now
            these have the first ones' too.

        Raises
        ------
        HpcsgdError
            On all ranks: there is no such checkpoint, it is of another number of ranks, or a file
            is missing or damaged; then names the file, and the newest checkpoint that is whole.
        """
        self._agree(step)
        steps: Any = self._gather(self._on_root(self._restore_and_list))[0]
        if isinstance(steps, Fault):
            raise _error(f"cannot read {self._folder}", {0: steps})
        if not steps or (step is not None and step not in steps):
            raise HpcsgdError(
                f"there is no checkpoint{'' if step is None else f' of step {step}'}",
                expected=f"one in {self._folder}",
                got=f"steps {', '.join(map(str, steps))}" if steps else "none",
                do="load one of these steps" if steps else "start a new run",
                everywhere=True,
            )
        wanted = steps[-1] if step is None else step
        loaded, faults = self._read(wanted, of_others)
        if faults or isinstance(loaded, Fault):
            others = [other for other in reversed(steps) if other != wanted]
            remedy = faults[min(faults)].do or self._offer(others, of_others)
            raise _error(f"cannot load the checkpoint of step {wanted}", faults, remedy)
        return loaded

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"

    def _agree(self, step: int | None) -> None:
        steps = self._gather(step)
        if any(other != steps[0] for other in steps):
            raise Disagreement(
                "ranks name different steps for one checkpoint",
                expected="the same step on all ranks",
                got=", ".join(f"rank {rank}: {other}" for rank, other in enumerate(steps)),
                everywhere=True,
            )
        if step is not None and step < 0:
            raise BadOption("no such step", expected="at least 0", got=step, everywhere=True)

    def _on_root(self, action: Callable[[], T]) -> T | Fault | None:
        return _attempt(action) if self._rank == 0 else None

    def _settle(self, step: int, outcome: object) -> list[object]:
        """Exchange outcomes; where one is a fault, undo what is half done and raise everywhere."""
        outcomes = self._gather(outcome)
        faults = _faults(outcomes)
        if faults:
            self._on_root(self._tidy)
            self._gather(None)
            remedy = "mend this and save again: earlier checkpoints are untouched"
            raise _error(f"cannot save the checkpoint of step {step}", faults, remedy)
        return outcomes

    def _prepare(self, aside: Path) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._tidy()
        aside.mkdir()

    def _tidy(self) -> None:
        self._restore()
        for leftover in self._folder.glob(".step-*.partial"):
            shutil.rmtree(leftover)

    def _restore(self) -> None:
        """Put back what a crash caught between being moved away and being replaced."""
        for replaced in self._folder.glob(".step-*.replaced"):
            final = replaced.with_name(replaced.name[1:].removesuffix(".replaced"))
            if final.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(final)

    def _restore_and_list(self) -> list[int]:
        self._restore()
        return self.steps()

    def _prune(self, step: int) -> None:
        kept = [other for other in self.steps() if other <= step and self._is_complete(other)]
        for other in set(self.steps()) - set(kept[-self._keep :]):
            # A checkpoint is saved all the same if an old one cannot be removed.
            _attempt(partial(_remove, self._path(other)))

    def _is_complete(self, step: int) -> bool:
        folder = self._path(step)
        try:
            files: dict[str, Any] = read_manifest(folder)["files"]
            return all((folder / n).stat().st_size == e["bytes"] for n, e in files.items())
        except (OSError, Fault):
            return False

    def _read(self, step: int, of_others: bool) -> tuple[Loaded | Fault, dict[int, Fault]]:
        loaded = _attempt(lambda: self._read_own(self._path(step), of_others))
        return loaded, _faults(self._gather(loaded if isinstance(loaded, Fault) else None))

    def _read_own(self, folder: Path, of_others: bool) -> Loaded:
        manifest = read_manifest(folder)
        saved = manifest["ranks"]
        if saved != self._ranks and not of_others:
            what = f"{folder} was saved by another number of ranks"
            do = f"start as many ranks as saved it: {saved}; or let other ranks go on: --on-failure restart"
            raise Fault(what, f"{saved} ranks", f"{self._ranks} ranks", do)
        mine = range(self._rank, saved, self._ranks) or [self._rank % saved]
        names = [_file_name(rank) for rank in mine]
        return [read_state(folder / name, manifest["files"][name]) for name in names], manifest["meta"]

    def _offer(self, steps: list[int], of_others: bool) -> str:
        for step in steps:
            if not self._read(step, of_others)[1]:
                return f"step {step} is whole: resume from {self._path(step)}"
        return "no other checkpoint is whole: start a new run"


def _publish(aside: Path, final: Path, body: Mapping[str, object]) -> None:
    write_manifest(aside, body)
    replaced = _aside(final, "replaced")
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove(folder: Path) -> None:
    # Renamed first: a crash while removing must not leave half a checkpoint under its name.
    shutil.rmtree(folder.rename(_aside(folder, "partial")))


def _aside(final: Path, why: str) -> Path:
    return final.with_name(f".{final.name}.{why}")


def _attempt(action: Callable[[], T]) -> T | Fault:
    try:
        return action()
    except Fault as fault:
        return fault
    except Exception as error:
        return Fault(f"{type(error).__name__}: {error}")


def _faults(outcomes: list[object]) -> dict[int, Fault]:
    return {rank: fault for rank, fault in enumerate(outcomes) if isinstance(fault, Fault)}


def _error(what: str, faults: Mapping[int, Fault], remedy: str | None = None) -> HpcsgdError:
    fault = faults[min(faults)]
    return HpcsgdError(
        f"{what}: {fault.what}",
        rank=sorted(faults),
        expected=fault.expected,
        got=fault.got,
        do=fault.do or remedy,
        everywhere=True,
    )


def _file_name(rank: int) -> str:
    return f"rank-{rank:04d}.pt"


def _version() -> str:
    try:
        return importlib.metadata.version("hpcsgd")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
