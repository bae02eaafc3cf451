"""The parts of a trace, one a rank, and the file that they are merged into."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from hpcsgd.errors import HpcsgdError

FILE = "trace.json"
_PARTS = "trace-parts"
_THREADS = ("compute", "communication")
#: "all-reduce of bucket 3 at step 17": the same work has the same name, and a colour of its own.
_WHAT = re.compile(r"(.*?)(?: of bucket (\d+))?(?: at step (\d+))?")


def part_of(folder: Path, rank: int) -> Path:
    """Where a rank writes its part of the trace in a folder."""
    return folder / _PARTS / f"rank-{rank:04d}.jsonl"


def clear(folder: Path) -> None:
    """Make room for a new trace; an earlier one, even if there are parts only, stays as `trace-1.json`, …"""
    with suppress(HpcsgdError):
        earlier = merge(folder)
        names = (folder / f"trace-{number}.json" for number in count(1))
        earlier.rename(next(name for name in names if not name.exists()))
    (folder / _PARTS).mkdir(parents=True, exist_ok=True)
    for part in _parts(folder):
        part.unlink()


def merge(folder: Path) -> Path:
    """Make one file of the parts in a folder, on the clock of rank 0, and remove them.

    Parts of ranks that were killed are good as far as they go. Memory for one line of one part is enough.

    Returns
    -------
    Path
        `trace.json` in the folder: Trace Event Format, for ui.perfetto.dev and chrome://tracing.

    Raises
    ------
    HpcsgdError
        There are no parts, and no trace either.
    """
    target = folder / FILE
    parts = [Part(path) for path in _parts(folder)]
    if not parts:
        if target.exists():
            return target
        raise HpcsgdError(
            f"there is no trace in {folder}",
            do="make one by `hpcsgd train --trace`, or with HPCSGD_TRACE=FOLDER and any script",
        )
    start = min((part.begins for part in parts), default=0.0)
    aside = target.with_suffix(".partial")
    with aside.open("w") as file:
        file.write('{"displayTimeUnit": "ms", "otherData": ')
        file.write(json.dumps({"ranks": [part.facts() for part in parts]}))
        file.write(', "traceEvents": [')
        comma = "\n"
        for part in parts:
            for event in part.events(start):
                file.write(comma + json.dumps(event))
                comma = ",\n"
        file.write("\n]}\n")
    aside.replace(target)
    for part in parts:
        part.path.unlink()
    (folder / _PARTS).rmdir()
    return target


def _parts(folder: Path) -> list[Path]:
    return sorted((folder / _PARTS).glob("rank-*.jsonl"))


class Part:
    """What one rank has written.

    Parameters
    ----------
    path
        Its file.

    Raises
    ------
    HpcsgdError
        The file does not begin as one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        notes = [note for note in self._lines() if isinstance(note, dict)]
        if not notes or "offset" not in notes[0]:
            raise HpcsgdError(f"{path} is not a part of a trace", do="remove it, and try again")
        #: What was noted at the beginning and, unless the rank was killed, at the end.
        self.head, self.tail = notes[0], notes[-1]

    @property
    def begins(self) -> float:
        """The beginning, on the clock of rank 0."""
        return self._on_rank_0(self.head["at"])

    def facts(self) -> dict[str, Any]:
        """About the rank and its clock, for `otherData`."""
        head, tail = self.head, self.tail
        return {
            "rank": head["rank"],
            "host": head["host"],
            "clock_error_us": round(1e6 * max(head["error"], tail["error"]), 3),
            "clock_drift_us": round(1e6 * (tail["offset"] - head["offset"]), 3),
            "complete": tail is not head,
            "events_left_out": tail.get("left_out", 0),
            "bytes_sent_elsewhere": tail.get("sent", 0),
            "bytes_shared_elsewhere": tail.get("shared", 0),
        }

    def events(self, start: float) -> Iterator[dict[str, Any]]:
        """Those of the Trace Event Format, in microseconds since `start`."""
        rank = self.head["rank"]
        yield _named("process_name", rank, 0, f"rank {rank}, {self.head['host']}")
        yield {"name": "process_sort_index", "ph": "M", "pid": rank, "tid": 0, "args": {"sort_index": rank}}
        for lane, thread in enumerate(_THREADS):
            yield _named("thread_name", rank, lane, thread)
        for line in self._lines():
            if isinstance(line, list):
                yield from (self._event(rank, start, *event) for event in line)

    def _event(
        self,
        rank: int,
        start: float,
        lane: int,
        kind: str,
        what: str,
        began: float,
        ended: float,
        *counts: int,
    ) -> dict[str, Any]:
        found = _WHAT.fullmatch(what)
        name, bucket, step = found.groups() if found else (what, None, None)
        args = {"step": counts[0] if step is None else int(step)}
        if bucket is not None:
            args["bucket"] = int(bucket)
        if len(counts) > 1:
            args |= {"bytes_sent": counts[1], "bytes_shared": counts[2]}
        times = (1e6 * (self._on_rank_0(time) - start) for time in (began, ended))
        first, last = (round(time, 3) for time in times)
        event = {"name": name, "cat": kind, "ph": "X", "pid": rank, "tid": lane, "ts": first}
        return event | {"dur": round(last - first, 3), "args": args}

    def _on_rank_0(self, time: float) -> float:
        head, tail = self.head, self.tail
        share = (time - head["at"]) / (tail["at"] - head["at"]) if tail is not head else 0.0
        return float(time + head["offset"] + share * (tail["offset"] - head["offset"]))

    def _lines(self) -> Iterator[Any]:
        """The whole lines; a killed rank may have left half of one."""
        with self.path.open() as file:
            for line in file:
                if line.endswith("\n"):
                    yield json.loads(line)


def _named(what: str, rank: int, lane: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": rank, "tid": lane, "args": {"name": name}}
