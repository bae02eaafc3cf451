"""Plain lines without a terminal, a bar on a terminal, and the terminal restored at the end."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hpcsgd.commands.train import console
from hpcsgd.commands.train.console import ConsoleDisplay, waiting_share
from tests.support.launch import _environment

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def train_record(step: int) -> dict[str, Any]:
    return {
        "event": "train",
        "step": step,
        "epoch": step / 4,
        "loss": 1.23456,
        "accuracy": 0.5,
        "samples_per_second": 1234.5,
        "wait_seconds": [1.0, 3.0],
        "compute_seconds": [9.0, 7.0],
    }


TEST = {"event": "test", "step": 8, "epoch": 2.0, "time": 3.21, "loss": 0.5, "accuracy": 0.875}


def test_waiting_share_is_of_the_time_of_all_ranks() -> None:
    assert waiting_share(train_record(1)) == 4 / 20
    assert waiting_share({"wait_seconds": [0.0], "compute_seconds": [0.0]}) == 0.0


@pytest.mark.parametrize("mode", ["plain", "auto"])
def test_plain_lines(capsys: pytest.CaptureFixture[str], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    shown = ConsoleDisplay(mode, 8, 0, 2.0)
    shown.message("[digits] begins")
    for step in range(1, 9):
        shown.train(train_record(step))
        clock[0] += 0.4 * console._LINE_EVERY
    shown.test(TEST)
    shown.close()
    out, err = capsys.readouterr()
    first, *steps, last = out.splitlines()
    assert first == "[digits] begins" and not err and "\x1b" not in out
    assert [line.split()[1] for line in steps] == ["1/8", "4/8", "7/8"]
    text = "epoch 0.25  loss 1.2346  accuracy 50.00%  1,234 samples/s  waiting  20%"
    assert steps[0] == f"step 1/8  {text}"
    # Three steps in 0.4 of an interval each: as long again for each step that is left.
    times = [re.findall(r"(\d+:\d\d:\d\d) left", line) for line in steps]
    assert times == [[], ["0:00:08"], ["0:00:02"]]
    assert last == "epoch 2.00/2  test loss 0.5000  test accuracy 87.50%  after 3.2 s"


def test_off_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    shown = ConsoleDisplay("off", 8, 0, 2.0)
    shown.message("begins")
    shown.train(train_record(1))
    shown.test(TEST)
    shown.close()
    assert capsys.readouterr() == ("", "")


def test_a_bar_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    shown = ConsoleDisplay("bar", 8, 4, 2.0)
    shown.message("[digits] begins")
    shown.train(train_record(6))
    shown.close()
    out = capsys.readouterr().out
    assert "[digits] begins" in out and "75%" in out and out.rindex(SHOW) > out.rindex(HIDE)


MODEL = """
from torch import nn

class Model(nn.Module):
    def __init__(self, stop, features, classes):
        super().__init__()
        self.passes, self.stop, self.linear = 0, stop, nn.Linear(features, classes)

    def forward(self, x):
        self.passes += self.training
        if self.passes == self.stop:
            raise KeyboardInterrupt
        return self.linear(x)

def model(shape: tuple[int, ...], classes: int, stop: int = 0) -> nn.Module:
    return Model(stop, shape[0], classes)
"""

ON_A_TERMINAL = """
import sys
sys.modules["torch.utils.tensorboard"] = None  # importing it takes seconds
from hpcsgd.commands.cli import main
sys.path.insert(0, sys.argv[1])
words = f"hpcsgd train --data synthetic:samples=64 --log-every 1 --out {sys.argv[1]} --model own:model"
for stop, name, mode in ((0, "whole", "auto"), (4, "interrupted", "bar")):
    sys.argv = [*words.split(), "--name", name, "--progress", mode]
    sys.argv[sys.argv.index("own:model")] += f":stop={stop}"
    try:
        main()
    except SystemExit as end:
        print("exit", end.code)
"""


@pytest.mark.timeout(120)
def test_the_bar_on_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(MODEL)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", ON_A_TERMINAL, str(tmp_path)]
    env = {**_environment("", {}), "TERM": "xterm", "COLUMNS": "160"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    shown = read_all(ours)
    assert process.wait(10) == 0, shown
    whole, interrupted, rest = re.split(r"exit (?:0|130)\r\n", shown)
    assert not rest
    for text in (whole, interrupted):
        assert "synthetic:samples=64, Model of 330 parameters" in text
        assert "samples/s" in text and "waiting" in text and HIDE in text
        assert text.rindex(SHOW) > text.rindex(HIDE), "the cursor stays hidden"
    assert "100%" in whole and "test accuracy" in whole and "done; hpcsgd report" in whole
    assert "100%" not in interrupted and "Traceback" not in shown


def read_all(terminal: int) -> str:
    chunks = []
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # on Linux: the other end is closed
            chunk = b""
        if not chunk:
            os.close(terminal)
            return b"".join(chunks).decode()
        chunks.append(chunk)
