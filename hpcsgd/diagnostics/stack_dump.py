"""What faulthandler writes of a process's threads, in a few lines."""

from __future__ import annotations

import re

_HEAD = re.compile(r"(Current thread|Thread) 0x\w+")
_FRAME = re.compile(r'  File ".*", line \d+ in ')
_BEGINNING = re.compile(r'/threading.py", line \d+ in (_bootstrap|_bootstrap_inner|run)$')
_COMMUNICATES = re.compile(r'hpcsgd/mpi/progress.py", line \d+ in _loop$')
_IDLE = re.compile(r'hpcsgd/mpi/progress.py", line \d+ in _next$')
_STANDARD = re.compile(r"/lib/python3[^/]*/(?!site-packages/)")
_MOST = {"main": 16, "communication": 4}
_OTHERS = 3  # frames of any other thread
_CHILDS = 6  # of a child's main thread


def short(text: str, whose: str = "") -> list[str]:
    """The threads by name, the main one first, each with its latest calls, the last one last."""
    threads: list[list[str]] = []
    for line in text.splitlines():
        if _HEAD.match(line):
            threads.append([])
        elif threads and _FRAME.match(line) and not _BEGINNING.search(line):
            threads[-1].append(line)
    lines = []
    # The interpreter lists the thread last that it began with.
    for number, frames in enumerate(reversed(threads)):
        if number > 0 and all(map(_STANDARD.search, frames)):
            continue
        communicates = any(map(_COMMUNICATES.search, frames))
        if communicates and _IDLE.search(frames[0]):
            continue
        name = "main" if number == 0 else "communication" if communicates else "another"
        most = _CHILDS if name == "main" and whose else _MOST.get(name, _OTHERS)
        lines += [f"{name} thread{whose}:", *reversed(frames[:most])]
    return lines
