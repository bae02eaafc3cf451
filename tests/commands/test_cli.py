"""The command line: help needs no MPI, and an error is one message on one rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcsgd.commands import cli
from hpcsgd.commands.train.settings import FIELDS
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi import launcher
from tests.support.launch import CLI, launch, run_alone

# A machine without MPI; torch is hidden too, except for the help of train, which lists the models.
HELP = """
import sys
sys.modules["mpi4py"] = sys.modules["torch"] = None
from hpcsgd.commands.cli import main

def show(*words):
    sys.argv = ["hpcsgd", *words]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, (words, end.code)
    print("=====")

show("--help")
show("--version")
for command in ("bench", "doctor", "report", "sbatch", "serve", "topology", "trace", "tune"):
    show(command, "--help")
show("tune", "teleportation", "--help")
del sys.modules["torch"]
show("train", "--help")
"""


def test_help_needs_no_mpi() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0 and not done.stderr, done
    top, version, bench, _, report, *others, train, _ = done.stdout.split("=====\n")
    assert all(f"\n  {name} " in top for name in cli.cli.commands)
    assert version.startswith("hpcsgd") and "RUNS" in report and "allreduce" in bench
    assert len(others) == 6 and all(text.startswith("Usage: ") for text in others)
    for name in FIELDS:
        assert f"--{name.replace('_', '-')} " in train
    rows = [
        "digits",
        "cifar100:path=data/cifar100",
        "resnet50",
        "2nn:width=200",
        "allreduce",
        "local:period=8",
    ]
    for row in [*rows, "sgd:momentum=0", "module:callable"]:
        assert row in train
    assert "lr=" not in train and "params=" not in train


# Torch is hidden: what is wrong is found before its import, which takes seconds.
BEFORE_TORCH = """
import sys
sys.modules["mpi4py"] = sys.modules["torch"] = None
from hpcsgd.commands.cli import main

for words in sys.argv[1:]:
    sys.argv = ["hpcsgd", *words.split()]
    try:
        main()
    except SystemExit as end:
        assert end.code == 2, (words, end.code)
"""
WRONG = {
    "train --strategy ring": "unknown strategy 'ring'; use one of: adpsgd, allreduce",
    "train --compress ef+sign": "unknown compression scheme 'sign'; use one of: bf16",
    "train --compress e+topk": "unknown wrapper of a compression scheme 'e'; use one of: ef",
    "train --compress ef:x=1+topk": "unknown wrapper of a compression scheme 'ef:x=1'; use one of: ef",
    "train --lr 0.1": "Did you mean '--learning-rate'?",
    "train --resume auto": "--resume auto needs the name of the run",
    "train --data digit": "unknown data set 'digit'; use one of: cifar10",
    "train --model resnet": "unknown model 'resnet'; use one of: 2nn",
    "train --optimizer sdg": "unknown optimizer 'sdg'; use one of: adam",
    "train --delays slow:peer=x": "option 'peer' of delays 'slow' has a wrong value",
    "train --model gpt": "model 'gpt' does not fit the data",
    "train --data text --model lenet": "expected a language model: gpt; or data for this one: digits",
    "train --batch 0": "option 'batch' has a wrong value",
    "train --out / --name tmp": "/tmp exists; choose another --name",
    "tune teleportation --strategy ring": "unknown strategy 'ring'",
}


def test_wrong_names_are_found_before_torch_is_imported() -> None:
    done = run_alone(BEFORE_TORCH, *WRONG)
    assert done.returncode == 0 and not done.stdout, done
    for error, expected in zip(done.stderr.splitlines(), WRONG.values(), strict=True):
        assert expected in error


def test_folder_has_one_entry_for_each_command() -> None:
    entries = {path.stem for path in Path(cli.__file__).parent.iterdir()}
    others = {"__init__", "__pycache__", "README", "cli", "options", "signals"}
    assert entries - others == set(cli.cli.commands)


def leave(monkeypatch: pytest.MonkeyPatch, rank: int, error: Exception) -> Any:
    """The exit code of `main`, on some rank, when a command raises."""

    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(launcher, "rank", lambda: rank)
    monkeypatch.setattr(cli.cli, "main", fail)
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("mpi", [False, True])
def test_an_error_of_all_ranks_is_printed_by_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int, mpi: bool
) -> None:
    monkeypatch.setattr(cli, "_mpi_is_up", lambda: mpi)
    assert leave(monkeypatch, rank, HpcsgdError("broken", do="repair it", everywhere=mpi)) == 2
    assert capsys.readouterr().err == ("" if rank else "hpcsgd: broken\n  do:       repair it\n")


def test_an_error_of_one_rank_is_left_to_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_mpi_is_up", lambda: True)
    monkeypatch.setattr(launcher, "size", lambda: ("PMI_SIZE", 2))
    with pytest.raises(HpcsgdError, match="mine alone"):
        leave(monkeypatch, 1, HpcsgdError("mine alone"))


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    monkeypatch.setattr(launcher, "rank", lambda: 0)
    monkeypatch.setattr(cli, "_mpi_is_up", lambda: False)
    monkeypatch.setattr(sys, "argv", ["hpcsgd", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["report"], "Missing argument 'RUNS...'"),
        (["report", "nowhere"], "no such folder: nowhere"),
        (["bench", "allreduce", "--sizes", "4,x"], "each a number from"),
        (["train", "--epochs", "-1"], "option 'epochs' has a wrong value"),
    ],
)
def test_bad_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert call(monkeypatch, *words) == 2
    assert message in capsys.readouterr().err


LEAVING = """
import atexit, sys, time
from concurrent.futures import ThreadPoolExecutor
from mpi4py import MPI
from hpcsgd.commands import cli

