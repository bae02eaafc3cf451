"""Checkpoints: complete or absent after any failure or crash, with the same result on all ranks."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpcsgd.errors import Disagreement
from hpcsgd.training.checkpoint import files
from hpcsgd.training.checkpoint.checkpoints import Checkpoints
from tests.support.checkpoint_ranks import (
    RANKS,
    assert_loads,
    damage,
    names,
    on_ranks,
    save,
    state,
    the_error,
)


def test_the_newest_are_kept_and_each_can_be_loaded(tmp_path: Path) -> None:
    save(tmp_path / "run" / "checkpoints", 10, 20, 30)
    folder = tmp_path / "run" / "checkpoints"
    assert names(folder) == ["step-00000020", "step-00000030"]
    assert names(folder / "step-00000030") == [
        "manifest.json",
        *(f"rank-000{r}.pt" for r in range(3)),
    ]
    assert_loads(folder, 30)
    assert_loads(folder, 20, ask=20)


def test_the_manifest_lists_the_files(tmp_path: Path) -> None:
    save(tmp_path, 10)
    folder = tmp_path / "step-00000010"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["step"], manifest["ranks"], manifest["meta"]) == (10, RANKS, {"epoch": 1.0})
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()


def test_saving_again_replaces_and_drops_later_steps(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30, keep=3)
    assert_loads(tmp_path, 20, ask=20)
    on_ranks(tmp_path, lambda c, r: c.save(20, state(5, r), {"epoch": 0.5}))
    assert names(tmp_path) == ["step-00000010", "step-00000020"]
    assert_loads(tmp_path, 5)


@pytest.mark.parametrize("how", ["missing", "short", "flipped"])
@pytest.mark.parametrize("name", ["rank-0001.pt", "manifest.json"])
def test_damage_is_the_same_error_everywhere_and_offers_a_whole_one(
    tmp_path: Path, how: str, name: str
) -> None:
    save(tmp_path, 10, 20, 30, 40, keep=4)
    damage(tmp_path / "step-00000040" / name, how)
    damage(tmp_path / "step-00000030" / "rank-0002.pt", how)
    message = the_error(on_ranks(tmp_path, lambda c, r: c.load()))
    assert f"step-00000040/{name} is {'missing' if how == 'missing' else 'damaged'}" in message
    assert "step 20 is complete: resume from" in message and "step-00000020" in message
    assert message.startswith("rank 1: " if name == "rank-0001.pt" else "ranks 0, 1, 2: ")
    assert_loads(tmp_path, 20, ask=20)


def test_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    for ranks in (1, 2, 4):
        message = the_error(on_ranks(tmp_path, lambda c, r: c.load(), ranks=ranks))
        assert f"expected: {RANKS} ranks" in message and f"got:      {ranks} ranks" in message


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
def test_other_ranks_may_share_the_states(tmp_path: Path, ranks: int) -> None:
    """Each state is some rank's, and each rank has one."""
    save(tmp_path, 10, 20)
    loaded = on_ranks(tmp_path, lambda c, r: c.load(any_ranks=True), ranks=ranks)
    found = [[state["rank"] for state in states] for states, meta in loaded if meta == {"epoch": 2.0}]
    assert len(found) == ranks and all(found)
    assert sorted(chain.from_iterable(found[:RANKS])) == list(range(RANKS))


