"""The parts of a trace, one file a rank, and the merge of them into `trace.json`."""

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
#: "all-reduce of bucket 3 at step 17" is shown as "all-reduce", for viewers colour events by their names.
_OPERATION = re.compile(r"(.*?)(?: of bucket (\d+))?(?: at step (\d+))?")


def part_of(folder: Path, rank: int) -> Path:
    """Return the path of a rank's part of the trace in a folder."""
    return folder / _PARTS / f"rank-{rank:04d}.jsonl"


def clear(folder: Path) -> None:
    """Prepare a folder for a new trace; an earlier one, merged or not, is renamed to `trace-1.json`, …"""
    with suppress(HpcsgdError):
        earlier = merge(folder)
        names = (folder / f"trace-{number}.json" for number in count(1))
        earlier.rename(next(name for name in names if not name.exists()))
    (folder / _PARTS).mkdir(parents=True, exist_ok=True)
    for part in _parts(folder):
        part.unlink()


def merge(folder: Path) -> Path:
    """Merge the parts in a folder into one file, on the clock of rank 0, and remove them.

    Parts of ranks that were killed are included up to their last whole line. Needs memory for one line of one
    part.

    Returns
    -------
    Path
        `trace.json` in the folder: Trace Event Format, for ui.perfetto.dev and chrome://tracing.

    Raises
    ------
    HpcsgdError
        If there are neither parts nor a merged trace.
    """
    target = folder / FILE
    parts = [RankTrace(path) for path in _parts(folder)]
    if not parts:
        if target.exists():
            return target
        raise HpcsgdError(
            f"there is no trace in {folder}",
            do="make one by `hpcsgd train --trace`, or with HPCSGD_TRACE=FOLDER and any script",
        )
    start = min((part.start for part in parts), default=0.0)
    partial = target.with_suffix(".partial")
    with partial.open("w") as file:
        file.write('{"displayTimeUnit": "ms", "otherData": ')
        file.write(json.dumps({"ranks": [part.summary() for part in parts]}))
        file.write(', "traceEvents": [')
        separator = "\n"
        for part in parts:
            for event in part.events(start):
                file.write(separator + json.dumps(event))
                separator = ",\n"
        file.write("\n]}\n")
    partial.replace(target)
    for part in parts:
        part.path.unlink()
    (folder / _PARTS).rmdir()
    return target


def _parts(folder: Path) -> list[Path]:
    return sorted((folder / _PARTS).glob("rank-*.jsonl"))


class RankTrace:
    """The events of one rank, read from its file.

    Attributes
    ----------
    header, footer
        The records at the beginning and, unless the rank was killed, at the end; else the header twice.

    Raises
    ------
    HpcsgdError
        If the file has no header.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        records = [line for line in self._lines() if isinstance(line, dict)]
        if not records or "offset" not in records[0]:
            raise HpcsgdError(
                f"{path} is not a part of a trace", do="remove the file, and run `hpcsgd trace` again"
            )
        self.header, self.footer = records[0], records[-1]

    @property
    def start(self) -> float:
        """The start of the trace, in seconds on the clock of rank 0."""
        return self._on_rank_0(self.header["at"])

    def summary(self) -> dict[str, Any]:
        """Return the rank, its clock and its totals, for `otherData`."""
        header, footer = self.header, self.footer
        return {
            "rank": header["rank"],
            "host": header["host"],
            "clock_error_us": round(1e6 * max(header["error"], footer["error"]), 3),
            "clock_drift_us": round(1e6 * (footer["offset"] - header["offset"]), 3),
            "complete": footer is not header,
            "events_left_out": footer.get("left_out", 0),
            "bytes_sent_elsewhere": footer.get("sent", 0),
            "bytes_shared_elsewhere": footer.get("shared", 0),
        }

    def events(self, start: float) -> Iterator[dict[str, Any]]:
        """Generate the events in the Trace Event Format, in microseconds since `start`."""
        rank = self.header["rank"]
        yield _metadata("process_name", rank, 0, f"rank {rank}, {self.header['host']}")
        yield {"name": "process_sort_index", "ph": "M", "pid": rank, "tid": 0, "args": {"sort_index": rank}}
        for thread, name in enumerate(_THREADS):
            # With the rank, because viewers show rows far from the name of their process.
            yield _metadata("thread_name", rank, thread, f"rank {rank}: {name}")
        for line in self._lines():
            if isinstance(line, list):
                yield from (self._event(rank, start, *event) for event in line)

    def _event(
        self,
        rank: int,
        start: float,
        thread: int,
        kind: str,
        operation: str,
        began: float,
        ended: float,
        *counts: int,
    ) -> dict[str, Any]:
        found = _OPERATION.fullmatch(operation)
        name, bucket, step = found.groups() if found else (operation, None, None)
        args = {"step": counts[0] if step is None else int(step)}
        if bucket is not None:
            args["bucket"] = int(bucket)
        if len(counts) > 1:
            args |= {"bytes_sent": counts[1], "bytes_shared": counts[2]}
        times = (1e6 * (self._on_rank_0(time) - start) for time in (began, ended))
        first, last = (round(time, 3) for time in times)
        event = {"name": name, "cat": kind, "ph": "X", "pid": rank, "tid": thread, "ts": first}
        return event | {"dur": round(last - first, 3), "args": args}

    def _on_rank_0(self, time: float) -> float:
        header, footer = self.header, self.footer
        share = (time - header["at"]) / (footer["at"] - header["at"]) if footer is not header else 0.0
        return float(time + header["offset"] + share * (footer["offset"] - header["offset"]))

    def _lines(self) -> Iterator[Any]:
        """The complete lines; the last line of a killed rank may be cut off."""
        with self.path.open() as file:
            for line in file:
                if line.endswith("\n"):
                    yield json.loads(line)


def _metadata(kind: str, rank: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": rank, "tid": thread, "args": {"name": name}}
