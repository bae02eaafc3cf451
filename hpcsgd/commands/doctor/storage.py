"""The folder that runs go to: is it one for all nodes, and is a file replaced at once."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from hpcsgd.commands.doctor.check import Check, Facts, Finding, Ranks, name_of
from hpcsgd.commands.doctor.ranks import Job

_VERSIONS, _BYTES = 20, 8192
_PAUSE = 0.005  # seconds between two versions, and between two looks
_PATIENCE = 3.0  # seconds until a file that is not there is taken for not shared
_LATE = 1.0
_SMALL = 10**9  # bytes


def gather(job: Job) -> Facts:
    folder = job.out.absolute()
    made = job.rank == 0 and not folder.exists()
    # A dot: `hpcsgd report runs/*` must not take it for a run.
    name = job.same(f".doctor-{uuid.uuid4().hex}")
    facts: Facts = {"folder": str(folder), "write problem": "", "seen": None, "torn": 0}
    try:
        if job.rank == 0:
            facts |= _prepare(folder / name)
        job.barrier()
        if job.rank == 0:
            _write(folder / name)
        elif job.members.index(job.rank) < 2:
            facts |= _look(folder / name)
        job.barrier()
    finally:
        if job.rank == 0:
            _remove(folder, name, made)
    return facts


def _prepare(path: Path) -> Facts:
    """Write the first version, with its time to reach the disk."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        _replace(path, 0, sync=True)
        return {"fsync": time.monotonic() - started, "free": shutil.disk_usage(path.parent).free}
    except OSError as error:
        return {"write problem": str(error)}


def _write(path: Path) -> None:
    if path.exists():
        for version in range(1, _VERSIONS):
            _replace(path, version, sync=False)
            time.sleep(_PAUSE)


def _replace(path: Path, version: int, *, sync: bool) -> None:
    new = path.with_name(path.name + ".tmp")
    with new.open("wb") as file:
        file.write(bytes([version]) * _BYTES)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    new.replace(path)


def _look(path: Path) -> Facts:
    """Read until the last version is there: each time a whole one, once there is any."""
    started, torn, there = time.monotonic(), 0, False
    while time.monotonic() - started < _PATIENCE:
        try:
            content = path.read_bytes()
        except OSError:
            torn += there
        else:
            there = True
            if len(content) != _BYTES or content != content[:1] * _BYTES:
                torn += 1
            elif content[0] == _VERSIONS - 1:
                writing = (_VERSIONS - 1) * _PAUSE
                return {"seen": max(0.0, time.monotonic() - started - writing), "torn": torn}
        time.sleep(_PAUSE)
    return {"seen": _PATIENCE if there else -1.0, "torn": torn}


def _remove(folder: Path, name: str, made: bool) -> None:
    for left in (name, name + ".tmp"):
        (folder / left).unlink(missing_ok=True)
    if made and folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def show(ranks: Ranks) -> Iterator[str]:
    first = ranks[0]
    if first["write problem"]:
        yield f"{first['folder']}: {first['write problem']}"
        return
    text = f"{first['folder']}: {first['free'] / 1e9:.1f} GB free, fsync {1e3 * first['fsync']:.1f} ms"
    looked = [facts["seen"] for facts in ranks if facts["seen"] is not None]
    if looked and min(looked) >= 0:
        text += f"; a new file is seen by {len(looked)} of the other ranks after {max(0.0, *looked):.2f} s"
        text += ", replaced at once" if not any(facts["torn"] for facts in ranks) else ", not always whole"
    yield text


def judge(ranks: Ranks) -> Iterator[Finding]:
    first = ranks[0]
    elsewhere = "give --out a folder of the parallel file system, for this and for hpcsgd train"
    if first["write problem"]:
        yield Finding("error", f"runs cannot be written: {first['write problem']}", elsewhere)
        return
    if first["free"] < _SMALL:
        yield Finding(
            "warning",
            f"{first['folder']} has {first['free'] / 1e6:,.0f} MB free: checkpoints will not fit",
            elsewhere,
        )
    seen = {rank: facts["seen"] for rank, facts in enumerate(ranks) if facts["seen"] is not None}
    apart = [rank for rank, after in seen.items() if after < 0]
    if apart:
        yield Finding(
            "error",
            f"{first['folder']} is not one folder for all nodes: what rank 0 writes is not seen by "
            f"{name_of(apart, ranks)}, so runs there cannot be resumed",
            elsewhere,
        )
    late = [rank for rank, after in seen.items() if after > _LATE]
    if late:
        yield Finding(
            "warning",
            f"what rank 0 writes is seen more than {_LATE:g} s later by {name_of(late, ranks)}",
            "mount it with shorter caching of attributes (NFS: actimeo=1), or another --out",
        )
    torn = [rank for rank, facts in enumerate(ranks) if facts["torn"]]
    if torn:
        yield Finding(
            "warning",
            f"{name_of(torn, ranks)} saw a file missing or half written while it was replaced",
            elsewhere,
        )


CHECK = Check("storage", gather, show, judge)
