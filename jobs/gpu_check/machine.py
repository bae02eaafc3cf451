"""The machine of `jobs/gpu_check.sh`: its programs, and commands with a time limit."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.gpu_check.steps import Step

ROOT = Path(__file__).resolve().parents[2]
#: Columns of CSV files that the report takes over; the others describe the machine, in each line.
COLUMNS = [
    "data",
    "method",
    "phase",
    "elements",
    "model",
    "contender",
    "batch",
    "dtype",
    "device",
    "ranks",
    "bytes",
]
COLUMNS += ["median_ms", "min_ms", "max_ms", "share_of_limit", "times_no_communication", "hidden"]
#: Open MPI refuses root, and more ranks than cores, unless told otherwise; other MPIs do not read these.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_osc": "^ucx",
}


@dataclass
class Outcome:
    """The result of a step: passed, failed, timed out or skipped."""

    name: str
    status: str
    reason: str = ""
    command: str = ""
    seconds: float = 0.0
    tests: dict[str, int] = field(default_factory=dict)
    failed_tests: list[str] = field(default_factory=list)
    figures: list[dict[str, str]] = field(default_factory=list)
    output: str = ""

    @property
    def is_failure(self) -> bool:
        return self.status in ("failed", "timed out")


class Machine:
    """The interpreter, environment and programs of the steps.

    Parameters
    ----------
    work
        A temporary folder.
    wheels
        A folder of wheels to install there, such as mpich and pytest-mpi. Default: none.
    """

    def __init__(self, work: Path, wheels: Path | None = None) -> None:
        defaults = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0", **OPEN_MPI}
        self.env = {**defaults, **os.environ, "PYTHONUNBUFFERED": "1"}
        self.env.pop("PYTHONDONTWRITEBYTECODE", None)  # else each rank of each step compiles all tests anew
        self.work = work
        self._prepend("PYTHONPATH", [ROOT])
        self._prepend("PATH", [Path(sys.executable).parent])
        self.problem = self._install(wheels) if wheels is not None else ""

    def _install(self, wheels: Path) -> str:
        """Install wheels; returns the reason if that fails."""
        files = sorted(map(str, wheels.glob("*.whl")))
        if not files:
            return f"no wheels in {wheels}"
        # Not --target, which leaves out a wheel's lib/, where MPICH's library is. Packages that the
        # interpreter has in another version are no reason not to install.
        options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--ignore-installed"]
        target = self.work / "wheels"
        command = [sys.executable, "-m", "pip", "install", *options, "--prefix", str(target), *files]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"pip: {(done.stderr or done.stdout).strip()[-400:]}"
        self._prepend("PYTHONPATH", [*target.rglob("site-packages"), *target.rglob("dist-packages")])
        self._prepend("PATH", [path.parent for path in target.rglob("bin/mpiexec")])
        # The MPI of this mpiexec, and no other one. The file without a version is a link, which wheels lack.
        for library in target.rglob("libmpi.so.*"):
            self.env["MPI4PY_LIBMPI"] = str(library)
        return ""

    def _prepend(self, variable: str, paths: Sequence[Path]) -> None:
        before = [self.env[variable]] if self.env.get(variable) else []
        self.env[variable] = os.pathsep.join([*map(str, paths), *before])

    def find(self, program: str) -> str | None:
        """The path of a program, also of CUDA's where these are not on the PATH."""
        homes = [self.env.get("CUDA_HOME", ""), self.env.get("CUDA_PATH", ""), "/usr/local/cuda"]
        paths = [self.env["PATH"], *(str(Path(home, "bin")) for home in homes if home)]
        return shutil.which(program, path=os.pathsep.join(paths))


def run_step(step: Step, machine: Machine, log: Path, limit: float) -> Outcome:
    """Run a step for at most `limit` seconds; its output is appended to the log."""
    names = {"python": sys.executable, "CSV": str(machine.work / "results.csv")}
    command = [names.get(word, word) for word in step.words]
    for program in filter(None, (step.program, "mpiexec" if step.ranks else "")):
        found = machine.find(program)
        if found is None and program == "mpiexec":
            return Outcome(step.name, "failed", "no mpiexec: carry the wheel of mpich, see --wheels")
        if found is None:
            return Outcome(step.name, "skipped", f"{program} is not on this machine")
        command = [found, *(["-n", str(step.ranks)] if program == "mpiexec" else []), *command]
    Path(names["CSV"]).unlink(missing_ok=True)
    shown = " ".join(command).replace(str(machine.work), "WORK").replace(sys.executable, "python")
    shown = shown.replace(f"{ROOT}/", "")
    with log.open("a+", errors="replace") as file:
        file.write(f"\n=== {step.name}: {shown}\n")
        file.flush()
        position, began = file.tell(), time.monotonic()
        code = _call(command, {**machine.env, **step.variables}, file, limit)
        seconds = round(time.monotonic() - began, 1)
        file.seek(position)
        text = file.read()
    counts = _counts(text)
    status = "timed out" if code is None else "failed" if code else "passed"
    reason = f"after {limit:.0f} s" if code is None else f"exit status {code}" if code else ""
    if status == "passed" and counts.get("passed") == 0:
        status, reason = "skipped", "none of the tests could run here"
    tail = text[-(4000 if code != 0 else 1500) :]
    failed = [line[:200] for line in text.splitlines() if re.search(r"^(FAILED|ERROR) | FAILED$", line)]
    figures = list(_figures(Path(names["CSV"])))
    return Outcome(step.name, status, reason, shown, seconds, counts, failed[:50], figures, tail)


def _call(command: Sequence[str], env: Mapping[str, str], output: Any, limit: float) -> int | None:
    """Return the exit status of a command; None if it was ended after `limit` seconds."""
    try:
        process = subprocess.Popen(
            command,
            env=env,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    except OSError as error:
        output.write(f"{error}\n")
        return 127
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            # A launcher may have put its ranks into sessions of their own, which outlive its group.
            ranks = list(_descendants(process.pid))
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(3)
            for pid in [process.pid, *ranks]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def _descendants(pid: int) -> Iterator[int]:
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                yield child
                yield from _descendants(child)


def _counts(text: str) -> dict[str, int]:
    """The last line of counts that the tests print, or, where they were ended, the tests so far."""
    names = ("passed", "failed", "skipped")
    found = re.findall(r"^(\d+) passed, (\d+) failed, (\d+) skipped$", text, re.MULTILINE)
    if found:
        return dict(zip(names, map(int, found[-1]), strict=True))
    so_far = {name: len(re.findall(rf"^tests/.* {name.upper()}( |$)", text, re.MULTILINE)) for name in names}
    return so_far if any(so_far.values()) else {}


def _figures(path: Path) -> Iterator[dict[str, str]]:
    if path.is_file():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                yield {name: row[name] for name in COLUMNS if row.get(name)}
