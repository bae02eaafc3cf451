"""`jobs/gpu_check.sh` with steps of its tests: order, limits, report; and the commands of its own steps."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from jobs.gpu_check import __main__ as gpu_check
from jobs.gpu_check.machine import Machine, Outcome
from jobs.gpu_check.report import Report, goals
from jobs.gpu_check.steps import SMALLEST_TESTS, Step, steps
from tests.support.command_lines import check as check_command

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("PMI", "HYDRA", "OMPI", "MPI", "PRTE")

KERNELS = """data,method,phase,elements,median_ms,min_ms,max_ms,bytes,host
kernel on cuda,memory copy,kernel,100,1.0,0.9,1.1,800,h
kernel on cuda,encode,kernel,100,0.625,0.5,0.7,450,h
kernel on cuda,decode,kernel,100,1.125,1.0,1.2,450,h
"""
MEANS = """bytes,method,median_ms,min_ms,max_ms,share_of_limit,device,host
4096,hpcsgd,0.1,0.1,0.1,0.01,cuda,h
1048576,hpcsgd,1.0,0.9,1.1,0.86,cuda,h
1048576,gloo,9.0,8.9,9.1,0.09,cuda,h
"""
TRAINED = """model,contender,median_ms,min_ms,max_ms,times_no_communication,device,host
gpt,hpcsgd,11,11,11,1.1,cuda,h
gpt,"hpcsgd, maxnorm:bits=4",10.4,10,11,1.04,cuda,h
gpt,no communication,10,10,10,1.0,cuda,h
"""


def python(name: str, script: str, seconds: float = 30, **options: Any) -> Step:
    return Step(name, ["python", "-c", script, "CSV"], seconds, **options)


def writing(name: str, rows: str) -> Step:
    return python(name, f"import sys; open(sys.argv[1], 'w').write({rows!r})")


def run(folder: Path, planned: list[Step], budget: float = 60) -> tuple[int, dict[str, Any], str]:
    report = Report(folder / "out", False)
    (folder / "work").mkdir()
    code = gpu_check.check(planned, Machine(folder / "work"), report, budget)
    return (
        code,
        json.loads((folder / "out" / "gpu_check.json").read_text()),
        (folder / "out" / "gpu_check.txt").read_text(),
    )


def test_goes_on_after_a_failure_and_reports_goals_first(tmp_path: Path) -> None:
    facts = "import json; print(json.dumps({'GPU': 'G1', 'torch': '2'}))"
    failing = "print('FAILED tests/a.py::b'); print('2 passed, 1 failed, 0 skipped'); raise SystemExit(3)"
    planned = [
        python("device", facts),
        python("suites", failing),
        python("sanitizer", "", program="no-such-sanitizer"),
        writing("bench compress", KERNELS),
        writing("bench allreduce, 2 ranks", MEANS),
        writing("bench step, 2 ranks", TRAINED),
    ]
    code, content, page = run(tmp_path, planned)
    assert code == 1
    statuses = [each["status"] for each in content["steps"]]
    assert statuses == ["passed", "failed", "skipped", "passed", "passed", "passed"]
    assert content["machine"] == {"GPU": "G1", "torch": "2"}
    failed = content["steps"][1]
    assert failed["tests"] == {"passed": 2, "failed": 1, "skipped": 0}
    assert failed["failed_tests"] == ["FAILED tests/a.py::b"] and failed["command"].startswith("python -c")
    assert "no-such-sanitizer is not on this machine" in page
    assert (
        content["steps"][3]["figures"][1]["bytes"] == "450"
        and "host" not in content["steps"][3]["figures"][0]
    )
    found = [(round(goal["measured"], 3), goal["verdict"]) for goal in content["goals"]]
    assert found == [(0.9, "reached"), (0.5, "missed"), (0.86, "reached"), (1.04, "missed")]
    lines = page.splitlines()
    assert "4 passed, 1 failed, 0 timed out, 1 skipped" in lines[0] and "GPU G1" in lines[1]
    assert "reached  encode" in lines[3] and page.index("missed") < page.index("suites") < page.index(
        "figures"
    )
    assert failed["reason"] == "exit status 3" and "FAILED tests/a.py::b" in page
    assert "2 passed, 1 failed" in (tmp_path / "out" / "gpu_check.log").read_text()


def test_the_report_is_whole_after_each_step(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    copy = f"import shutil; shutil.copytree({str(tmp_path / 'out')!r}, {str(seen)!r})"
    run(tmp_path, [python("first", ""), python("second", copy)])
    content = json.loads((seen / "gpu_check.json").read_text())
    assert [each["name"] for each in content["steps"]] == ["first"]
    assert "first" in (seen / "gpu_check.txt").read_text()


def test_a_step_ends_at_its_limit_with_its_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)  # those of the launcher of this test
    script = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    script += f"open({str(tmp_path)!r} + f'/rank-{{os.getpid()}}', 'w'); time.sleep(60)"
    began = time.monotonic()
    code, content, _ = run(tmp_path, [python("hangs", script, 4, ranks=2), python("next", "")])
    assert code == 1 and time.monotonic() - began < 30
    assert [each["status"] for each in content["steps"]] == ["timed out", "passed"]
    pids = [path.name.removeprefix("rank-") for path in tmp_path.glob("rank-*")]
    assert len(pids) == 2
    assert not [pid for pid in pids if Path("/proc", pid, "cmdline").exists() and _is_running(pid)]


def test_a_check_that_is_ended_leaves_no_ranks(tmp_path: Path) -> None:
    hangs = f"import os, time; open({str(tmp_path)!r} + f'/rank-{{os.getpid()}}', 'w'); time.sleep(60)"
    step = Step("hangs", ["python", "-c", hangs], 60, ranks=2)
    script = "from jobs.gpu_check.steps import Step\nimport jobs.gpu_check.__main__ as check\n"
    script += f"check.steps = lambda dry_run: [{step!r}]\ncheck.main(['--output', {str(tmp_path / 'out')!r}])"
    env = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=env)
    end = time.monotonic() + 30
    while len(list(tmp_path.glob("rank-*"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(20) == 128 + 15
    pids = [path.name.removeprefix("rank-") for path in tmp_path.glob("rank-*")]
    assert len(pids) == 2
    assert not [pid for pid in pids if Path("/proc", pid, "cmdline").exists() and _is_running(pid)]
    assert json.loads((tmp_path / "out" / "gpu_check.json").read_text())["steps"] == []


def test_a_check_of_which_nothing_ran_is_no_success(tmp_path: Path) -> None:
    assert run(tmp_path, [python("late", "")], budget=5)[0] == 1
    other = tmp_path / "other"
    other.mkdir()
    code, content, _ = run(other, [python("tests", "print('0 passed, 0 failed, 9 skipped')")])
    assert code == 1 and content["steps"][0]["status"] == "skipped"


def _is_running(pid: str) -> bool:
    """Whether it is no zombie, which a test's container may never collect."""
    return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_steps_beyond_the_budget_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "SHORTEST", 1.0)
    planned = [python("long", "import time; time.sleep(60)"), python("late", "")]
    code, content, _ = run(tmp_path, planned, budget=1.5)
    assert code == 1
    assert [each["status"] for each in content["steps"]] == ["timed out", "skipped"]
    assert content["steps"][1]["reason"] == "0 s left of 2"


