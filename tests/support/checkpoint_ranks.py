"""Threads that play the ranks of `Checkpoints`, and damage to their files."""

from __future__ import annotations

import pickle
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from hpcsgd.errors import HpcsgdError
from hpcsgd.training.checkpoint.checkpoints import Checkpoints

RANKS = 3


def on_ranks(
    folder: Path, action: Callable[[Checkpoints, int], Any], ranks: int = RANKS, keep: int = 2
) -> list[Any]:
    """Run an action on threads that play ranks; an exception takes the result's place."""
    slots: list[object] = [None] * ranks
    barrier = threading.Barrier(ranks, timeout=20)

    def gather(rank: int, item: object) -> list[object]:
        slots[rank] = pickle.loads(pickle.dumps(item))
        barrier.wait()
        gathered = list(slots)
        barrier.wait()
        return gathered

    def play(rank: int) -> Any:
        points = Checkpoints(folder, rank, ranks, lambda item: gather(rank, item), keep)
        try:
            return action(points, rank)
        except Exception as error:
            return error

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(play, range(ranks)))


def state(step: int, rank: int) -> dict[str, Any]:
    return {"step": step, "rank": rank, "weights": torch.arange(50.0) * step + rank}


def save(folder: Path, *steps: int, ranks: int = RANKS, keep: int = 2) -> None:
    def save_all(points: Checkpoints, rank: int) -> list[Path]:
        return [points.save(step, state(step, rank), {"epoch": step / 10}) for step in steps]

    assert (
        on_ranks(folder, save_all, ranks, keep) == [[folder / f"step-{step:08d}" for step in steps]] * ranks
    )


def assert_loads(folder: Path, step: int, ask: int | None = None) -> None:
    for rank, ([found], meta) in enumerate(on_ranks(folder, lambda c, r: c.load(ask))):
        assert (found["step"], found["rank"], meta) == (step, rank, {"epoch": step / 10})
        assert torch.equal(found["weights"], state(step, rank)["weights"].cpu())


def the_error(results: list[Any]) -> str:
    """The one error that all ranks raised."""
    assert all(isinstance(result, HpcsgdError) and result.everywhere for result in results), results
    assert len(set(map(str, results))) == 1
    return str(results[0])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


#: Each kind of damage to a file of a checkpoint, or to the checkpoint's folder.
DAMAGES = ("missing", "short", "empty", "flipped", "folder")


def damage(path: Path, how: str) -> None:
    """Damage a file, or put something else in its place."""
    if path.is_dir():
        shutil.rmtree(path)
        content = bytearray(b"no folder")
    else:
        content = bytearray(path.read_bytes())
        path.unlink()
    if how == "short":
        path.write_bytes(content[:-7])
    elif how == "empty":
        path.touch()
    elif how == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "folder":
        path.mkdir()
