"""The lock of a folder: one owner at any time, whose death is found out, on any host."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hpcsgd.errors import HpcsgdError
from hpcsgd.training.checkpoint import folder_lock, lock_owner
from hpcsgd.training.checkpoint.folder_lock import FolderLock
from hpcsgd.training.checkpoint.lock_owner import LockOwner

BEAT, STALE, POLL = 0.2, 1.0, 0.05

#: Acquires the lock of a folder, keeps it until its input ends, and prints what became of it.
HOLDER = f"""
import sys
from pathlib import Path
from hpcsgd.errors import HpcsgdError
from hpcsgd.training.checkpoint import folder_lock
folder_lock.BEAT, folder_lock.STALE, folder_lock._POLL = {BEAT}, {STALE}, {POLL}
lock = folder_lock.FolderLock(Path(sys.argv[1]), "go elsewhere", lambda text: None)
try:
    lock.acquire()
    print("held", flush=True)
    sys.stdin.read()
    lock.check()
    lock.release()
    print("released", flush=True)
except HpcsgdError as error:
    print(str(error).splitlines()[0], flush=True)
"""


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BEAT": BEAT, "STALE": STALE, "_POLL": POLL}.items():
        monkeypatch.setattr(folder_lock, name, value)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def holder(folder: Path, *within: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has acquired the lock of the folder."""
    process = start(folder, *within)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def start(folder: Path, *within: str) -> subprocess.Popen[str]:
    command = [*within, sys.executable, "-c", HOLDER, str(folder)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def lock_of(folder: Path) -> FolderLock:
    return FolderLock(folder, "go elsewhere", lambda text: None)


def acquire(folder: Path) -> float:
    """Acquire and release the lock; returns the seconds that this took."""
    began = time.monotonic()
    lock = lock_of(folder)
    lock.acquire()
    lock.check()
    took = time.monotonic() - began
    lock.release()
    assert not list(folder.iterdir())
    return took


def leave(folder: Path, **changes: object) -> LockOwner:
    """Leave the lock of an owner that gives no sign of life; by default it is on another host."""
    owner = replace(LockOwner(), **{"machine": "another", "host": "n7", **changes})  # type: ignore[arg-type]
    (folder / folder_lock.FILE).write_text(owner.text())
    return owner


def test_the_owner_is_named_while_it_lives_and_gone_when_it_has_ended(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        owner = json.loads((tmp_path / "lock").read_text())
        assert owner["pid"] == process.pid
        with pytest.raises(HpcsgdError) as raised:
            lock_of(tmp_path).acquire()
        message = str(raised.value)
        assert f"{tmp_path} is in use by another job" in message
        assert f"process {process.pid} on {owner['host']}, since {owner['since']}" in message
        assert f"kill {process.pid} on" in message and "go elsewhere" in message
        output, _ = process.communicate("")
        assert output == "released\n"
    assert acquire(tmp_path) < STALE


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
        assert (tmp_path / "lock").exists()
        assert acquire(tmp_path) < STALE


def test_another_process_with_the_same_id_is_not_the_owner(tmp_path: Path) -> None:
    this = LockOwner()
    leave(tmp_path, machine=this.machine, started=this.started - 1)
    assert acquire(tmp_path) < STALE
    leave(tmp_path, machine=this.machine)
    with pytest.raises(HpcsgdError, match="in use"):
        acquire(tmp_path)


def test_processes_that_cannot_be_looked_up_are_watched(tmp_path: Path) -> None:
    """In a namespace of process ids of their own, as on another host."""
    within = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    if subprocess.run([*within, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a namespace of process ids needs root")
    notices: list[str] = []
    with holder(tmp_path, *within) as process:
        with pytest.raises(HpcsgdError, match=r"process 1 on .*, since"):
            FolderLock(tmp_path, "", notices.append).acquire()
        assert "waiting for a sign of life" in notices[0] and "process 1 on" in notices[0]
        process.kill()
        process.wait()
        assert (tmp_path / "lock").exists()
        assert acquire(tmp_path) > STALE / 2


def test_an_old_lock_is_watched_for_two_beats_only(tmp_path: Path) -> None:
    leave(tmp_path)
    os.utime(tmp_path / "lock", (1.0, 1.0))
    assert 2 * BEAT <= acquire(tmp_path) < STALE


def test_a_lock_from_the_future_is_watched_to_the_end(tmp_path: Path) -> None:
    """The clock of its host was wrong."""
    leave(tmp_path)
    later = time.time() + 1e6
    os.utime(tmp_path / "lock", (later, later))
    assert acquire(tmp_path) >= STALE


@pytest.mark.parametrize("text", ["", "{}", '{"pid": "none"}', "no JSON"])
def test_a_damaged_lock_is_taken_over_when_nobody_renews_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock").write_text(text)
    assert acquire(tmp_path) >= STALE


def slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    """A stand-in for squeue, with the environment of a job."""
    (folder / "squeue").write_text(f"#!/bin/sh\n[ $2 = --jobs=17 ] || exit 9\n{output}\n")
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "lab")


@pytest.mark.parametrize(
    ("output", "lives"),
    [
        ("", False),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", False),
        ("echo PENDING", False),
        ("echo SUSPENDED", True),
        ("echo RUNNING", None),
        ("echo COMPLETING", None),
        ("echo Unable to contact slurm controller >&2; exit 1", None),
    ],
)
def test_slurm_knows_of_jobs_on_other_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, lives: bool | None
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    slurm(tmp_path, monkeypatch, output)
    assert leave(folder, job="17", cluster="lab").lives(LockOwner()) is lives
    assert leave(folder, job="17", cluster="another").lives(LockOwner()) is None
    if lives is False:
        leave(folder, job="17", cluster="lab")
        assert acquire(folder) < STALE


def test_a_requeued_job_takes_over_its_own_lock_on_another_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    leave(tmp_path, job="17")
    assert acquire(tmp_path) >= STALE  # perhaps another step of the same job
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    leave(tmp_path, job="17", restarts=0)
    assert acquire(tmp_path) < STALE


def test_survivors_take_over_from_a_dead_rank(tmp_path: Path) -> None:
    dead = leave(tmp_path)
    lock = lock_of(tmp_path)
    began = time.monotonic()
    lock.acquire(predecessor=dead.token)
    assert time.monotonic() - began < STALE
    lock.hand_over()
    assert (tmp_path / "lock").exists()
    heir = lock_of(tmp_path)
    heir.acquire(predecessor=lock.owner.token)
    heir.release()
    assert not list(tmp_path.iterdir())


def test_survivors_take_over_on_a_full_disk_when_it_has_room_again(tmp_path: Path) -> None:
    dead = leave(tmp_path)
    lock = lock_of(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(HpcsgdError, match=r"cannot lock .*: File too large"):
            lock_of(tmp_path).acquire()
        lock.acquire(predecessor=dead.token)
        lock.check()
        assert json.loads((tmp_path / "lock").read_text())["token"] == dead.token
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lock.renew()
    assert json.loads((tmp_path / "lock").read_text())["token"] == lock.owner.token
    lock.release()
    assert not list(tmp_path.iterdir())


def test_of_many_only_one_takes_over(tmp_path: Path) -> None:
    """From a dead owner, from nobody, and when the winner is killed."""
    leave(tmp_path)
    os.utime(tmp_path / "lock", (1.0, 1.0))
    for _ in range(4):
        contenders = [start(tmp_path) for _ in range(6)]
        outputs = [process.stdout.readline() for process in contenders if process.stdout is not None]
        assert outputs.count("held\n") == 1, outputs
        assert sum("is in use by another job" in output for output in outputs) == 5, outputs
        winner = contenders[outputs.index("held\n")]
        assert json.loads((tmp_path / "lock").read_text())["pid"] == winner.pid
        winner.kill()
        for process in contenders:
            process.communicate()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_an_owner_that_was_stopped_finds_its_successor(tmp_path: Path) -> None:
    """Also if that has ended meanwhile."""
    within = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    if subprocess.run([*within, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a namespace of process ids needs root")
    for stays in (True, False):
        with holder(tmp_path, *within) as process:
            (child,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
            os.kill(child, signal.SIGSTOP)
            successor = lock_of(tmp_path)
            successor.acquire()
            if not stays:
                successor.release()
            os.kill(child, signal.SIGCONT)
            output, _ = process.communicate("")
            assert "belongs to another job now" in output
            if stays:
                successor.check()
                successor.release()
        assert not list(tmp_path.iterdir())


def test_a_lock_that_was_removed_comes_again_with_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lock = lock_of(folder)
    lock.acquire()
    shutil.rmtree(folder)
    time.sleep(2 * BEAT)
    assert not folder.exists()
    folder.mkdir()
    lock.renew()
    lock.check()
    with pytest.raises(HpcsgdError, match="in use"):
        lock_of(folder).acquire()
    lock.release()


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    lock = lock_of(tmp_path)
    lock.acquire()
    with pytest.raises(HpcsgdError, match="in use"):
        lock_of(tmp_path).acquire()
    lock.release()
    leave(tmp_path)
    assert acquire(tmp_path) >= STALE


def test_a_folder_that_cannot_be_locked_is_an_error_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(HpcsgdError, match=r"cannot lock .*: No such file or directory"):
        lock_of(tmp_path / "nowhere").acquire()


def test_the_text_of_a_lock_is_its_owner() -> None:
    owner = LockOwner()
    assert LockOwner.parse(owner.text()) == owner
    assert asdict(owner).keys() == json.loads(owner.text()).keys()
    assert not LockOwner.parse("").pid and "unknown" in str(LockOwner.parse(""))
    assert lock_owner._exists(owner.pid, owner.started)
