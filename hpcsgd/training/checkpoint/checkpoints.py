"""Checkpoints that are complete or absent, with the same result on all ranks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hpcsgd.errors import BadOption, Disagreement, HpcsgdError, format_ranks
from hpcsgd.registry import checked
from hpcsgd.registry.limits import Count
from hpcsgd.tensors.fingerprint import package_version
from hpcsgd.training.checkpoint.files import (
    FORMAT,
    Fault,
    delete,
    read_manifest,
    read_state,
    sync_folder,
    write_manifest,
    write_state,
)

T = TypeVar("T")
E = TypeVar("E", bound=HpcsgdError)
Loaded = tuple[list[dict[str, Any]], dict[str, Any]]


_EARLIER = "fix the cause, and resume from an earlier checkpoint: those are unchanged"


class NotSaved(HpcsgdError):
    """A checkpoint that could not be written, for a reason in one line; earlier ones are untouched."""

    reason = ""


def not_saved(step: int, reason: str) -> NotSaved:
    """Return the error of all ranks for a checkpoint that must not be written, for a reason in one line."""
    what = f"cannot save the checkpoint of step {step}"
    error = NotSaved(what, got=reason, do=_EARLIER, everywhere=True)
    error.reason = reason
    return error


class Checkpoints:
    """The checkpoints of one run: a folder a step, with one file a rank and a manifest.

    `save` and `load` are collective: all ranks call them with the same step, and either all return
    or all raise the same error.

    Parameters
    ----------
    folder
        Contains ``step-00000040/`` with ``rank-0003.pt`` and ``manifest.json``; created if absent. All
        ranks must see the same folder.
    rank, ranks
        Rank of this process, and number of ranks.
    gather
        Blocking all-gather of a small picklable object over the ranks, in order of rank.
    keep
        Number of checkpoints to retain; at least 1, default 2.
    """

    @checked
    def __init__(
        self,
        folder: Path,
        rank: int,
        ranks: int,
        gather: Callable[[object], list[object]],
        keep: Count = 2,
    ) -> None:
        self._folder = Path(folder)
        self._rank = rank
        self._ranks = ranks
        self._gather = gather
        self._keep = keep
        self._damaged: set[int] = set()

    def steps(self) -> list[int]:
        """List the steps that have a checkpoint, oldest first, without reading the files."""
        found = (re.fullmatch(r"step-(\d{8,})", p.name) for p in self._folder.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> Path:
        """Write the checkpoint of a step, then remove the oldest beyond `keep`.

        Checkpoints of later steps are removed too: a run that saves step 30 after step 40 was resumed
        before 40, and continues differently.

        Parameters
        ----------
        step
            Step of the run, at least 0. A checkpoint of the same step is replaced.
        state
            State of this rank: tensors, numbers, text and None in dicts, lists and tuples. Tensors that
            share a storage are saved with all of it, once, and share one again when loaded.
        meta
            JSON values; those of rank 0 are saved.

        Returns
        -------
        Path
            The checkpoint's folder.

        Raises
        ------
        NotSaved
            On all ranks if one failed, which the error names. Earlier checkpoints are untouched.
        """
        self._check_same_step(step)
        final = self._path(step)
        partial_folder = _hidden(final, "partial")
        self._raise_if_any_failed(step, self._on_root(lambda: self._prepare(partial_folder)))
        write = _attempt(lambda: write_state(partial_folder / _file_name(self._rank), state))
        files = self._raise_if_any_failed(step, write)
        body = {
            "format": FORMAT,
            "step": step,
            "ranks": self._ranks,
            "hpcsgd": package_version("hpcsgd"),
            "files": {_file_name(rank): entry for rank, entry in enumerate(files)},
            "meta": meta,
        }
        self._raise_if_any_failed(step, self._on_root(lambda: _publish(partial_folder, final, body)))
        if self._rank == 0:
            self._prune(step)
        return final

    def load(self, step: int | None = None, *, any_ranks: bool = False) -> Loaded:
        """Read the checkpoint of a step, with the same result on all ranks.

        Parameters
        ----------
        step
            Step of the checkpoint; default None: the newest.
        any_ranks
            Accept a checkpoint of another number of ranks; default False.

        Returns
        -------
        (states, meta)
            This rank's states, on the CPU, and the ``meta`` of `save`. There is one state; or several, if
            the checkpoint has more ranks than there are now: each of its states goes to one rank. If there
            are more ranks now, the additional ranks get copies of the first ranks' states.

        Raises
        ------
        HpcsgdError
            On all ranks: there is no such checkpoint, it is of another number of ranks, or a file
            is missing or damaged; the error names the file, and the newest complete checkpoint.
        """
        self._check_same_step(step)
        steps = self._list()
        if not steps or (step is not None and step not in steps):
            raise HpcsgdError(
                f"there is no checkpoint{'' if step is None else f' of step {step}'}",
                expected=f"one in {self._folder}",
                got=f"steps {', '.join(map(str, steps))}" if steps else "none",
                do=f"resume from one of these steps, such as --resume {self._path(steps[-1])}"
                if steps
                else "start a new run",
                everywhere=True,
            )
        chosen = steps[-1] if step is None else step
        loaded, faults = self._read(chosen, any_ranks)
        if faults or isinstance(loaded, Fault):
            others = [other for other in reversed(steps) if other != chosen]
            remedy = faults[min(faults)].do or self._suggest(others, any_ranks)
            raise _error(HpcsgdError, f"cannot load the checkpoint of step {chosen}", faults, remedy)
        return loaded

    def load_newest_whole(self, *, any_ranks: bool = False) -> tuple[Loaded, list[str]] | None:
        """Read the newest checkpoint that is not damaged, the same on all ranks; None: there is none at all.

        Parameters
        ----------
        any_ranks
            As in `load`.

        Returns
        -------
        (loaded, damaged)
            The result of `load`, and a line for each newer checkpoint, which is damaged and is removed after
            the next `save`.

        Raises
        ------
        HpcsgdError
            On all ranks: all checkpoints are damaged, and the error names the damage of each; or the newest
            that is not cannot be used here, for example because it is of another number of ranks.
        """
        damaged: list[str] = []
        steps = self._list()
        for step in reversed(steps):
            loaded, faults = self._read(step, any_ranks)
            if not faults and not isinstance(loaded, Fault):
                return loaded, damaged
            if not all(fault.damage for fault in faults.values()):
                raise _error(
                    HpcsgdError, f"cannot load the checkpoint of step {step}", faults, "fix the cause"
                )
            self._damaged.add(step)
            damaged.append(f"step {step}: {_describe(faults)}")
        if not steps:
            return None
        raise HpcsgdError(
            f"no checkpoint in {self._folder} is whole",
            got="\n            ".join(damaged),
            do=f"restore one of them from a copy; or, to start from the beginning, remove {self._folder} or "
            "choose another name for the run",
            everywhere=True,
        )

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"

    def _check_same_step(self, step: int | None) -> None:
        steps = self._gather(step)
        if any(other != steps[0] for other in steps):
            raise Disagreement(
                "the ranks pass different steps for one checkpoint",
                expected="the same step on all ranks",
                got=", ".join(f"rank {rank}: {other}" for rank, other in enumerate(steps)),
                do="pass the same step to save or load on all ranks",
                everywhere=True,
            )
        if step is not None and step < 0:
            raise BadOption(
                "the step of a checkpoint is negative", expected="at least 0", got=step, everywhere=True
            )

    def _on_root(self, action: Callable[[], T]) -> T | Fault | None:
        return _attempt(action) if self._rank == 0 else None

    def _raise_if_any_failed(self, step: int, outcome: object) -> list[object]:
        """Gather the ranks' outcomes; if one is a fault, remove partial files and raise on all ranks."""
        outcomes = self._gather(outcome)
        faults = _faults(outcomes)
        if faults:
            self._on_root(self._remove_leftovers)
            self._gather(None)
            error = _error(NotSaved, f"cannot save the checkpoint of step {step}", faults, _EARLIER)
            error.reason = _describe(faults)
            raise error
        return outcomes

    def _prepare(self, partial_folder: Path) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        partial_folder.mkdir()

    def _remove_leftovers(self) -> None:
        self._restore()
        for leftover in self._folder.glob(".step-*.partial"):
            delete(leftover)

    def _restore(self) -> None:
        """Restore checkpoints that were renamed, but not yet replaced, at the time of a crash."""
        for replaced in self._folder.glob(".step-*.replaced"):
            final = replaced.with_name(replaced.name[1:].removesuffix(".replaced"))
            if final.exists():
                delete(replaced)
            else:
                replaced.rename(final)

    def _list(self) -> list[int]:
        """Return the steps that have a checkpoint, as rank 0 sees them."""
        steps: Any = self._gather(self._on_root(self._restore_and_list))[0]
        if isinstance(steps, Fault):
            raise _error(HpcsgdError, f"cannot read {self._folder}", {0: steps})
        return list(steps)

    def _restore_and_list(self) -> list[int]:
        self._restore()
        return self.steps()

    def _prune(self, step: int) -> None:
        self._damaged.discard(step)
        complete = [other for other in self.steps() if other <= step and self._is_complete(other)]
        for other in set(self.steps()) - set(complete[-self._keep :]):
            # The new checkpoint is saved even if an old one cannot be removed.
            _attempt(partial(_remove, self._path(other)))

    def _is_complete(self, step: int) -> bool:
        folder = self._path(step)
        if step in self._damaged:
            return False
        try:
            files: dict[str, Any] = read_manifest(folder)["files"]
            return all((folder / n).stat().st_size == e["bytes"] for n, e in files.items())
        except (OSError, Fault):
            return False

    def _read(self, step: int, any_ranks: bool) -> tuple[Loaded | Fault, dict[int, Fault]]:
        loaded = _attempt(lambda: self._read_own(self._path(step), any_ranks))
        return loaded, _faults(self._gather(loaded if isinstance(loaded, Fault) else None))

    def _read_own(self, folder: Path, any_ranks: bool) -> Loaded:
        manifest = read_manifest(folder)
        saved = manifest["ranks"]
        if saved != self._ranks and not any_ranks:
            what = f"{folder} was saved by another number of ranks"
            do = f"start {saved} ranks; or resume with any number of ranks: --on-failure restart"
            raise Fault(what, f"{saved} ranks", f"{self._ranks} ranks", do)
        saved_ranks = range(self._rank, saved, self._ranks) or [self._rank % saved]
        names = [_file_name(rank) for rank in saved_ranks]
        return [read_state(folder / name, manifest["files"][name]) for name in names], manifest["meta"]

    def _suggest(self, steps: list[int], any_ranks: bool) -> str:
        for step in steps:
            if not self._read(step, any_ranks)[1]:
                return f"step {step} is complete: resume from {self._path(step)}"
        return "no other checkpoint is complete: start a new run"


