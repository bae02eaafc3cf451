"""What a server must not forget: its state, and a log of all updates since.

An update is in the log before it is made, and so before any client hears of it. A log that is replayed makes
the same updates again, with the same arithmetic. What is written is in the hands of the operating system, and
survives the end of this process by any signal; a crash of the machine may lose the last seconds.
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

from hpcsgd.errors import HpcsgdError
from hpcsgd.server.server import Server
from hpcsgd.server.session import Client
from hpcsgd.server.shard import FIRST, Push, Shard
from hpcsgd.server.update_rules import Terms

_SIZES = struct.Struct("<IQ")  # bytes of the note and of the values
_MARK_BYTES = 4
_AHEAD = 64 * 2**20  # bytes; to write where the file has its blocks already is several times faster
Note = dict[str, Any]


class Log:
    """A file of notes and values, which grows at its end.

    A note has a checksum, values have none: that would take longer than to write them. The mark behind a
    record is written last, and says that it is whole.

    Parameters
    ----------
    path
        The file, which must not exist.

    Attributes
    ----------
    nbytes
        How long it is.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self.nbytes = self._reserved = 0

    def append(self, note: Note, values: list[np.ndarray]) -> None:
        """Write a record: a note and the bytes of arrays; it survives this process once this returns."""
        text = json.dumps(note).encode()
        sizes = _SIZES.pack(len(text), sum(value.nbytes for value in values))
        mark = _checksum(sizes, text)
        try:
            self._write([mark, sizes, text, *values, mark])
        except OSError as error:
            raise HpcsgdError(
                "the log of updates cannot be written",
                got=error,
                do="mend this and start the server again: nothing that it has acknowledged is lost",
            ) from error

    def _write(self, parts: Sequence[Any]) -> None:
        left = [memoryview(part).cast("B") for part in parts]
        end = self.nbytes + sum(map(len, left))
        if end > self._reserved:
            os.posix_fallocate(self._file, self.nbytes, end + _AHEAD - self.nbytes)
            self._reserved = end + _AHEAD
        while self.nbytes < end:
            written = os.writev(self._file, left)
            self.nbytes += written
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if left:
                left[0] = left[0][written:]

    def close(self) -> None:
        os.ftruncate(self._file, self.nbytes)
        os.close(self._file)


def read_log(path: Path) -> Iterator[tuple[Note, np.ndarray]]:
    """The whole records of a log; a last one that the end of its server has torn is left out."""
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


