"""SlurmJob scripts for Slurm: their directives, their commands, and the options that are refused."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsgd.commands import cli, sbatch
from hpcsgd.commands.sbatch import SlurmJob
from hpcsgd.errors import BadOption
from hpcsgd.mpi import launcher

JOBS = Path(__file__).parents[2] / "jobs"
STANDARD = [SlurmJob(), SlurmJob(requeue=True), SlurmJob(array=0)]


def asked(text: str) -> dict[str, str]:
    """The #SBATCH lines, which Slurm reads only before the first command."""
    head = text.split("\nset -euo pipefail\n")[0]
    assert text.count("\n#SBATCH") == head.count("\n#SBATCH")
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", head, re.MULTILINE))


def trained(text: str) -> list[str]:
    """The words of the line that trains."""
    (line,) = re.findall(r"^launch (.*?)(?: \|\| status=\$\?)?$", text, re.MULTILINE)
    return shlex.split(line)


@pytest.mark.parametrize("job", STANDARD, ids=sbatch.file_name)
def test_the_scripts_in_jobs_are_what_is_printed(job: SlurmJob) -> None:
    assert (JOBS / sbatch.file_name(job)).read_text() == sbatch.script(job)


jobs = st.builds(
    SlurmJob,
    nodes=st.integers(1, 99),
    ranks_per_node=st.integers(1, 99),
    cpus=st.integers(1, 99),
    gpus=st.integers(0, 8),
    time=st.sampled_from(["10", "8:00:00", "2-0", "1-12:30"]),
    warn=st.integers(1, 500),
    mpi=st.sampled_from(["pmi2", "pmix", "mpiexec"]),
    requeue=st.booleans(),
    array=st.none() | st.integers(1, 50),
    partition=st.sampled_from(["", "long"]),
    arguments=st.lists(st.text(st.characters(codec="ascii", exclude_categories=["C"]))).map(
        lambda words: ("sweep file.toml", *words)
    ),
)


@given(jobs)
@settings(max_examples=60, deadline=None)
def test_everything_that_is_asked_for_is_in_the_script(job: SlurmJob) -> None:
    text = sbatch.script(job)
    found = asked(text)
    assert found["nodes"] == str(job.nodes) and found["ntasks-per-node"] == str(job.ranks_per_node)
    assert found["cpus-per-task"] == str(job.cpus) and found["time"] == job.time
    assert found["signal"] == f"B:USR1@{job.warn}"
    assert found.get("gpus-per-node", "0") == str(job.gpus)
    assert found.get("partition", "") == job.partition
    assert ("requeue" in found) == job.requeue == ("scontrol requeue" in text)
    assert found.get("array") == (None if job.array is None else f"0-{job.array - 1}")
    assert f"${{MPI_TYPE:-{job.mpi}}}" in text
    words = trained(text)
    assert words[:2] == ["hpcsgd", "train"] and words[-1] == "$@"
    own = job.arguments if job.array is None else job.arguments[1:]
    assert tuple(words[-1 - len(own) : -1]) == own
    assert ("--config" in words[: len(words) - len(own)]) == (job.array is not None)


ALL = [
    *STANDARD,
    replace(STANDARD[1], gpus=4, mpi="mpiexec", arguments=("--data", "it's $HOME")),
    SlurmJob(array=3, requeue=True, arguments=("a b.toml", "--seed", "1")),
]


