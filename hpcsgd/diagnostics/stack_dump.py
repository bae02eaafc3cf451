"""Summaries of faulthandler's stack dumps: a few lines a thread."""

from __future__ import annotations

import re

_THREAD = re.compile(r"(Current thread|Thread) 0x\w+")
_FRAME = re.compile(r'  File ".*", line \d+ in ')
_BOOTSTRAP = re.compile(r'/threading.py", line \d+ in (_bootstrap|_bootstrap_inner|run)$')
_COMMUNICATION = re.compile(r'hpcsgd/mpi/progress.py", line \d+ in _execute_queue$')
_IDLE = re.compile(r'hpcsgd/mpi/progress.py", line \d+ in (_next_work|_poll|_advance)$')
#: The innermost frames of the thread that answers a request for the stacks.
_ANSWER = re.compile(
    r'hpcsgd/(mpi/(stall_detector|control_messages)|diagnostics/(activity|inspection))\.py"'
    r'|hpcsgd/mpi/(runtime|progress)\.py", line \d+ in (_check|_check_or_fail)$'
)
_STANDARD_LIBRARY = re.compile(r"/lib/python3[^/]*/(?!site-packages/)")
_FRAMES = {"main": 16, "communication": 4}
_FRAMES_OF_OTHERS = 3
_FRAMES_OF_CHILD = 6  # of a child's main thread


def summarize(text: str, owner: str = "") -> list[str]:
    """Return the threads of a dump by name, the main one first, each with its innermost frames, latest last.

    Idle communication threads, threads inside the standard library only, and the frames that answer the
    request for this dump are omitted.

    Parameters
    ----------
    text
        Output of faulthandler.
    owner
        A suffix for the names: " of child 17" for a child process, whose main thread is listed more briefly.
    """
    threads: list[list[str]] = []
    for line in text.splitlines():
        if _THREAD.match(line):
            threads.append([])
        elif threads and _FRAME.match(line) and not (_BOOTSTRAP.search(line) or _ANSWER.search(line)):
            threads[-1].append(line)
    lines = []
    # The interpreter lists the main thread last.
    for number, frames in enumerate(reversed(threads)):
        if number > 0 and all(map(_STANDARD_LIBRARY.search, frames)):
            continue
        communicates = any(map(_COMMUNICATION.search, frames))
        if communicates and _IDLE.search(frames[0]):
            continue
        name = "main" if number == 0 else "communication" if communicates else "another"
        most = _FRAMES_OF_CHILD if name == "main" and owner else _FRAMES.get(name, _FRAMES_OF_OTHERS)
        lines += [f"{name} thread{owner}:", *reversed(frames[:most])]
    return lines
