"""Persistent state of a server: snapshots, and a write-ahead log of the updates since the last one.

An update is in the log before it is made, and so before any reply to its pushes. Replaying a log makes the
same updates with the same arithmetic. The log is written without fsync: it survives the end of the process by
any signal, but a crash of the machine may lose the last seconds.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcsgd.errors import HpcsgdError, os_errors
from hpcsgd.server.server import Server
from hpcsgd.server.session import Session
from hpcsgd.server.shard import INITIAL_PUSH, Push, Shard
from hpcsgd.server.update_rules import UpdateContext

_SIZES = struct.Struct("<IQ")  # bytes of the JSON and of the values
_MARK_BYTES = 4
# Writing to allocated blocks is several times faster: as much again as the log has, within these bounds.
_LEAST_ALLOCATED, _MOST_ALLOCATED = 2**20, 64 * 2**20
Record = dict[str, Any]


class LogFile:
    """Append-only file of records: JSON and the bytes of arrays.

    The JSON has a checksum; the arrays have none, for computing it would take longer than writing them. The
    mark at the end of a record is written last and shows that the record is complete.

    Parameters
    ----------
    path
        The file, which must not exist.

    Attributes
    ----------
    nbytes
        Length of the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self.nbytes = self._reserved = 0

    def append(self, record: Record, values: list[np.ndarray]) -> None:
        """Write a record; it survives this process once this returns."""
        text = json.dumps(record).encode()
        sizes = _SIZES.pack(len(text), sum(value.nbytes for value in values))
        mark = _checksum(sizes, text)
        do = "fix the cause and restart `hpcsgd serve`; acknowledged updates are kept"
        with os_errors("the update log cannot be written", do=do):
            self._write([mark, sizes, text, *values, mark])

    def _write(self, parts: Sequence[Any]) -> None:
        remaining = [memoryview(part).cast("B") for part in parts]
        end = self.nbytes + sum(map(len, remaining))
        if end > self._reserved:
            reserved = end + min(max(end, _LEAST_ALLOCATED), _MOST_ALLOCATED)
            os.posix_fallocate(self._file, self.nbytes, reserved - self.nbytes)
            self._reserved = reserved
        while self.nbytes < end:
            written = os.writev(self._file, remaining)
            self.nbytes += written
            while remaining and written >= len(remaining[0]):
                written -= len(remaining.pop(0))
            if remaining:
                remaining[0] = remaining[0][written:]

    def close(self) -> None:
        os.ftruncate(self._file, self.nbytes)
        os.close(self._file)


def read_log(path: Path) -> Iterator[tuple[Record, np.ndarray]]:
    """Yield the complete records of a log; an incomplete last one is skipped."""
    with path.open("rb") as file:
        while len(start := file.read(_MARK_BYTES + _SIZES.size)) == _MARK_BYTES + _SIZES.size:
            mark, sizes = start[:_MARK_BYTES], start[_MARK_BYTES:]
            size, length = _SIZES.unpack(sizes)
            text = file.read(size)
            if _checksum(sizes, text) != mark:
                return
            values = np.fromfile(file, np.uint8, length)
            if file.read(_MARK_BYTES) != mark:
                return
            yield json.loads(text), values


def _checksum(sizes: bytes, text: bytes) -> bytes:
    return zlib.crc32(text, zlib.crc32(sizes)).to_bytes(_MARK_BYTES, "little")


