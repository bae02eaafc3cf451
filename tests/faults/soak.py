"""Soak: methods that train for half an hour each, with a row a minute of what their processes hold.

    python tests/faults/soak.py --minutes 30 --csv soak.csv

The jobs run at the same time, with evaluations and checkpoints; the server of elastic PS is a job of its own.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from tests.support.background import Job

_TRAIN = ("train", "--data", "synthetic:samples=2000", "--epochs", 10**6, "--checkpoint-every", 20)
_QUIET = ("--progress", "plain", "--out", ".", "--evaluate-every", 20, "--delays", "constant:seconds=0.01")
#: Options of each method; the elastic group finds its server by the file.
METHODS: dict[str, tuple[object, ...]] = {
    "lasgd": ("--strategy", "lasgd:period=8", "--compress", "ef+maxnorm:bits=4"),
    "adpsgd": (
        "--strategy",
        "adpsgd",
    ),
    "ps": ("--strategy", "ps:mode=elastic,interval=4", "--connect", "servers"),
}
_MEMORY = ("Pss_Anon:", "Pss_Shmem:")
_SERVE = (
    "serve",
    "--listen",
    "servers",
    "--mode",
    "elastic",
    "--progress",
    "plain",
    "--checkpoint-every",
    20,
)


class Holdings(NamedTuple):
    """What all processes of a job hold together.

    Attributes
    ----------
    mib
        Resident anonymous and shared memory in MiB, without mapped files, which other programs map too.
    descriptors, threads, mappings
        Numbers of open descriptors, threads, and mapped regions.
    files
        Number of files in the job's folder and, of its processes, in /dev/shm.
    """

    mib: float
    descriptors: int
    threads: int
    mappings: int
    files: int


def holdings(job: Job, folder: Path) -> Holdings:
    """Present holdings of a job."""
    total = [0.0, 0, 0, 0]
    pids = job.pids()
    for pid in pids:
        process = Path(f"/proc/{pid}")
        rollup = (process / "smaps_rollup").read_text().splitlines()
        total[0] += sum(int(line.split()[1]) for line in rollup if line.startswith(_MEMORY)) / 1024
        total[1] += len(os.listdir(process / "fd"))
        total[2] += len(os.listdir(process / "task"))
        total[3] += len((process / "maps").read_text().splitlines())
    own = [name for name in os.listdir("/dev/shm") if any(str(pid) in name for pid in pids)]
    files = sum(len(names) for _, _, names in os.walk(folder)) + len(own)
    return Holdings(round(total[0], 1), *map(int, total[1:]), files)


def soak(minutes: float, rows: int, ranks: int = 2) -> dict[str, list[Holdings]]:
    """Train with each method for some minutes; returns `rows` samples at equal distances for each job."""
    with tempfile.TemporaryDirectory() as top, ExitStack() as stack:
        jobs: dict[str, tuple[Job, Path]] = {}
        for name, options in METHODS.items():
            folder = Path(top) / name
            folder.mkdir()
            if name == "ps":
                jobs["ps server"] = stack.enter_context(Job(folder, "server", *_SERVE)), folder
            command = (*_TRAIN, *_QUIET, *options, "--name", "run")
            jobs[name] = stack.enter_context(Job(folder, "job", *command, ranks=ranks)), folder
        for name, (job, _) in jobs.items():
            job.wait_for("hpcsgd train --connect" if name == "ps server" else "test loss")
        started = time.monotonic()
        found: dict[str, list[Holdings]] = {name: [] for name in jobs}
        for row in range(1, rows + 1):
            time.sleep(max(0.0, started + 60 * minutes * row / rows - time.monotonic()))
            for name, (job, folder) in jobs.items():
                found[name].append(holdings(job, folder))
        for name, (job, _) in reversed(jobs.items()):
            if name != "ps server":  # it ends after its group
                job.send(signal.SIGTERM)
            assert job.end() == 0, f"{name}: {job.text[-2000:]}"
    return found


def main() -> None:
    """Print a table of the samples; write them to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=int, default=30, help="minutes of training [30]")
    parser.add_argument("--csv", type=Path, default=Path("soak.csv"), help="file of the samples [soak.csv]")
    options = parser.parse_args()
    found = soak(options.minutes, options.minutes)
    with options.csv.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["minute", "job", *Holdings._fields])
        for name, samples in found.items():
            writer.writerows([minute, name, *sample] for minute, sample in enumerate(samples, 1))
    for name, samples in found.items():
        for field in Holdings._fields:
            print(f"{name:10} {field:12}", *(getattr(sample, field) for sample in samples))


if __name__ == "__main__":
    main()
