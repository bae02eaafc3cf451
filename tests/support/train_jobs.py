"""Several `hpcsgd` commands in one MPI job, because starting one takes seconds."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcsgd.commands.train.metrics import TIME_FIELDS
from tests.support import devices
from tests.support.launch import CLI, launch, rank_processes

_COMMANDS = """
import contextlib, io, json, os, random, time, traceback
import numpy, torch
from hpcsgd.mpi import launcher

folder, rank = sys.argv[1], launcher.rank()
commands, gates = json.loads(sys.argv[2]), sys.argv[3]
sys.path.insert(0, folder)
outcomes = []
print("begun", flush=True)
for number, command in enumerate(commands):
    if command is None:  # the test's turn
        open(os.path.join(gates, f"{number}-closed-{rank}"), "w").close()
        while not os.path.exists(os.path.join(gates, f"{number}-open")):
            time.sleep(0.01)
        continue
    # The random state that one run leaves must not help the next.
    random.seed(), numpy.random.seed(), torch.seed()
    sys.argv = ["hpcsgd", *command]
    code, out, err = "returned", io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = traceback.format_exc()
    outcomes.append((code, out.getvalue(), err.getvalue()))
with open(os.path.join(folder, f"outcomes-{rank}.json"), "w") as file:
    json.dump(outcomes, file)
"""

# A model of the user's own that draws from every generator, and may signal its own process.
NOISY = """
import os, random
import numpy as np
from torch import nn
import hpcsgd.commands.train.trainer
from hpcsgd.mpi import launcher

hpcsgd.commands.train.trainer.EXCHANGE_PERIOD = 0.0  # signals are exchanged after every step

class Noisy(nn.Module):
    def __init__(self, layers, stop, number):
        super().__init__()
        self.layers, self.stop, self.number, self.passes = layers, stop, number, 0

    def forward(self, x):
        if self.training:
            self.passes += 1
            if self.passes == self.stop:
                os.kill(os.getpid(), self.number)
            x = x * (1 + 0.1 * random.random() + 0.1 * np.random.random())
        return self.layers(x)

def noisy(shape: tuple[int, ...], classes: int, stop: int = 0, rank: int = 0, number: int = 0) -> nn.Module:
    layers = [nn.Linear(shape[0], 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, classes)]
    return Noisy(nn.Sequential(*layers), stop if launcher.rank() == rank else 0, number)
"""


@dataclass
class Outcome:
    """The exit code (or traceback) and the output of one command, of every rank."""

    codes: list[Any]
    outs: list[str]
    errs: list[str]


#: What a test does while a job waits between two commands.
Between = Callable[[], object]


def run_commands(
    folder: Path, ranks: int, *commands: Sequence[object] | Between, prelude: str = ""
) -> list[Outcome]:
    """Run commands of `hpcsgd` one after the other in one job; `folder` is on its module path.

    A function among the commands is called here, after those before it and before those after it; it has no
    outcome.
    """
    texts = json.dumps([None if callable(words) else [str(word) for word in words] for words in commands])
    gates = Path(tempfile.mkdtemp(dir=folder))

    def take_turns(job: dict[int, str]) -> None:
        for number, between in enumerate(commands):
            if callable(between):
                _wait_for_ranks(job, [gates / f"{number}-closed-{rank}" for rank in range(ranks)])
                between()
                (gates / f"{number}-open").touch()

    script, arguments = CLI + devices.prelude() + prelude + _COMMANDS, (str(folder), texts, str(gates))
    meanwhile = take_turns if any(map(callable, commands)) else None
    job = launch(script, ranks, *arguments, timeout=150, meanwhile=meanwhile)
    assert job.returncode == 0 and not job.timed_out and not job.left and not job.files, job
    read = [json.loads((folder / f"outcomes-{rank}.json").read_text()) for rank in range(ranks)]
    return [Outcome(*map(list, zip(*of_ranks, strict=True))) for of_ranks in zip(*read, strict=True)]


def _wait_for_ranks(job: dict[int, str], files: list[Path]) -> None:
    """Return once each rank of a job has written its file, or one has ended: the test then sees its error."""
    processes, give_up = rank_processes(job).values(), time.monotonic() + 150
    while not all(file.exists() for file in files) and time.monotonic() < give_up:
        if not all(Path(f"/proc/{process}").exists() for process in processes):
            return
        time.sleep(0.01)


def trained(folder: Path, ranks: int, *commands: str | Between, prelude: str = "") -> list[str]:
    """Run `hpcsgd train` with each line of arguments; all must succeed. Returns the output of rank 0.

    Functions among the commands: as for `run_commands`.
    """
    full = [
        command if callable(command) else ("train", "--out", folder, *command.split()) for command in commands
    ]
    outcomes = run_commands(folder, ranks, *full, prelude=prelude)
    for command, outcome in zip((words for words in full if not callable(words)), outcomes, strict=True):
        assert outcome.codes == [0] * ranks, (command, outcome)
        assert not any(outcome.outs[1:]) and not any(outcome.errs), (command, outcome)
    return [outcome.outs[0] for outcome in outcomes]


def records(run: Path, event: str | None = None) -> list[dict[str, Any]]:
    """The metrics of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if event in (None, line["event"])]


def without_times(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in TIME_FIELDS} for record in records(run)]


def newest_state(run: Path, rank: int) -> dict[str, Any]:
    """The state of one rank in the newest checkpoint."""
    import torch

    folder = max((run / "checkpoints").glob("step-*"))
    state: dict[str, Any] = torch.load(folder / f"rank-{rank:04d}.pt", weights_only=True)
    return state
