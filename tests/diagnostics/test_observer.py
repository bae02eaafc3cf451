"""The process that ends first is found, whatever ends after it; the report has ranks and steps."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hpcsgd.diagnostics.activity import LastActivity, ProcessInfo, has_ended_in_order
from hpcsgd.diagnostics.observer import Ends, report

_FORKED = "os.fork()"
_NOT_BY_PYTHON = """
for fd in os.listdir("/proc/self/fd"):
    if os.path.exists(f"/proc/self/fd/{fd}"):
        os.set_inheritable(int(fd), True)
subprocess.Popen(["cat"], close_fds=False)
"""


def _start_process(child: str) -> tuple[subprocess.Popen[str], ProcessInfo]:
    """Start a process with a child, such as one of a DataLoader, which outlives it."""
    code = "import os, subprocess\nfrom hpcsgd.diagnostics.activity import this_process\n"
    # In one piece, because a forked child writes such a line too.
    code += f"end = this_process().end\n{child}\nos.write(1, b'%d\\n' % end)\nos.read(0, 1)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout
    return process, ProcessInfo("a", process.pid, 3, "file", 0, int(process.stdout.readline()))


@pytest.mark.parametrize("child", [_FORKED, _NOT_BY_PYTHON])
def test_the_first_of_several_ends(child: str) -> None:
    processes, infos = zip(*(_start_process(child) for _ in range(4)), strict=True)
    ends = Ends(infos)
    # As on a busy machine, the observer looks when all have ended.
    for number in (2, 0, 3, 1):
        processes[number].kill()
        os.waitid(os.P_PID, processes[number].pid, os.WEXITED | os.WNOWAIT)
    assert ends.first() == 2
    for process in processes:
        process.communicate()


def test_the_first_is_the_one_whose_descriptors_close_first() -> None:
    """A killed process of which the kernel has closed the descriptors may end after one killed later."""
    closing, later = _start_process("os.closerange(100, 5000)"), _start_process("pass")
    ends = Ends([later[1], closing[1]])
    later[0].kill()
    assert ends.first() == 1
    closing[0].communicate("x")
    later[0].communicate()


def test_a_report_has_the_first_rank_and_groups_of_the_others() -> None:
    def last(step: int, operation: str = "a sum at step 7", phase: str = "") -> LastActivity:
        return LastActivity(1.0, step, operation, operation == "a sum at step 7", phase=phase)

    processes = [ProcessInfo("a", 100 + rank, 3, "file", 0) for rank in range(5)]
    activities = [last(7), last(6, "a push"), last(7), last(0, "", "importing numba"), last(0, "")]
    assert list(report(processes, activities, 1, 2)) == [
        "hpcsgd: rank 1 (a, process 101) has ended first, or was killed: after a push, at step 6",
        "the kernel has killed 2 processes there for lack of memory",
        "ranks 0, 2: in a sum at step 7",
        "rank 3: importing numba, at step 0",
        "rank 4: no operation, at step 0",
    ]
    assert not any(map(has_ended_in_order, activities))
    assert has_ended_in_order(last(7, phase="at its end: it ends the job"))
