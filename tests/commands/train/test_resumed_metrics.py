"""A resumed run of a deterministic method has the records of an uninterrupted one, but for times."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterable
from pathlib import Path

import pytest

from hpcsgd import registry
from hpcsgd.commands.train.metrics import TIME_FIELDS
from tests.support import strategy_rows as s
from tests.support.launch import launch
from tests.support.markdown_pages import ROOT, Page
from tests.support.train_jobs import CLI, NOISY, Between, trained, without_times

RANKS = 3
#: The steps of all periods differ from that of the signal.
COMMON = "--data synthetic:samples=96 --batch 4 --alpha 0.5 --seed 3 --epochs 1.4 --log-every 4"
COMMON += " --evaluate-every 0.3 --checkpoint-every 0.4"
STOP_AT_PASS = 7

#: The model may stop its run at a pass; ranks of asynchronous methods then exchange signals at each step.
MODEL = (
    NOISY.replace("BatchNorm1d", "LayerNorm")
    + """
def stopping(shape: tuple[int, ...], classes: int, stop: int = 0, number: int = 0) -> nn.Module:
    hpcsgd.commands.train.trainer.ASYNCHRONOUS_EXCHANGE_PERIOD = 0.0 if stop else 30.0
    return noisy(shape, classes, stop, launcher.size()[1] // 2, number)
"""
)


def strategy_of(row: s.Row) -> str:
    """The `--strategy` of a row of the contract."""
    options = {name: value for name, value in row.make().options().items() if name != "compress"}
    return registry.format_spec(row.name, {name: v for name, v in options.items() if v != ""})


ROWS = [f"--strategy {strategy_of(row)}" for row in s.ROWS]
#: Methods whose communication lasts into the next step, or whose ranks do not take every step together.
TELLING = [
    "--strategy dsgd:topology=ring,overlap=yes",
    "--strategy sgp:topology=ring,overlap=yes",
    "--strategy lasgd:period=3,max_lag=3,trigger=all --compress ef+maxnorm:bits=4",
    "--strategy ps:mode=sync --compress ef+maxnorm:bits=4",
    "--strategy teleport:active=2",
]
FURTHER = [
    *TELLING,
    "--strategy allreduce --compress ef+maxnorm:bits=4",
    "--strategy local:period=3 --compress powersgd",
    "--strategy ps:mode=async,max_staleness=0 --compress ef+topk",
    "--strategy ps:mode=elastic,max_staleness=0,interval=1",
    "--strategy dsgd:topology=ring,overlap=yes --virtual-nodes 6",
    "--strategy sgp:overlap=yes --virtual-nodes 6",
    "--strategy adpsgd:topology=ring,schedule=drawn --virtual-nodes 6",
    "--strategy backup --virtual-nodes 6",
    "--strategy teleport:active=4 --virtual-nodes 6",
]


def straight_and_stopped(folder: Path, methods: Iterable[str], *further: str | Between) -> None:
    """Run each method without a stop, and with a SIGTERM of one rank after which it is resumed.

    `further` commands follow in the same job.
    """
    (folder / "own.py").write_text(MODEL)
    commands: list[str] = []
    for number, method in enumerate(methods):
        words, stop = f"{COMMON} {method} --name", f"stop={STOP_AT_PASS},number={int(signal.SIGTERM)}"
        commands += [
            f"{words} straight-{number} --model own:stopping",
            f"{words} stopped-{number} --model own:stopping:{stop}",
            f"--resume {folder}/stopped-{number} --model own:stopping",
        ]
    outputs = trained(folder, RANKS, *commands, *further)[: len(commands)]
    assert all("SIGTERM: checkpoint of step" in output for output in outputs[1::3])
    assert all("from step" in output for output in outputs[2::3])


def left_by_a_kill(run: Path, copy: Path) -> None:
    """Copy a run as a kill after its last checkpoint but one would have left it, with half a line."""
    shutil.copytree(run, copy)
    (copy / "done").unlink()
    *_, last = sorted((copy / "checkpoints").iterdir())
    shutil.rmtree(last)
    metrics = copy / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])


@pytest.mark.timeout(100)
def test_records_do_not_depend_on_a_stop(tmp_path: Path) -> None:
    runs = [tmp_path / f"straight-{number}" for number in range(len(TELLING))]
    killed = [tmp_path / f"killed-{number}" for number in range(len(TELLING))]

    def kill_all() -> None:
        for run, copy in zip(runs, killed, strict=True):
            left_by_a_kill(run, copy)

    resumes = (f"--resume {run} --model own:stopping" for run in killed)
    straight_and_stopped(tmp_path, TELLING, kill_all, *resumes)
    for number, run in enumerate(runs):
        expected = without_times(run)
        assert {"train", "test"} == {record["event"] for record in expected}
        assert without_times(tmp_path / f"stopped-{number}") == expected
        assert without_times(killed[number]) == expected


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_records_do_not_depend_on_a_stop_with_any_deterministic_method(tmp_path: Path) -> None:
    """Signals, and real kills: a rank ends by SIGKILL in a forward pass, and mpiexec ends the others."""
    methods = [*ROWS, *FURTHER]
    straight_and_stopped(tmp_path, methods)
    for number, method in enumerate(methods):
        words = f"train --out {tmp_path} {COMMON} {method} --name killed-{number}"
        passes = STOP_AT_PASS + 3 * ("virtual" in method)  # after the first checkpoint
        kill = f"--model own:stopping:stop={passes},number={int(signal.SIGKILL)}"
        path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        job = launch(CLI + path + "run()", RANKS, *words.split(), *kill.split(), timeout=60)
        assert job.returncode != 0 and not job.timed_out and not job.left and not job.files, job
        checkpoints = list((tmp_path / f"killed-{number}" / "checkpoints").glob("step-*"))
        assert checkpoints and not (tmp_path / f"killed-{number}" / "done").exists(), method
    trained(
        tmp_path,
        RANKS,
        *(f"--resume {tmp_path}/killed-{n} --model own:stopping" for n in range(len(methods))),
    )
    for number, method in enumerate(methods):
        expected, *others = (tmp_path / f"{name}-{number}" for name in ("straight", "stopped", "killed"))
        for other in others:
            assert without_times(other) == without_times(expected), (method, other.name)


def test_the_page_lists_the_fields_that_are_times() -> None:
    page = Page(ROOT / "hpcsgd/strategies/README.md")
    (line,) = (paragraph for paragraph in page.prose.split("\n\n") if paragraph.startswith("**Times**"))
    assert set(Page(page.path, line).spans) - {"metrics.jsonl"} == TIME_FIELDS
