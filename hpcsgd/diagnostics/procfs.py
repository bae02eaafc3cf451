"""State, memory and children of a process of this machine, read from /proc."""

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
_BUSY = 0.1  # of a core; above, the process counts as computing
_SHORT = 0.1  # of the total memory; below, it is short
_GIB = 2**30
_MOST_CHILDREN = 8  # that are listed
_CGROUPS = Path("/sys/fs/cgroup")


def signals(pid: int, *masks: str) -> set[int]:
    """Return the signals in masks of a process, such as SigCgt: the signals that it handles."""
    status = _status(pid)
    bits = [int(status.get(mask, "0"), 16) for mask in masks]
    return {number for number in range(1, 65) if any(mask >> (number - 1) & 1 for mask in bits)}


def is_alive(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    return _status(pid).get("State", "Z")[0] not in "ZX"


def started(pid: int) -> int:
    """Return the start of a process, in clock ticks since that of the machine; 0: unknown."""
    words = _stat(pid)
    return int(words[19]) if words else 0


def can_run(pid: int) -> bool:
    """Return whether a process can handle signals now."""
    return _status(pid).get("State", "Z")[0] in "RS"


def condition(pid: int) -> str:
    """Return a clause: the state of a process, its cause, and the remedy where there is one."""
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


def load(pids: list[int], seconds: float = _SAMPLE) -> dict[int, float]:
    """Return the number of cores that each process uses, measured during a fifth of a second."""
    before = {pid: _ticks(pid) for pid in pids}
    time.sleep(seconds)
    return {pid: (_ticks(pid) - before[pid]) / _TICKS / seconds for pid in pids}


def busy_seconds() -> dict[int, float]:
    """Return the seconds that each core of this machine has been busy for any process, or another machine."""
    found = {}
    for line in _text("/proc/stat").splitlines():
        if core := re.match(r"cpu(\d+) ", line):
            user, nice, system, _, _, *interrupts_and_stolen = map(int, line.split()[1:9])
            found[int(core[1])] = (user + nice + system + sum(interrupts_and_stolen)) / _TICKS
    return found


def processes() -> list[int]:
    """Return the processes of this machine that are visible."""
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]


def name(pid: int) -> str:
    """Return the name of a process's program."""
    return _status(pid).get("Name", "gone")


def parent(pid: int) -> int:
    """Return the parent of a process; 0 for one that has none, or does not exist."""
    return int(_status(pid).get("PPid", "0"))


def environment(pid: int) -> dict[str, str]:
    """Return the variables with which a process was started; none where they are not readable."""
    pairs = (line.partition("=") for line in _text(f"/proc/{pid}/environ").split("\0"))
    return {name: value for name, _, value in pairs if name}


def children(pid: int) -> list[int]:
    """Return all descendants of a process, oldest first."""
    started = defaultdict(list)
    for process in processes():
        started[parent(process)].append(process)
    return sorted(_descendants(started, pid))


def _descendants(started: dict[int, list[int]], pid: int) -> Iterator[int]:
    for child in started.get(pid, []):
        yield child
        yield from _descendants(started, child)


def list_of_children(pids: list[int]) -> list[str]:
    """Return a line for each process: id, name, state."""
    some = pids[:_MOST_CHILDREN]
    lines = [f"child {pid} ({name(pid)}) {condition(pid)}" for pid in some]
    return lines + [f"and {len(pids) - _MOST_CHILDREN} children more"] * (len(pids) > _MOST_CHILDREN)


def memory(pid: int) -> str:
    """Return one line: the memory of a process, its machine and its control group, and if it is short."""
    status, machine = _status(pid), _fields("/proc/meminfo")
    resident, swapped = _kib(status, "VmRSS"), _kib(status, "VmSwap")
    free, total = _kib(machine, "MemAvailable"), _kib(machine, "MemTotal")
    limit, used = _control_group(pid)
    short = free < _SHORT * total or used > (1 - _SHORT) * limit or swapped > _SHORT * (resident + swapped)
    text = "short of memory: " * short + f"it has {resident / _GIB:.2f} GiB"
    text += f" and {swapped / _GIB:.2f} GiB swapped" * (swapped > 0)
    text += f"; {free / _GIB:.1f} of {total / _GIB:.1f} GiB are free there"
    if used > (1 - _SHORT) * limit:
        text += f"; its control group uses {used / _GIB:.2f} of {limit / _GIB:.2f} GiB"
    return text


def mappings(folder: str) -> tuple[dict[tuple[int, int], set[int]], set[int]]:
    """Return the processes that map the files of a folder, and the users whose processes are not visible.

    Parameters
    ----------
    folder
        The folder; files that are mapped under this name elsewhere, as in a container, have other numbers.

    Returns
    -------
    tuple
        Process ids by (device, inode), and user ids.
    """
    found: dict[tuple[int, int], set[int]] = defaultdict(set)
    hidden = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            maps = (process / "maps").read_text(errors="replace")
        except PermissionError:
            if process.name != "1":  # init, which maps none of them
                with contextlib.suppress(OSError):
                    hidden.add(process.stat().st_uid)
            continue
        except OSError:  # it has ended
            continue
        for line in maps.splitlines():
            if f" {folder}/" in line:
                _, _, _, device, inode, _ = line.split(maxsplit=5)
                major, minor = (int(number, 16) for number in device.split(":"))
                found[os.makedev(major, minor), int(inode)].add(int(process.name))
    return found, hidden


def killed_for_memory() -> int:
    """Return the number of processes of this machine that the kernel has killed for lack of memory."""
    return int(_fields("/proc/vmstat", " ").get("oom_kill", "0"))


def _control_group(pid: int) -> tuple[float, float]:
    """Limit and usage, in bytes, of the control group with the least left; infinity and 0 without a limit."""
    groups = [(float("inf"), 0.0)]
    for line in _text(f"/proc/{pid}/cgroup").splitlines():
        _, kind, path = line.split(":", 2)
        if kind not in ("", "memory"):
            continue
        top = _CGROUPS / kind
        names = ("limit_in_bytes", "usage_in_bytes") if kind else ("max", "current")
        for folder in [top / path.lstrip("/"), *(top / path.lstrip("/")).parents]:
            limit, used = (_text(str(folder / f"memory.{name}")).strip() for name in names)
            if folder.is_relative_to(top) and limit.isdigit() and used.isdigit():
                # The file cache is reclaimed when memory is needed.
                cached = int(_fields(f"{folder}/memory.stat", " ").get("inactive_file", "0"))
                groups.append((float(limit), float(used) - cached))
    return min(groups, key=lambda group: group[0] - group[1])


def _status(pid: int) -> dict[str, str]:
    return _fields(f"/proc/{pid}/status")


def _ticks(pid: int) -> int:
    words = _stat(pid)
    return int(words[11]) + int(words[12]) if words else 0


def _stat(pid: int) -> list[str]:
    # The name, in parentheses, may contain spaces and parentheses.
    return _text(f"/proc/{pid}/stat").rpartition(")")[2].split()


def _kib(fields: dict[str, str], name: str) -> float:
    return 1024.0 * int(re.sub(r"\D", "", fields.get(name, "")) or 0)


def _fields(path: str, separator: str = ":") -> dict[str, str]:
    pairs = (line.partition(separator) for line in _text(path).splitlines())
    return {name: value.strip() for name, _, value in pairs}


def _text(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace")
    return ""