def _publish(partial_folder: Path, final: Path, body: Mapping[str, object]) -> None:
    write_manifest(partial_folder, body)
    replaced = _hidden(final, "replaced")
    if final.exists():
        final.rename(replaced)
    partial_folder.rename(final)
    sync_folder(final.parent)
    with suppress(OSError):
        delete(replaced)


def _remove(folder: Path) -> None:
    # Renamed first: a crash during the removal must not leave an incomplete checkpoint under its name.
    delete(folder.rename(_hidden(folder, "partial")))


def _hidden(final: Path, suffix: str) -> Path:
    return final.with_name(f".{final.name}.{suffix}")


def _attempt(action: Callable[[], T]) -> T | Fault:
    try:
        return action()
    except Fault as fault:
        return fault
    except PermissionError as error:
        return Fault(f"{type(error).__name__}: {error}")
    except OSError as error:
        return Fault(f"{type(error).__name__}: {error}", damage=True)
    except Exception as error:
        return Fault(f"{type(error).__name__}: {error}")


def _faults(outcomes: list[object]) -> dict[int, Fault]:
    return {rank: fault for rank, fault in enumerate(outcomes) if isinstance(fault, Fault)}


def _describe(faults: Mapping[int, Fault]) -> str:
    """Return one line: the ranks of some faults, and the first of these."""
    fault = faults[min(faults)]
    differs = f" (expected {fault.expected}, got {fault.got})" if fault.expected else ""
    return f"{format_ranks(faults)}: {fault.what}{differs}"


def _error(kind: type[E], what: str, faults: Mapping[int, Fault], remedy: str | None = None) -> E:
    fault = faults[min(faults)]
    return kind(
        f"{what}: {fault.what}",
        rank=sorted(faults),
        expected=fault.expected,
        got=fault.got,
        do=fault.do or remedy,
        everywhere=True,
    )


def _file_name(rank: int) -> str:
    return f"rank-{rank:04d}.pt"