class Keeping:
    """Writes down what happens to a server, so that another one can go on from there.

    Parameters
    ----------
    folder
        Holds the logs: ``log-00000003`` is what came after state 3.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log: Log | None = None
        self._server: Server | None = None
        self._noted: Note = {}

    @property
    def nbytes(self) -> int:
        """Of the log that is being written."""
        return 0 if self._log is None else self._log.nbytes

    def numbers(self) -> list[int]:
        """Of the logs that there are, oldest first."""
        return sorted(int(path.name[4:]) for path in self._folder.glob("log-????????"))

    def replay(self, server: Server, since: int) -> int:
        """Do again what happened after state `since`; returns how many updates these were."""
        updates = 0
        for number in self.numbers():
            if number >= since:
                for note, values in read_log(self._path(number)):
                    updates += _redo(server, note, values)
        return updates

    def begin(self, server: Server, number: int) -> None:
        """From now on write down what comes after state `number`."""
        if self._log is not None:
            self._log.close()
        self._server, self._noted = server, {}
        self._log = Log(self._path(number))
        self.note()

    def forget(self, before: int) -> None:
        """Remove the logs that a state has made superfluous."""
        for number in self.numbers():
            if number < before:
                self._path(number).unlink()

    def note(self) -> None:
        """Write down what has become of the clients, if it is new."""
        server = self._server
        assert self._log is not None and server is not None
        told = {"contract": server.contract, "clients": [about(c) for c in server.clients.values()]}
        new = {name: value for name, value in told.items() if value != self._noted.get(name)}
        if new:
            self._log.append(new, [])
            self._noted = told

    def record(self, shard: Shard, pushes: list[Push], terms: Terms) -> None:
        """Write down an update that is about to be made, see `counting.Record`."""
        assert self._log is not None and self._server is not None
        if self._server.contract is not self._noted["contract"]:
            self.note()
        told = [(p.client, p.number, p.weight, shard.clocks.get(p.client, 0)) for p in pushes]
        note = {"shard": shard.index, "version": shard.version, "pushes": told, "terms": terms}
        self._log.append(note, [push.values for push in pushes])

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def _path(self, number: int) -> Path:
        return self._folder / f"log-{number:08d}"


def _redo(server: Server, note: Note, values: np.ndarray) -> int:
    _agree(server, note.get("contract"))
    for told in note.get("clients", ()):
        _take_client(server, told)
    if "shard" not in note:
        return 0
    shard = server.shards[note["shard"]]
    if shard.version != note["version"]:
        raise HpcsgdError(
            "the log of updates does not go on where the state ends",
            expected=f"update {shard.version} of shard {shard.index}",
            got=f"update {note['version']}",
            do="the folder is damaged: begin anew with another one",
        )
    pushes = []
    # Of pushes that were summed as words the first has brought the sum, and the others nothing.
    bodies, nothing = iter(values.reshape(-1, shard.nbytes)), np.empty(0, np.uint8)
    for name, number, weight, clock in note["pushes"]:
        body = next(bodies, nothing)
        if number == FIRST:
            shard.fill(body)
            return 0
        client = _client(server, name)
        server.counting.enter(client, shard)
        client.resting, shard.clocks[name] = False, clock
        shard.left_out.discard(name)
        brought = client.buffer(shard)[: body.size]
        brought[:] = body
        pushes.append(Push(name, number, weight, brought))
    shard.count_in(pushes, Terms(*note["terms"]))
    return 1


def about(client: Client) -> Note:
    """Who a client is, and whether it is waited for."""
    return {
        "name": client.name,
        "has": sorted(client.has),
        "waited_for": client.waited_for,
        "resting": client.resting,
        "done": client.done,
    }


def state(server: Server) -> dict[str, Any]:
    """All that a server knows between two messages, in memory of its own.

    Of elastic servers these are also the last answers to each client: a push that comes again, because its
    answer was lost, has been counted and gets the same.
    """
    clients = []
    for client in server.clients.values():
        answers = {
            index: torch.from_numpy(client.buffers[index].copy())
            for index, shard in server.shards.items()
            if index in client.buffers and not shard.rule.takes_gradients
        }
        figures = {"staleness": dict(client.staleness), "left_out": client.left_out}
        clients.append({**about(client), **figures, "answers": answers})
    return {
        "contract": json.dumps(server.contract),
        "shards": {index: shard.state_dict() for index, shard in server.shards.items()},
        "begun": server.begun,
        "clients": clients,
        "staleness": dict(server.counting.staleness),
        "left_out": server.counting.left_out,
    }


def restore(server: Server, saved: dict[str, Any]) -> None:
    """Make a new server what one of the same mode, index and count was when `state` was called."""
    _agree(server, json.loads(saved["contract"]))
    for index, shard in server.shards.items():
        shard.load_state_dict(saved["shards"][index])
    server.begun = saved["begun"]
    server.counting.staleness.update(saved["staleness"])
    server.counting.left_out = saved["left_out"]
    for told in saved["clients"]:
        client = _take_client(server, told)
        client.staleness.update(told["staleness"])
        client.left_out = told["left_out"]
        for index, answer in told["answers"].items():
            client.buffer(server.shards[index])[:] = answer.numpy()


def _agree(server: Server, contract: dict[str, Any] | None) -> None:
    if contract and contract != server.contract:
        server.agree_on(contract)


def _client(server: Server, name: str) -> Client:
    return server.clients.setdefault(name, Client(name, None, frozenset(), []))


def _take_client(server: Server, told: Note) -> Client:
    """Its shards and options are told by itself when it comes back."""
    client = _client(server, told["name"])
    for index in told["has"]:
        server.counting.enter(client, server.shards[index])
    client.waited_for, client.resting, client.done = told["waited_for"], told["resting"], told["done"]
    return client