class UpdateLog:
    """Write-ahead log of a server, from which a restarted one continues.

    In its folder, ``log-00000003`` has the records since state 3.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log: LogFile | None = None
        self._server: Server | None = None
        self._recorded: Record = {}

    @property
    def nbytes(self) -> int:
        """Length of the current log file."""
        return 0 if self._log is None else self._log.nbytes

    def numbers(self) -> list[int]:
        """Numbers of the existing log files, oldest first."""
        return sorted(int(path.name[4:]) for path in self._folder.glob("log-????????"))

    def replay(self, server: Server, since: int) -> int:
        """Replay all records since state `since`; returns the number of updates."""
        updates = 0
        for number in self.numbers():
            if number >= since:
                for record, values in read_log(self._path(number)):
                    updates += _replay(server, record, values)
        return updates

    def start(self, server: Server, number: int) -> None:
        """Start the log file of the records since state `number`."""
        if self._log is not None:
            self._log.close()
        self._server, self._recorded = server, {}
        self._log = LogFile(self._path(number))
        self.record_sessions()

    def remove_before(self, before: int) -> None:
        """Remove the log files of states before `before`."""
        for number in self.numbers():
            if number < before:
                self._path(number).unlink()

    def record_sessions(self) -> None:
        """Write the contract and the sessions, if they have changed."""
        server = self._server
        assert self._log is not None and server is not None
        sessions = [session_record(session) for session in server.sessions.values()]
        record = {"contract": server.contract, "clients": sessions}
        changed = {name: value for name, value in record.items() if value != self._recorded.get(name)}
        if changed:
            self._log.append(changed, [])
            self._recorded = record

    def record_update(self, shard: Shard, pushes: list[Push], context: UpdateContext) -> None:
        """Write an update that is about to be made (an `aggregation.RecordUpdate`)."""
        assert self._log is not None and self._server is not None
        if self._server.contract is not self._recorded["contract"]:
            self.record_sessions()
        rows = [(p.client, p.number, p.weight, shard.clocks.get(p.client, 0), p.staleness) for p in pushes]
        record = {"shard": shard.index, "version": shard.version, "pushes": rows, "terms": context}
        self._log.append(record, [push.values for push in pushes])

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def _path(self, number: int) -> Path:
        return self._folder / f"log-{number:08d}"


def _replay(server: Server, record: Record, values: np.ndarray) -> int:
    _set_contract(server, record.get("contract"))
    for fields in record.get("clients", ()):
        _restore_session(server, fields)
    if "shard" not in record:
        return 0
    shard = server.shards[record["shard"]]
    if shard.version != record["version"]:
        raise HpcsgdError(
            "the update log does not continue the checkpoint",
            expected=f"update {shard.version} of shard {shard.index}",
            got=f"update {record['version']}",
            do="the folder is damaged: start the servers with another --checkpoint folder",
        )
    pushes = []
    # In a code sum the first push has the sum, and the others have no values.
    bodies, nothing = iter(values.reshape(-1, shard.nbytes)), np.empty(0, np.uint8)
    for name, number, weight, clock, *rest in record["pushes"]:
        body = next(bodies, nothing)
        if number == INITIAL_PUSH:
            shard.initialize(body)
            return 0
        session = _session(server, name)
        server.aggregator.subscribe(session, shard)
        session.paused, shard.clocks[name] = False, clock
        shard.dropped.discard(name)
        copied = session.buffer(shard)[: body.size]
        copied[:] = body
        (staleness,) = rest or (0,)  # older logs have none
        pushes.append(Push(name, number, weight, copied, staleness=staleness))
    shard.apply(pushes, UpdateContext(*record["terms"]))
    server.aggregator.count(pushes)
    if shard.codec is not None and shard.centre is not None:
        for push in pushes:
            shard.codec.replay_reply(push.client, shard.version, shard.centre)
    return 1


def session_record(session: Session) -> Record:
    """Name and state of a session, as they are stored."""
    return {
        "name": session.name,
        "has": sorted(session.subscribed),
        "waited_for": session.alive,
        "resting": session.paused,
        "done": session.done,
    }


def server_state(server: Server) -> dict[str, Any]:
    """Snapshot of a server's state between two messages, in memory of its own.

    An elastic server's state includes the last reply to each client: a push that is repeated because its
    reply was lost has been applied, and gets the same reply. That of others has the references of coded
    replies, so that clients go on with the bits that they would have had.
    """
    clients = []
    for session in server.sessions.values():
        replies = {
            index: torch.from_numpy(session.buffers[index].copy())
            for index, shard in server.shards.items()
            if index in session.buffers and not shard.rule.takes_gradients
        }
        counts = {"staleness": dict(session.staleness), "left_out": session.dropped}
        clients.append({**session_record(session), **counts, "answers": replies})
    codecs = {
        index: shard.codec
        for index, shard in server.shards.items()
        if shard.codec is not None and shard.rule.takes_gradients
    }
    return {
        "contract": json.dumps(server.contract),
        "shards": {index: shard.state_dict() for index, shard in server.shards.items()},
        "codes": {index: codec.state_dict() for index, codec in codecs.items()},
        "code_versions": {index: dict(codec.reference_versions) for index, codec in codecs.items()},
        "begun": server.steps_begun,
        "clients": clients,
        "staleness": dict(server.aggregator.staleness),
        "left_out": server.aggregator.dropped,
    }


def restore_server(server: Server, saved: dict[str, Any]) -> None:
    """Restore a state of `server_state` in a new server of the same mode, index and count."""
    _set_contract(server, json.loads(saved["contract"]))
    for index, shard in server.shards.items():
        shard.load_state_dict(saved["shards"][index])
        if shard.codec is not None and index in saved.get("codes", ()):  # older states have none
            shard.codec.load_state_dict(saved["codes"][index])
            shard.codec.reference_versions = dict(saved["code_versions"][index])
    server.steps_begun = saved["begun"]
    server.aggregator.staleness.update(saved["staleness"])
    server.aggregator.dropped = saved["left_out"]
    for fields in saved["clients"]:
        session = _restore_session(server, fields)
        session.staleness.update(fields["staleness"])
        session.dropped = fields["left_out"]
        for index, reply in fields["answers"].items():
            session.buffer(server.shards[index])[:] = reply.numpy()


def _set_contract(server: Server, contract: dict[str, Any] | None) -> None:
    if contract and contract != server.contract:
        server.set_contract(contract)


def _session(server: Server, name: str) -> Session:
    return server.sessions.setdefault(name, Session(name, None, frozenset(), []))


def _restore_session(server: Server, fields: Record) -> Session:
    """Restore a session; its shards and options are sent again by the client when it reconnects."""
    session = _session(server, fields["name"])
    for index in fields["has"]:
        server.aggregator.subscribe(session, server.shards[index])
    session.alive, session.paused, session.done = fields["waited_for"], fields["resting"], fields["done"]
    return session
