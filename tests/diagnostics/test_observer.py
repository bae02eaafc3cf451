"""The process that ends first is found, whatever ends after it; the report has ranks and steps."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time

from hpcsgd.diagnostics.activity import LastActivity, ProcessInfo, has_ended_in_order
from hpcsgd.diagnostics.observer import _first_end, report


def test_the_first_of_several_ends() -> None:
    processes = [subprocess.Popen(["sleep", "100"]) for _ in range(4)]
    ends, found = [os.pidfd_open(process.pid) for process in processes], []
    # Stopped in the middle of its wait, as on a busy machine, it looks when all have ended.
    observer = threading.Thread(target=lambda: found.append(_first_end(ends)))
    observer.start()
    time.sleep(0.2)
    for number in (2, 0, 3, 1):
        processes[number].kill()
        os.waitid(os.P_PID, processes[number].pid, os.WEXITED | os.WNOWAIT)
    observer.join(10)
    assert found == [2]
    for process, end in zip(processes, ends, strict=True):
        assert process.wait() == -signal.SIGKILL
        os.close(end)


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
