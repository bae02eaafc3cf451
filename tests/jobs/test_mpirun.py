"""`jobs/mpirun.sh` with a stand-in for mpiexec: its command line, and its restarts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "jobs" / "mpirun.sh"

#: Notes its calls; in so many first ones it makes a checkpoint, and in so many it fails.
MPIEXEC = """#!/usr/bin/env bash
[ "$1" != --version ] || { cat version; exit; }
echo "$*" >>calls
n=$(wc -l <calls)
[ "$n" -gt "$(cat checkpoints)" ] || mkdir -p "runs/it/checkpoints/step-0000000$n"
[ "$n" -gt "$(cat failures)" ]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mpiexec").write_text(MPIEXEC)
    (tmp_path / "mpiexec").chmod(0o755)
    for name, text in {"version": "HYDRA build details", "checkpoints": "9", "failures": "0"}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def run(folder: Path, *words: str, **variables: str) -> tuple[int, list[str]]:
    path = f"{folder}:/usr/bin:/bin"
    done = subprocess.run(["bash", SCRIPT, *words], cwd=folder, env={"PATH": path, **variables}, timeout=30)
    return done.returncode, (folder / "calls").read_text().splitlines()


def test_hosts_of_a_list_or_a_file(folder: Path) -> None:
    (folder / "hosts.txt").write_text("# ours\n\na:4\nb:2  # the small one\n")
    assert run(folder, "--seed", "1")[0] == 0
    run(folder, HOSTS="a:4,b,c:2")
    _, calls = run(folder, HOSTS="hosts.txt")
    assert calls == [
        "-n 4 -hosts localhost:4 hpcsgd train --seed 1",
        "-n 7 -hosts a:4,b,c:2 hpcsgd train",
        "-n 6 -hosts a:4,b:2 hpcsgd train",
    ]


def test_open_mpi(folder: Path) -> None:
    (folder / "version").write_text("mpiexec (Open MPI) 5.0.8")
    _, calls = run(folder, HOSTS="a:2")
    assert calls == ["-n 2 --host a:2 --bind-to none hpcsgd train"]


def test_ranks_start_again_on_the_hosts_that_answer(folder: Path) -> None:
    (folder / "ssh").write_text("#!/bin/sh\n[ $# = 7 ] && [ $6 != b ]\n")
    (folder / "ssh").chmod(0o755)
    (folder / "failures").write_text("1")
    words = "--out runs --name it --resume auto"
    for more, hosts in (("--on-failure restart", "-n 5 -hosts a:4,c"), ("", "-n 7 -hosts a:4,b:2,c")):
        (folder / "calls").unlink(missing_ok=True)
        shutil.rmtree(folder / "runs", ignore_errors=True)
        code, calls = run(folder, *more.split(), NAME="it", RESTARTS="1", HOSTS="a:4,b:2,c")
        begin, again = (
            f"{start} hpcsgd train {words} {more}".strip() for start in ("-n 7 -hosts a:4,b:2,c", hosts)
        )
        assert (code, calls) == (0, [begin, again])


@pytest.mark.parametrize(
    ("failures", "checkpoints", "restarts", "starts", "status"),
    [
        (0, 9, 3, 1, 0),
        (2, 9, 3, 3, 0),
        (9, 9, 3, 4, 1),  # no more restarts
        (9, 9, 0, 1, 1),
        (9, 0, 3, 1, 1),  # no checkpoint to restart from
        (9, 2, 5, 3, 1),  # twice from the same checkpoint
    ],
)
def test_restarts(
    folder: Path, failures: int, checkpoints: int, restarts: int, starts: int, status: int
) -> None:
    (folder / "failures").write_text(str(failures))
    (folder / "checkpoints").write_text(str(checkpoints))
    code, calls = run(folder, "--seed", "1", NAME="it", RESTARTS=str(restarts))
    assert (code, len(calls)) == (status, starts)
    words = "--out runs --name it --resume auto " if restarts else ""
    assert set(calls) == {f"-n 4 -hosts localhost:4 hpcsgd train {words}--seed 1"}