def test_absent_checkpoints_are_answered_with_the_steps_there_are(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert "there is no checkpoint" in the_error(on_ranks(folder, lambda c, r: c.load()))
    save(tmp_path, 10, 20)
    message = the_error(on_ranks(tmp_path, lambda c, r: c.load(30)))
    assert "no checkpoint of step 30" in message and "steps 10, 20" in message


def test_ranks_must_name_the_same_step(tmp_path: Path) -> None:
    results = on_ranks(tmp_path, lambda c, r: c.save(10 + (r == 2), {}, {}))
    assert "rank 0: 10, rank 1: 10, rank 2: 11" in the_error(results)
    assert isinstance(results[0], Disagreement)
    assert names(tmp_path) == []
    save(tmp_path, 10)
    assert "different steps" in the_error(on_ranks(tmp_path, lambda c, r: c.load(r or None)))


def test_a_negative_step_is_refused(tmp_path: Path) -> None:
    assert "at least 0" in the_error(on_ranks(tmp_path, lambda c, r: c.save(-1, {}, {})))


def test_a_state_that_could_not_be_loaded_fails_the_save_on_all(tmp_path: Path) -> None:
    save(tmp_path, 10)

    def attempt(points: Checkpoints, rank: int) -> Path:
        return points.save(20, {"optimizer": {"seen": np.zeros(3) if rank == 2 else 1}}, {})

    message = the_error(on_ranks(tmp_path, attempt))
    assert message.startswith("rank 2: ") and "got:      numpy.ndarray" in message
    assert "state['optimizer']['seen'] cannot be saved" in message
    results = on_ranks(tmp_path, lambda c, r: c.save(20, {}, {"folder": Path("a")}))
    assert "PosixPath is not JSON" in the_error(results)
    assert names(tmp_path) == ["step-00000010"]
    assert_loads(tmp_path, 10)


def test_a_file_that_would_run_code_is_the_same_error_everywhere(tmp_path: Path) -> None:
    """With digests that fit, so that only the loader stands against it."""
    save(tmp_path, 10, 20)
    folder = tmp_path / "step-00000020"
    manifest = files.read_manifest(folder)
    content = pickle.dumps({"weights": os.system}, protocol=2)
    (folder / "rank-0001.pt").write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest["files"]["rank-0001.pt"] = entry
    (folder / "manifest.json").unlink()
    files.write_manifest(folder, manifest)
    message = the_error(on_ranks(tmp_path, lambda c, r: c.load()))
    assert "rank-0001.pt is refused" in message and "step-00000010" in message


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_rank_that_cannot_write_fails_the_save_on_all(tmp_path: Path, rank: int) -> None:
    """The disk is full for one rank: a real limit on the size of files, which only it exceeds."""
    save(tmp_path, 10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        sizes = [1 << 19 if r == rank else 10 for r in range(RANKS)]
        results = on_ranks(tmp_path, lambda c, r: c.save(20, {"w": torch.zeros(sizes[r])}, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    message = the_error(results)
    assert message.startswith(f"rank {rank}: cannot save the checkpoint of step 20")
    assert "File too large" in message
    assert names(tmp_path) == ["step-00000010"]
    assert_loads(tmp_path, 10)
    save(tmp_path, 20)


def test_a_folder_that_cannot_be_made_fails_the_save_on_all(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = the_error(on_ranks(tmp_path / "file" / "checkpoints", lambda c, r: c.save(1, {}, {})))
    assert message.startswith("rank 0: ") and "Not a directory" in message


class Crash(BaseException):
    """Ends a save as a kill would: no handler of ours may run."""


def crash_at(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    """Make the count-th call that reaches the disk crash; returns the count of calls seen."""
    seen = [0]

    def count_down(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **keywords: Any) -> Any:
            seen[0] += 1
            if seen[0] == count:
                raise Crash
            return call(*args, **keywords)

        return counted

    for name in ("fsync", "rename", "mkdir", "open", "unlink", "rmdir", "scandir", "utime"):
        monkeypatch.setattr(os, name, count_down(getattr(os, name)))
    return seen


@pytest.mark.parametrize("step", [10, 20])
def test_a_crash_at_any_point_leaves_a_whole_checkpoint(tmp_path: Path, step: int) -> None:
    for count in range(1, 100):
        folder = tmp_path / str(count)
        save(folder, 10, ranks=1, keep=1)
        with pytest.MonkeyPatch.context() as patch:
            seen = crash_at(patch, count)
            with suppress(Crash):
                Checkpoints(folder, 0, 1, lambda x: [x], 1).save(step, {"fresh": True}, {})
        if seen[0] < count:
            break
        newest, *listed = on_ranks(folder, lambda c, r: [c.load(), *map(c.load, c.steps())], 1)[0]
        for [found], _ in (newest, *listed):
            assert found == {"fresh": True} or found["step"] == 10
        save(folder, 30, ranks=1, keep=1)
        assert names(folder) == ["step-00000030"]
    assert 15 < count < 99


KILLED = """
import sys, time
from pathlib import Path
import torch
from hpcsgd.training.checkpoint import checkpoints

def hang(*_):
    print("writing", flush=True)
    time.sleep(60)

points = checkpoints.Checkpoints(Path(sys.argv[1]), 0, 1, lambda item: [item])
points.save(10, {"weights": torch.ones(5)}, {})
checkpoints.write_manifest = hang
points.save(20, {"weights": torch.zeros(5)}, {})
"""


def test_a_killed_process_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"writing\n"
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert names(tmp_path) == [".step-00000020.partial", "step-00000010"]
    assert names(tmp_path / ".step-00000020.partial") == ["rank-0000.pt"]
    (([found], _),) = on_ranks(tmp_path, lambda c, r: c.load(), ranks=1)
    assert torch.equal(found["weights"], torch.ones(5, device="cpu"))
    save(tmp_path, 30, ranks=1)
    assert names(tmp_path) == ["step-00000010", "step-00000030"]