def test_a_dry_run_judges_no_goal() -> None:
    row = {"method": "hpcsgd", "bytes": "4096", "share_of_limit": "0.9"}
    outcomes = [Outcome("bench allreduce, 2 ranks", "passed", figures=[row])]
    verdicts = [goal.verdict for goal in goals(outcomes, dry_run=True)]
    assert verdicts == ["not measured", "not measured", "not judged: a dry run", "not measured"]


def test_wheels_are_installed_with_their_programs_and_libraries(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "")
        wheel.writestr("carried-1.0.data/data/bin/mpiexec", "#!/bin/sh\n")
        wheel.writestr("carried-1.0.data/data/lib/libmpi.so", "libmpi.so.12")
        wheel.writestr("carried-1.0.data/data/lib/libmpi.so.12", "")
        wheel.writestr(
            "carried-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n"
        )
        wheel.writestr(
            "carried-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("carried-1.0.dist-info/RECORD", "")
    machine = Machine(tmp_path, tmp_path / "wheels")
    assert not machine.problem
    assert Path(machine.env["PATH"].split(":")[0], "mpiexec").is_file()
    assert Path(machine.env["PYTHONPATH"].split(":")[0], "carried.py").is_file()
    assert Path(machine.env["MPI4PY_LIBMPI"]).name == "libmpi.so.12"
    (tmp_path / "none").mkdir()
    assert "no wheels" in Machine(tmp_path, tmp_path / "none").problem


@pytest.mark.parametrize("dry_run", [False, True])
def test_commands_of_the_steps_exist(dry_run: bool) -> None:
    for step in steps(dry_run):
        if "hpcsgd" in step.words:
            check_command(shlex.join(step.words))
        for word in step.words:
            if word.startswith("tests/"):
                assert (ROOT / word.partition("::")[0]).exists(), word
        assert step.seconds <= gpu_check.BUDGET / 4 and (step.ranks <= 2 or not dry_run)


def test_a_dry_run_has_each_kind_of_step_once() -> None:
    full, tiny = ([step.name for step in steps(dry_run)] for dry_run in (False, True))
    kinds = {name.rpartition(", ")[0] or name for name in full} - {"kernels' other tests"}
    assert {name.rpartition(", ")[0] or name for name in tiny} == kinds
    assert [name for name in full if name in tiny] == tiny and len(tiny) < len(full)


def test_tests_for_the_sanitizer_exist() -> None:
    words = [sys.executable, "-m", "pytest", "-q", "--collect-only", *SMALLEST_TESTS]
    env = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stdout
    assert sum("::" in line for line in done.stdout.splitlines()) == len(SMALLEST_TESTS)


def test_only_and_unknown_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--dry-run", "--only", "no such step"])
    assert "bench step, 2 ranks" in capsys.readouterr().err
