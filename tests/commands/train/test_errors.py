"""A wrong option or file is reported once, with a remedy, and ends every rank."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.support.launch import launch
from tests.support.train_jobs import CLI, NOISY, Outcome, records, run_commands

TINY = ["--data", "synthetic:samples=64", "--epochs", "2"]
Wrong = tuple[list[object], list[str]]  # arguments, and words of the message


def assert_refused(outcome: Outcome, *words: str) -> None:
    """The same exit code on all ranks and one message on one of them."""
    assert len(set(outcome.codes)) == 1 and outcome.codes[0] in (1, 2), outcome
    message = "".join(outcome.errs)
    assert sum(map(bool, outcome.errs)) == 1 and "Traceback" not in message, outcome
    assert all(message.count(word) == 1 for word in words), (words, outcome)


@pytest.mark.timeout(170)
def test_errors_are_reported_once(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("bach = 3\n")
    (tmp_path / "own.py").write_text("def fails(shape, classes):\n    raise ValueError('mine')\n")
    run = tmp_path / "run"
    # Most of these before MPI is up, as in a process of their own.
    early: list[Wrong] = [
        (["--batch", 0], ["option 'batch' has a wrong value", "from 1 to 1e9, got '0'"]),
        (["--schedule", "linear"], ["option 'schedule' has a wrong value", "constant, cosine, step"]),
        (["--lr", "0.1"], ["No such option", "--lr"]),
        (["--data", "digit"], ["unknown data set 'digit'", "use one of: cifar10"]),
        (["--data", "digits:size=3"], ["data set 'digits' has no option 'size'"]),
        (["--model", "lenet5"], ["unknown model 'lenet5'", "lenet, "]),
        (["--model", "gpt"], ["model 'gpt' does not fit the data", "lenet, ", "text"]),
        (["--strategy", "locl"], ["unknown strategy 'locl'", "use one of: "]),
        (["--strategy", "dsgd:topology=rng"], ["unknown topology 'rng'", "one-peer-exponential, "]),
        (["--strategy", "local:period=0"], ["option 'period' of strategy 'local'", "from 1 to 1e9"]),
        (
            ["--strategy", "local:perod=2"],
            ["strategy 'local' has no option 'perod'", "period=int (default 8)"],
        ),
        (["--optimizer", "lion"], ["unknown optimizer 'lion'", "adam, adamw, sgd"]),
        (["--config", tmp_path / "bad.toml"], ["unknown option 'bach'", "use one of: batch, "]),
        (["--config", tmp_path / "no.toml"], [f"cannot read settings from {tmp_path / 'no.toml'}:"]),
        (
            ["--resume", tmp_path / "gone"],
            [f"cannot read settings from {tmp_path / 'gone' / 'config.toml'}:"],
        ),
    ]
    late: list[Wrong] = [
        (["--name", "run"], [f"{run} exists", "choose another --name", f"--resume {run}"]),
        (["--data", f"mnist:path={tmp_path}"], ["files of the data set are missing", "path=FOLDER"]),
        (["--model", "nowhere:model"], ["there is no module 'nowhere'"]),
        (["--model", "own:fails"], ["mine"]),
        (["--resume", run / "checkpoints" / "step-00000009"], ["no checkpoint of step 9", "steps 1, 2"]),
        (["--resume", run, "--model", "logistic"], ["loading state_dict"]),
        (["--resume", run, "--optimizer", "adam"], ["cannot be resumed with another optimizer", "adam"]),
    ]
    training: list[object] = ["train", "--out", tmp_path]
    newest, older = (run / "checkpoints" / f"step-0000000{step}" for step in (2, 1))

    def damage() -> None:
        assert [r["step"] for r in records(run, "test")] == [1, 2]
        # Real processes and their exit code: too many ranks for the checkpoint.
        job = launch(CLI + "run()", 3, "train", "--resume", str(run), timeout=120)
        assert job.returncode not in (0, None) and not job.timed_out and not job.left and not job.files, job
        assert job.stderr.count("saved by another number of ranks") == 1, job
        assert "Traceback" not in job.stderr, job
        assert "expected: 2 ranks" in job.stderr and "start 2 ranks; or resume with any number" in job.stderr

        shutil.copy(run / "metrics.jsonl", tmp_path / "before.jsonl")
        content = bytearray((newest / "rank-0001.pt").read_bytes())
        content[len(content) // 2] ^= 1
        (newest / "rank-0001.pt").write_bytes(content)
        shutil.copytree(run, tmp_path / "requeued")
        shutil.copytree(run, tmp_path / "lost")
        for manifest in (tmp_path / "lost").rglob("manifest.json"):
            manifest.write_text("")

    *outcomes, damaged, offered, requeued, lost = run_commands(
        tmp_path,
        2,
        *([*training, *words] for words, _ in early),
        [*training, *TINY, "--name", "run"],
        *([*training, *words] for words, _ in late),
        damage,
        ["train", "--resume", run],
        ["train", "--resume", older],
        *([*training, *TINY, "--resume", "auto", "--name", name] for name in ("requeued", "lost")),
    )
    first = outcomes.pop(len(early))
    assert first.codes == [0, 0], first
    for outcome, (_, expected) in zip(outcomes, early + late, strict=True):
        assert_refused(outcome, *expected)
    assert_refused(damaged, "rank-0001.pt is damaged", f"step 1 is complete: resume from {older}\n")
    assert_refused(lost, "is whole", "step 1: ranks 0, 1: ", "step 2: ranks 0, 1: ", "choose another name")
    assert offered.codes == [0, 0] and "from step 1;" in offered.outs[0], offered
    assert requeued.codes == [0, 0] and "from step 1;" in requeued.outs[0], requeued
    assert re.fullmatch(r"hpcsgd: .* passed over: step 2: rank 1: .* is damaged .*\n", requeued.errs[0]), (
        requeued
    )
    for folder in (run, tmp_path / "requeued"):
        assert [r["step"] for r in records(folder, "test")] == [1, 2]
    # Nothing of the run without a whole checkpoint is lost.
    assert (tmp_path / "lost" / "metrics.jsonl").read_bytes() == (tmp_path / "before.jsonl").read_bytes()


def test_a_bad_command_line_ends_a_job(tmp_path: Path) -> None:
    """Before MPI is up."""
    job = launch(CLI + "run()", 2, "train", "--bach", "3", timeout=50)
    assert job.returncode not in (0, None) and not job.timed_out and not job.left, job
    assert job.stderr.count("No such option") == 1 and "Traceback" not in job.stderr, job


@pytest.mark.timeout(170)
def test_an_interrupt_of_one_rank_ends_all(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(NOISY)
    script = CLI + f"sys.path.insert(0, {str(tmp_path)!r}); run()"
    model = f"own:noisy:stop=2,rank=1,number={int(signal.SIGINT)}"
    words = ["train", "--timeout", "60", "--out", str(tmp_path), *TINY, "--model", model]
    job = launch(script, 2, *words, timeout=120)
    assert job.returncode not in (0, None) and not job.timed_out and not job.left and not job.files, job
    assert job.stderr.count("rank 1 interrupted") == 1 and "Traceback" not in job.stderr, job
