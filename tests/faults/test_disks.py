"""Disks that fill up, turn read-only or lose the run's folder, and two jobs in one folder."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.background import Job
from tests.support.disks import failing_disk, obstacle, small_disk
from tests.support.train_jobs import Outcome, records, run_commands, without_times

RANKS = 2
KEPT, MOVED = "its records are kept in memory", "all metrics are in the spare folder"
GONE = "was removed: it is created again, and a checkpoint follows"
#: A model that hurts the disk of its run in a given pass of rank 0, and heals it in a later one.
HURTING = """
import os, shutil, signal, subprocess
from pathlib import Path
from torch import nn
from hpcsgd.mpi import launcher

def fill(disk):
    with open(disk / "filling", "wb", buffering=0) as file:
        try:
            while True: file.write(bytes(1024))
        except OSError: pass

def free(disk): (disk / "filling").unlink()
def remove(disk): shutil.rmtree(disk / "run")
def fail(disk): subprocess.run(["mount", "-o", "remount,abort", str(disk)], check=True)
def end(disk): os.kill(os.getpid(), signal.SIGTERM)

class Hurting(nn.Module):
    def __init__(self, layers, disk, actions):
        super().__init__()
        self.layers, self.disk, self.actions, self.passes = layers, disk, actions, -1
        self.act()

    def act(self):
        self.passes += 1
        for name in self.actions.get(self.passes, ()):
            if launcher.rank() == 0:
                globals()[name](self.disk)

    def forward(self, x):
        if self.training: self.act()
        return self.layers(x)

def hurting(shape: tuple[int, ...], classes: int, disk: str = "", actions: str = "") -> nn.Module:
    numbers = {}
    for name, number in (action.split("@") for action in actions.split("+") if action):
        numbers.setdefault(int(number), []).append(name)
    layers = nn.Sequential(nn.Linear(shape[0], 300), nn.ReLU(), nn.Linear(300, classes))
    return Hurting(layers, Path(disk), numbers)
