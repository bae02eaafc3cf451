"""The observer: a process beside the ranks of one machine, which names the first that is killed.

MPICH's mpiexec ends the others within milliseconds then, and names no rank, but a process, which may be one
of these. The observer is in a session of its own, which mpiexec leaves alone. It maps the activity records of
all ranks, so that they outlive these.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from hpcsgd.diagnostics import procfs
from hpcsgd.diagnostics.activity import LastActivity, ProcessInfo, ProcessView, has_ended_in_order
from hpcsgd.errors import format_ranks

_STDERR = 2


def start(processes: Sequence[ProcessInfo]) -> None:
    """Start the observer of these ranks, all on this machine, which ends with the first of them."""
    code = f"import sys; sys.path[:] = {sys.path!r}\nfrom hpcsgd.diagnostics import observer; observer.main()"
    # Not to be taken for a rank.
    environment = {name: v for name, v in os.environ.items() if not name.startswith(("PMI", "HYDI", "MPI_"))}
    with contextlib.suppress(OSError):  # a limit of processes: the job goes on without it
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        text = json.dumps([asdict(each) for each in processes])
        # It ends when it has started another process; nobody waits for it meanwhile.
        threading.Thread(target=process.communicate, args=(text.encode(),), daemon=True).start()


def main() -> None:
    """Observe the ranks whose processes are on stdin, until one has ended; report it if it did not exit."""
    processes = [ProcessInfo(**fields) for fields in json.load(sys.stdin)]
    try:
        views = [ProcessView(process) for process in processes]
        ends = Ends(processes)
    except (OSError, AttributeError):
        return  # one has ended already, or there are no such descriptors here
    killed_before = procfs.killed_for_memory()
    if os.fork():  # this process is a child of a rank, which has it for one of its own; its child is nobody's
        return
    first = ends.first()
    activities = [view.last() for view in views]
    if has_ended_in_order(activities[first]):
        return  # it has ended the job, or all end
    lines = list(report(processes, activities, first, procfs.killed_for_memory() - killed_before))
    with contextlib.suppress(OSError):
        os.write(_STDERR, ("\n  ".join(lines) + "\n").encode())


class Ends:
    """The ends of processes of this machine, in their order.

    Raises
    ------
    OSError
        One has ended already.
    """

    def __init__(self, processes: Sequence[ProcessInfo]) -> None:
        self._poll = select.epoll()
        self._index: dict[int, int] = {}
        for index, process in enumerate(processes):
            # A killed process closes its descriptors, the last first, and ends some milliseconds later,
            # within which mpiexec, whose connection is one of them, may have ended others.
            self._add(os.open(f"/proc/{process.pid}/fd/{process.end}", os.O_RDONLY | os.O_NONBLOCK), index)
            # The pipe's other end may live on in a child that was forked without Python.
            self._add(os.pidfd_open(process.pid), index)

    def _add(self, descriptor: int, index: int) -> None:
        self._poll.register(descriptor, select.EPOLLIN)
        self._index[descriptor] = index

    def first(self) -> int:
        """Wait for the first end; return the index of the process, also where others have ended since."""
        # They are in the order in which they have become ready.
        descriptor: int = self._poll.poll()[0][0]
        return self._index[descriptor]


def report(
    processes: Sequence[ProcessInfo], activities: Sequence[LastActivity], first: int, killed: int
) -> Iterator[str]:
    """Yield the lines of a report on the processes and the last activity of all ranks.

    `first` is the rank that has ended first, and `killed` the number of processes that the kernel has killed
    for lack of memory since the start of the job.
    """
    info = processes[first]
    begin = f"hpcsgd: {format_ranks(first)} ({info.host}, process {info.pid}) has ended first, or was killed"
    yield f"{begin}: {_place(activities[first])}"
    if killed > 0:
        yield f"the kernel has killed {killed} processes there for lack of memory"
    groups: Mapping[str, list[int]] = defaultdict(list)
    for rank, last in enumerate(activities):
        if rank != first:
            groups[_place(last)].append(rank)
    for place, ranks in sorted(groups.items(), key=lambda group: group[1]):
        yield f"{format_ranks(ranks)}: {place}"


def _place(last: LastActivity) -> str:
    operation = f"{'in' if last.in_flight else 'after'} {last.operation}" if last.operation else ""
    place, step = last.phase or operation or "no operation", f"at step {last.step}"
    return place if step in place else f"{place}, {step}"
