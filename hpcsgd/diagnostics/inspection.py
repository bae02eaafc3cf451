"""Inspection of a process of this machine that does not answer: lines of a report."""

from __future__ import annotations

from hpcsgd.diagnostics import procfs
from hpcsgd.diagnostics.activity import ProcessView
from hpcsgd.diagnostics.stack_dump import summarize

_MOST_CHILDREN = 2  # whose stacks are printed


def inspect(
    pid: int, view: ProcessView | None, *, stacks: bool, silent: bool, killed_before: int
) -> list[str]:
    """Return lines: the state of a process and its cause, its memory, its children, and stacks.

    Parameters
    ----------
    pid
        The process.
    view
        Its record; None: it has none, and no stacks are read.
    stacks
        Whether to read its stacks, and those of its children.
    silent
        Whether it does not answer.
    killed_before
        Number of processes that the kernel had killed for lack of memory when the job began.
    """
    is_same = view is None or view.info.record_of(pid) is not None
    if not procfs.is_alive(pid) or not is_same:
        killed = procfs.killed_for_memory() - killed_before
        why = f"; the kernel has killed {killed} processes there for lack of memory" * (killed > 0)
        return [f"its process has ended or was killed{why}"]
    children = procfs.children(pid)
    held = ", in native code that holds Python's lock" * (silent and procfs.can_run(pid))
    lines = [f"it {procfs.condition(pid)}{held}", procfs.memory(pid)]
    lines += procfs.list_of_children(children)
    if view is None or not stacks:
        return lines
    for process in filter(procfs.can_run, [pid, *children[:_MOST_CHILDREN]]):
        lines += summarize(view.stacks(process), "" if process == pid else f" of child {process}")
    return lines