"""
#: 8 steps an epoch; checkpoints at steps 4, 8, 12, 16, 20, 24.
TRAIN = (
    "train --data synthetic:samples=64 --batch 4 --epochs 3 --log-every 1 --checkpoint-every 0.5 --name run"
)
STEPS = 24


#: Runs one after the other: the disk of each, its actions, and further options.
RUNS = {
    "straight": ("straight", "", ""),
    "freed": ("freed", "fill@6+free@15", ""),
    "full": ("full", "fill@6", ""),
    "still full": ("full", "", "--resume auto"),
    "full, then freed": ("full", "free@0", "--resume auto"),
    "ended": ("ended", "fill@6+end@14", ""),
    "ended, then freed": ("ended", "free@0", "--resume auto"),
    "nowhere": ("nowhere", "fill@6", "--spare /dev/null/spare"),
    "failing": ("failing", "fail@6", ""),
    "removed": ("removed", "remove@6+remove@14+remove@24", ""),
    "removed, then ended": ("removed-ended", "remove@6+end@12", "--checkpoint-every 0"),
    "removed, then resumed": ("removed-ended", "", "--checkpoint-every 0 --resume auto"),
}
FULL = ("freed", "full", "ended", "nowhere")
needs_mount = pytest.mark.skipif(bool(obstacle()), reason=obstacle())
pytestmark = [pytest.mark.together, pytest.mark.timeout(170)]


@dataclass
class Runs:
    """The folder of all disks, and the outcome of each run."""

    folder: Path
    outcomes: dict[str, Outcome]

    def __getitem__(self, name: str) -> Outcome:
        return self.outcomes[name]

    def of(self, disk: str) -> Path:
        """The folder of the run on a disk."""
        return self.folder / disk / "run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """All runs, in one job."""
    folder = tmp_path_factory.mktemp("disks")
    (folder / "hurt.py").write_text(HURTING)
    mounted = () if obstacle() else (*FULL, "failing")
    names = [name for name, (disk, *_) in RUNS.items() if disk in mounted or disk not in (*FULL, "failing")]
    words = []
    for disk, actions, options in map(RUNS.__getitem__, names):
        model = f"hurt:hurting:disk={folder / disk},actions={actions}"
        words.append(
            f"{TRAIN} --out {folder / disk} --spare {folder / 'spare'} --model {model} {options}".split()
        )
    with ExitStack() as stack:
        for disk in mounted:
            stack.enter_context((failing_disk if disk == "failing" else small_disk)(folder / disk))
        for disk in {RUNS[name][0] for name in names}.difference(mounted):
            (folder / disk).mkdir()
        yield Runs(folder, dict(zip(names, run_commands(folder, RANKS, *words), strict=True)))


def error_of(outcome: Outcome, *notices: str) -> str:
    """The error of a run that has failed in the same way on all ranks, after some notices."""
    assert outcome.codes == [2] * RANKS, outcome
    assert "Traceback" not in "".join(outcome.errs) and "done;" not in outcome.outs[0], outcome
    *lines, error = outcome.errs[0].split("hpcsgd: ")[1:]
    assert_in_turn(lines, notices)
    return error


def assert_done(outcome: Outcome, *notices: str) -> None:
    """Check the notices of a run that has gone to its end."""
    assert outcome.codes == [0] * RANKS and outcome.outs[0].splitlines()[-1].startswith("done;"), outcome
    assert not outcome.errs[1], outcome
    assert_in_turn(outcome.errs[0].splitlines(), notices)


def assert_in_turn(lines: list[str], notices: tuple[str, ...]) -> None:
    assert len(lines) == len(notices), lines
    assert all(notice in line for line, notice in zip(lines, notices, strict=True)), lines


def assert_complete(run: Path, straight: Path) -> None:
    """The run has all files, and the records of the undisturbed one."""
    assert without_times(run) == without_times(straight)
    assert (run / "done").exists() and (run / "config.toml").read_text() and not (run / "lock").exists()
    assert steps_of(run)[-1] == STEPS and not list(run.glob("*.partial"))


def steps_of(run: Path) -> list[int]:
    """The steps of the whole checkpoints of a run."""
    return sorted(int(manifest.parent.name[5:]) for manifest in run.glob("checkpoints/step-*/manifest.json"))


@needs_mount
def test_a_disk_that_is_full_for_a_while(runs: Runs) -> None:
    outcome = runs["freed"]
    found = sorted_by(outcome, KEPT, MOVED)
    assert_done(outcome, *found, "can be written again, and has all records", "has the checkpoint of step 16")
    assert_complete(runs.of("freed"), runs.of("straight"))


@needs_mount
@pytest.mark.parametrize("disk", ["full", "ended"])
def test_a_disk_that_is_full_at_the_end(runs: Runs, disk: str) -> None:
    """After the last step, or a signal: the run is whole in the spare folder, then in its own again."""
    error = error_of(runs[disk], *sorted_by(runs[disk], KEPT, MOVED))
    assert "cannot be written at the end of the run" in error and "its files are in the spare folder" in error
    assert_done(
        runs[f"{disk}, then freed"], f"and the metrics of {runs.of(disk)} are back from the spare folder"
    )
    assert_complete(runs.of(disk), runs.of("straight"))


@needs_mount
def test_a_run_does_not_begin_on_a_full_disk(runs: Runs) -> None:
    assert "No space left on device" in error_of(runs["still full"])


@needs_mount
def test_without_room_for_a_checkpoint_anywhere_the_run_ends(runs: Runs) -> None:
    found = [KEPT] if KEPT in runs["nowhere"].errs[0] else []
    error = error_of(runs["nowhere"], *found)
    assert "can be saved neither in" in error and "No space left on device" in error and "/dev/null" in error
    assert steps_of(runs.of("nowhere")) == [4] and not (runs.of("nowhere") / "done").exists()


@needs_mount
def test_a_disk_that_fails(runs: Runs) -> None:
    error = error_of(runs["failing"], "Read-only file system): training continues", MOVED)
    assert "cannot be written at the end of the run" in error
    (spare,) = (runs.folder / "spare").iterdir()  # those of the other runs are gone
    assert without_times(spare) == without_times(runs.of("straight"))
    assert steps_of(spare)[-1] == STEPS and steps_of(runs.of("failing")) == [4]


def test_a_folder_that_is_removed(runs: Runs) -> None:
    assert_done(runs["removed"], GONE, GONE, GONE)
    assert_complete(runs.of("removed"), runs.of("straight"))


def test_a_checkpoint_follows_at_once_when_the_folder_was_removed(runs: Runs) -> None:
    """Not only when the next one is due; and the run that is resumed there is the same."""
    ended = runs["removed, then ended"]
    assert ended.codes == [0] * RANKS and ended.errs[0].count(GONE) == ended.errs[0].count("\n") == 1, ended
    assert_complete(runs.of("removed-ended"), runs.of("straight"))


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.long)])
def test_two_jobs_do_not_train_in_one_folder(tmp_path: Path, ranks: int) -> None:
    """The second is refused; when the first was killed, another takes over at once."""
    words = (*TRAIN.split(), "--out", tmp_path, "--resume", "auto", "--delays", "constant:seconds=0.05")
    run = tmp_path / "run"
    with ExitStack() as stack:
        first = stack.enter_context(Job(tmp_path, "first", *words, "--epochs", 9999, ranks=ranks))
        first.wait_for("epoch 2.00/")
        second = stack.enter_context(Job(tmp_path, "second", *words, ranks=ranks))
        assert second.end() == 2
        owner = json.loads((run / "lock").read_text())
        assert owner["pid"] in first.pids()
        for text in (f"{run} is in use by another job", f"process {owner['pid']} on {owner['host']}, since"):
            assert second.text.count(text) == 1 and "Traceback" not in second.text, second.text
        first.wait_for_more("test loss", 1)
        first.kill(owner["pid"])
        first.end()
        assert (run / "lock").exists()
        third = stack.enter_context(Job(tmp_path, "third", *words, "--epochs", 9999, ranks=ranks))
        third.wait_for("from step")
        third.wait_for_more("test loss", 1)
        third.send(signal.SIGTERM)
        assert third.end() == 0, third.text
    assert not (run / "lock").exists()
    steps = [record["step"] for record in records(run, "train")]
    assert steps == list(range(1, len(steps) + 1)) and steps_of(run)[-1] == steps[-1]


def sorted_by(outcome: Outcome, *notices: str) -> list[str]:
    """Notices in the order of the output: the last page of a file may have room for some records."""
    return sorted(filter(None, notices), key=outcome.errs[0].find)
