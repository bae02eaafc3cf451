"""What the kernel knows of a process of this machine: its state, its memory, its children."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_SAMPLE = 0.2  # seconds
_BUSY = 0.1  # of a core: others may be in want of it
_SHORT = 0.1  # of the memory that there is
_GIB = 2**30
_MOST = 8  # children that are listed
_CONTROL = Path("/sys/fs/cgroup")


def signals(pid: int, *masks: str) -> set[int]:
    """The signals in masks such as SigCgt, those that the process has handlers for."""
    status = _status(pid)
    bits = [int(status.get(mask, "0"), 16) for mask in masks]
    return {number for number in range(1, 65) if any(mask >> (number - 1) & 1 for mask in bits)}


def is_alive(pid: int) -> bool:
    """Whether it can still do something."""
    return _status(pid).get("State", "Z")[0] not in "ZX"


def can_run(pid: int) -> bool:
    """Whether it heeds signals now."""
    return _status(pid).get("State", "Z")[0] in "RS"


def condition(pid: int) -> str:
    """A clause: what it is doing, as far as that can be seen from outside, and what would help."""
    state = _status(pid).get("State", "Z")[0]
    if state == "T":
        return f"is stopped (SIGSTOP): `kill -CONT {pid}` there lets it go on"
    if state == "t":
        return "is stopped by a debugger"
    if state in "ZX":
        return "is gone: it has ended or was killed"
    if state == "D":
        where = _text(f"/proc/{pid}/wchan")
        return f"is held by the kernel, for a disk, a network file system, or memory ({where})"
    share = load([pid])[pid]
    return f"computes ({share:.0%} of a core)" if share > _BUSY else "sleeps"


def load(pids: list[int]) -> dict[int, float]:
    """How many cores each has used in the last fifth of a second."""
    before = {pid: _ticks(pid) for pid in pids}
    time.sleep(_SAMPLE)
    return {pid: (_ticks(pid) - before[pid]) / _TICKS / _SAMPLE for pid in pids}


def children(pid: int) -> list[int]:
    """All processes that it has started, and these in turn, oldest first."""
    started = defaultdict(list)
    for folder in Path("/proc").glob("[0-9]*"):
        started[int(_status(int(folder.name)).get("PPid", "0"))].append(int(folder.name))
    return sorted(_below(started, pid))


def _below(started: dict[int, list[int]], pid: int) -> Iterator[int]:
    for child in started.get(pid, []):
        yield child
        yield from _below(started, child)


def list_of_children(pids: list[int]) -> list[str]:
    """A line each: id, name, what it is doing."""
    some = pids[:_MOST]
    lines = [f"child {pid} ({_status(pid).get('Name', 'gone')}) {condition(pid)}" for pid in some]
    return lines + [f"and {len(pids) - _MOST} children more"] * (len(pids) > _MOST)


def memory(pid: int) -> str:
    """One line: what it has, what the machine and its control group have left, and whether that is short."""
    status, machine = _status(pid), _fields("/proc/meminfo")
    own, swapped = _kib(status, "VmRSS"), _kib(status, "VmSwap")
    free, total = _kib(machine, "MemAvailable"), _kib(machine, "MemTotal")
    limit, used = _control_group(pid)
    short = free < _SHORT * total or used > (1 - _SHORT) * limit or swapped > _SHORT * (own + swapped)
    text = "short of memory: " * short + f"it has {own / _GIB:.2f} GiB"
    text += f" and {swapped / _GIB:.2f} GiB swapped" * (swapped > 0)
    text += f"; {free / _GIB:.1f} of {total / _GIB:.1f} GiB are free there"
    if used > (1 - _SHORT) * limit:
        text += f"; its control group uses {used / _GIB:.2f} of {limit / _GIB:.2f} GiB"
    return text


def killed_for_memory() -> int:
    """How many processes of this machine the kernel has killed for lack of memory since it started."""
    return int(_fields("/proc/vmstat", " ").get("oom_kill", "0"))


def _control_group(pid: int) -> tuple[float, float]:
    """Limit and use, in bytes, of the tightest control group that it is in; infinity where none is."""
    groups = [(float("inf"), 0.0)]
    for line in _text(f"/proc/{pid}/cgroup").splitlines():
        _, kind, path = line.split(":", 2)
        if kind not in ("", "memory"):
            continue
        top = _CONTROL / kind
        names = ("limit_in_bytes", "usage_in_bytes") if kind else ("max", "current")
        for folder in [top / path.lstrip("/"), *(top / path.lstrip("/")).parents]:
            limit, used = (_text(str(folder / f"memory.{name}")).strip() for name in names)
            if folder.is_relative_to(top) and limit.isdigit() and used.isdigit():
                # Cached files go when memory is needed.
                cached = int(_fields(f"{folder}/memory.stat", " ").get("inactive_file", "0"))
                groups.append((float(limit), float(used) - cached))
    return min(groups, key=lambda group: group[0] - group[1])


def _status(pid: int) -> dict[str, str]:
    return _fields(f"/proc/{pid}/status")


def _ticks(pid: int) -> int:
    # The name in parentheses may hold anything.
    words = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(words[11]) + int(words[12]) if words else 0


def _kib(fields: dict[str, str], name: str) -> float:
    return 1024.0 * int(re.sub(r"\D", "", fields.get(name, "")) or 0)


def _fields(path: str, separator: str = ":") -> dict[str, str]:
    pairs = (line.partition(separator) for line in _text(path).splitlines())
    return {name: value.strip() for name, _, value in pairs}


def _text(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace")
    return ""
