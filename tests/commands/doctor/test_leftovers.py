"""Files of shared memory: those of ended jobs are told from those that a process maps."""

from __future__ import annotations

import getpass
import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from hpcsgd.commands.doctor import leftovers
from hpcsgd.commands.doctor.leftovers import SharedFile

FILES = [
    SharedFile("mpich_shm_1_0", "MPICH", "ada", 2_100_000, ()),
    SharedFile("mpich_shm_2_0", "MPICH", "ada", 2_100_000, (3, 4, 5, 6)),
    SharedFile("sm_segment.h1.7.1.0", "Open MPI", "bob", 16_800_000, None),
]


def test_files_of_jobs_are_listed_with_size_owner_and_processes() -> None:
    lines = list(leftovers.describe([{"node": 0, "host": "h0", "shared files": FILES}]))
    assert lines[0] == "/dev/shm of h0 has 3 files of other jobs, 21.0 MB"
    assert lines[1:] == [
        "mpich_shm_1_0: 2.1 MB, MPICH, ada, mapped by no process",
        "mpich_shm_2_0: 2.1 MB, MPICH, ada, mapped by processes 3, 4, 5 and 1 more",
        "sm_segment.h1.7.1.0: 16.8 MB, Open MPI, bob, of which the processes are not visible",
    ]
    many = [FILES[0]] * 20
    assert (
        list(leftovers.describe([{"node": 0, "host": "h0", "shared files": many}]))[-1]
        == "and 12 more, 25.2 MB"
    )


MAP = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0)
print(flush=True)
sys.stdin.read()
"""


def test_a_file_is_of_an_ended_job_when_no_process_maps_it() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        for file in ("mpich_shm_1f_0", "sm_segment.h.0.1.0", "hpcsgd-abc", "other"):
            (folder / file).write_bytes(bytes(5000))
        own = mmap.mmap(os.open(folder / "hpcsgd-abc", os.O_RDWR), 5000)
        words = [sys.executable, "-c", MAP, str(folder / "mpich_shm_1f_0")]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline()
            found = leftovers.find(folder)
        own.close()
        user = getpass.getuser()
        assert found == [
            ("sm_segment.h.0.1.0", "Open MPI", user, 5000, ()),
            ("mpich_shm_1f_0", "MPICH", user, 5000, (process.pid,)),
        ]
        assert {each.processes for each in leftovers.find(folder)} == {()}