def work():
    time.sleep(0.2)
    print("thread")

def main():
    atexit.register(lambda: print("exit function", "after" if MPI.Is_finalized() else "before", "MPI's end"))
    ThreadPoolExecutor(1).submit(work)
    print("buffered", end=" ")
    sys.exit(3)

cli.main = main
sys.stderr.flush = lambda: print("MPI has", "ended" if MPI.Is_finalized() else "not ended", flush=True)
cli.run()
"""


def test_the_process_of_a_command_ends_with_all_that_python_does_at_the_end() -> None:
    done = run_alone(LEAVING)
    assert done.returncode == 3, done
    *lines, last = done.stdout.splitlines()
    assert lines[:2] == ["buffered thread", "exit function before MPI's end"], done
    assert last == "MPI has ended", done


STATUS = """
import os, pathlib, sys, time
from mpi4py import MPI
from hpcsgd.commands import cli

def main():
    rank, pids = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.allgather(os.getpid())
    MPI.Finalize()
    while rank == 1 and not has_ended(pids[0]):
        time.sleep(0.01)
    sys.exit(3 * rank)

def has_ended(pid):
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"

cli.main = main
cli.run()
"""


@pytest.mark.timeout(60)
def test_the_status_of_a_rank_that_ends_after_another_is_the_status_of_the_job() -> None:
    job = launch(STATUS, 2)
    assert job.returncode == 3 and not job.left, job


OWN = """
import os, sys
from torch import nn

file = open(os.environ["OWN_FILE"], "w")
file.write("kept")

def make(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[-1], classes))

def leave():
    sys.exit("left")
"""


@pytest.mark.parametrize("call", ["make", "leave"])
def test_modules_of_the_user_end_as_in_any_python_program(tmp_path: Path, call: str) -> None:
    (tmp_path / "own.py").write_text(OWN)
    words = f"train --data synthetic:samples=64 --epochs 1 --model own:{call} --out {tmp_path} --progress off"
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}){CLI}run()"
    done = run_alone(script, *words.split(), env={"OWN_FILE": str(tmp_path / "file")})
    assert (tmp_path / "file").read_text() == "kept"
    assert done.returncode == (call == "leave"), done
    assert done.stderr.splitlines()[-1:] == ["left"] * (call == "leave"), done


def test_a_closed_output_is_no_failure() -> None:
    words = [sys.executable, "-c", CLI + "run()", "--version"]
    done = run_alone(f"import os; os.close(1); os.execv({sys.executable!r}, {words})")
    assert done.returncode == 0 and not done.stderr, done


@pytest.mark.parametrize("words", [["--version"], ["sbatch", "--help"]], ids=" ".join)
def test_a_full_disk_for_the_output_is_one_line(words: list[str]) -> None:
    command = [sys.executable, "-c", CLI + "run()", *words]
    end = f"os.dup2(os.open('/dev/full', os.O_WRONLY), 1); os.execv({sys.executable!r}, {command})"
    done = run_alone(f"import os; {end}")
    assert done.returncode == 1 and not done.stdout, done
    assert done.stderr.count("\n") == 1 and "the output cannot be written" in done.stderr, done
