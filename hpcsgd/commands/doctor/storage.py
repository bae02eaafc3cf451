"""Checks that the folder of the runs is shared by all nodes, and that files in it are replaced atomically."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from hpcsgd.commands.doctor.check import Check, Facts, FactsByRank, Finding, name_ranks
from hpcsgd.commands.doctor.ranks import ExaminedJob

_VERSIONS, _BYTES = 20, 8192
_PAUSE = 0.005  # seconds between two writes, and between two reads
_TIMEOUT = 3.0  # seconds after which a file that is not visible counts as not shared
_LATE = 1.0
_SMALL = 10**9  # bytes


def collect(job: ExaminedJob) -> Facts:
    folder = job.out.absolute()
    made = job.rank == 0 and not folder.exists()
    # The dot hides it from `hpcsgd report runs/*`.
    name = job.broadcast(f".doctor-{uuid.uuid4().hex}")
    facts: Facts = {"folder": str(folder), "write problem": "", "seen": None, "torn": 0}
    try:
        if job.rank == 0:
            facts |= _prepare(folder / name)
        job.barrier()
        if job.rank == 0:
            _write(folder / name)
        elif job.members.index(job.rank) < 2:
            facts |= _watch(folder / name)
        job.barrier()
    finally:
        if job.rank == 0:
            _remove(folder, name, made)
    return facts


def _prepare(path: Path) -> Facts:
    """Write the first version, and measure the time of fsync."""
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


def _watch(path: Path) -> Facts:
    """Read until the last version is visible; counts reads of a partial file, or of none after the first."""
    started, torn, visible = time.monotonic(), 0, False
    while time.monotonic() - started < _TIMEOUT:
        try:
            content = path.read_bytes()
        except OSError:
            torn += visible
        else:
            visible = True
            if len(content) != _BYTES or content != content[:1] * _BYTES:
                torn += 1
            elif content[0] == _VERSIONS - 1:
                writing = (_VERSIONS - 1) * _PAUSE
                return {"seen": max(0.0, time.monotonic() - started - writing), "torn": torn}
        time.sleep(_PAUSE)
    return {"seen": _TIMEOUT if visible else -1.0, "torn": torn}


def _remove(folder: Path, name: str, made: bool) -> None:
    for file in (name, name + ".tmp"):
        (folder / file).unlink(missing_ok=True)
    if made and folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def describe(ranks: FactsByRank) -> Iterator[str]:
    first = ranks[0]
    if first["write problem"]:
        yield f"{first['folder']}: {first['write problem']}"
        return
    text = f"{first['folder']}: {first['free'] / 1e9:.1f} GB free, fsync {1e3 * first['fsync']:.1f} ms"
    watched = [facts["seen"] for facts in ranks if facts["seen"] is not None]
    if watched and min(watched) >= 0:
        text += f"; a new file is visible on {len(watched)} other rank{'s' * (len(watched) > 1)} after "
        text += f"{max(0.0, *watched):.2f} s, "
        text += (
            "replaced atomically" if not any(facts["torn"] for facts in ranks) else "not replaced atomically"
        )
    yield text


def diagnose(ranks: FactsByRank) -> Iterator[Finding]:
    first = ranks[0]
    elsewhere = "give --out a folder on the parallel file system, here and for hpcsgd train"
    if first["write problem"]:
        yield Finding("error", f"rank 0 cannot write runs: {first['write problem']}", elsewhere)
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
            f"{first['folder']} is not shared by all nodes: files of rank 0 are not visible on "
            f"{name_ranks(apart, ranks)}, so runs there cannot be resumed",
            elsewhere,
        )
    late = [rank for rank, after in seen.items() if after > _LATE]
    if late:
        yield Finding(
            "warning",
            f"files of rank 0 are visible more than {_LATE:g} s later on {name_ranks(late, ranks)}",
            "mount the file system with shorter attribute caching (NFS: actimeo=1), or give another --out",
        )
    torn = [rank for rank, facts in enumerate(ranks) if facts["torn"]]
    if torn:
        yield Finding(
            "warning",
            f"replacing a file is not atomic: {name_ranks(torn, ranks)} found it missing or incomplete",
            elsewhere,
        )


CHECK = Check("storage", collect, describe, diagnose)