@pytest.mark.parametrize("job", ALL)
def test_bash_and_shellcheck_have_no_objection(job: SlurmJob, tmp_path: Path) -> None:
    path = tmp_path / "job.sbatch"
    path.write_text(sbatch.script(job))
    subprocess.run(["bash", "-n", path], check=True)
    beside = Path(sys.executable).with_name("shellcheck")
    tool = str(beside) if beside.exists() else shutil.which("shellcheck")
    if tool:
        # SC2016 is about a quoted $: arguments are quoted so that no shell expands them.
        subprocess.run([tool, "--exclude=SC2016", path], check=True)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("5", 300),
        ("5:30", 330),
        ("1:02:03", 3723),
        ("2-3", 2 * 86400 + 3 * 3600),
        ("2-3:04", 2 * 86400 + 3 * 3600 + 240),
        ("2-3:04:05", 2 * 86400 + 3 * 3600 + 245),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(time: str, seconds: int) -> None:
    assert sbatch.seconds(time) == seconds


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"time": "8h"}, r"hours:minutes:seconds(.|\n)*'8h'"),
        ({"time": "1:2:3:4"}, "cannot be read"),
        ({"time": "2"}, r"more than the 120 seconds of --warn(.|\n)*2"),
        ({"nodes": 0}, "'nodes' .* from 1"),
        ({"mpi": "openmpi"}, "pmi2, pmix, mpiexec"),
        ({"name": "my job"}, "spaces"),
        ({"name": ""}, "'name'"),
    ],
)
def test_what_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(BadOption, match=message):
        SlurmJob(**wrong)  # type: ignore[arg-type]


#: Stand-ins; the real srun hands signals on too.
STUBS = {
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'echo "scontrol $*"',
    "hpcsgd": """folder=runs/hpcsgd-7; mkdir -p $folder/checkpoints; echo "$*" >>calls
trap 'mkdir -p $folder/checkpoints/step-1; exit' USR1
case $DOES in
done) touch $folder/done ;;
fail) exit 3 ;;
later) mkdir $folder/checkpoints/step-1; exit 3 ;;
stop) mkdir $folder/started; for i in {1..100}; do sleep 0.1; done ;;
esac""",
}


@pytest.mark.parametrize(
    ("does", "status", "requeued"),
    [("done", 0, False), ("fail", 3, False), ("later", 0, True), ("stop", 0, True), ("nothing", 1, False)],
)
def test_back_into_the_queue_only_if_there_is_more_to_do_and_a_way_to_do_it(
    tmp_path: Path, does: str, status: int, requeued: bool
) -> None:
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "DOES": does, "SLURM_JOB_ID": "7"}
    variables |= {"SLURM_JOB_NAME": "hpcsgd", "SLURM_CPUS_PER_TASK": "2"}
    script = ["bash", str(JOBS / "requeue.sbatch"), "--seed", "1"]
    with subprocess.Popen(script, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, text=True) as job:
        if does == "stop":
            while not (tmp_path / "runs/hpcsgd-7/started").exists():
                assert job.poll() is None
            job.send_signal(10)  # SIGUSR1, to the shell alone
        out, _ = job.communicate(timeout=30)
    assert job.returncode == status
    assert ("scontrol requeue 7" in out) == requeued
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["train --out runs --name hpcsgd-7 --resume auto --seed 1"]


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def call(*words: str) -> object:
        monkeypatch.setattr(launcher, "rank", lambda: 0)
        monkeypatch.setattr(cli, "_mpi_is_up", lambda: False)
        monkeypatch.setattr(sys, "argv", ["hpcsgd", "sbatch", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code

    words = ["--nodes", "4", "--ranks-per-node", "8", "--requeue", "--", "--data", "text:limit=1"]
    assert call("train", *words) == 0
    job = SlurmJob(nodes=4, ranks_per_node=8, requeue=True, arguments=("--data", "text:limit=1"))
    assert capsys.readouterr().out == sbatch.script(job)

    sweep, out = tmp_path / "sweep.toml", tmp_path / "job.sbatch"
    sweep.write_text("epochs = 1\n[[run]]\nseed = 1\n[[run]]\nseed = 2\n")
    assert call("sweep", "-o", str(out), str(sweep)) == 0
    assert out.read_text() == sbatch.script(SlurmJob(array=2, arguments=(str(sweep),)))

    sweep.write_text("[[run]]\nsed = 1\n")
    for wrong, message in {
        ("sweep", str(sweep)): "unknown option 'sed'",
        ("sweep", "nowhere.toml"): "cannot read settings from nowhere.toml",
        ("train", "--time", "soon"): "the time limit cannot be read",
        ("train", "-o", str(tmp_path)): "cannot write",
    }.items():
        assert call(*wrong) == 2
        assert message in capsys.readouterr().err
