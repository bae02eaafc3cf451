"""Neighbour exchange: peers show each other their models, version by version, and average what they see.

Who is on the same node is read in place, in shared memory: a peer has two slots there, and fills the one
that nobody reads any more. To other nodes a slot travels as it is. Every model has its version, so nobody
ever averages an older or a newer one than was meant, nor one that is half written.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcsgd.collectives.peers import Peers
from hpcsgd.collectives.staging import from_host, to_host
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.progress import LISTENING
from hpcsgd.mpi.world import SLICE_OF_WAIT
from hpcsgd.tensors.group import TensorGroup
from hpcsgd.tensors.weighted_sum import combine

#: What a peer averages: (peer, weight), in the order in which they are added up.
Terms = Sequence[tuple[int, float]]

_MESSAGE_BYTES = 2**30
_LOOK_AT_MESSAGES = 200  # microseconds
_EXCHANGES = 16  # whose messages are told apart in one world


class Exchange:
    """What the peers of all ranks show each other; collective when made.

    All methods run as jobs of the communication thread, or one after the other in its place.

    Parameters
    ----------
    peers
        Who takes part.
    groups
        For each peer of this rank what it shows; all alike, on all ranks.
    channel
        Keeps the messages of two exchanges of one run apart. Default 0.
    """

    def __init__(self, peers: Peers, groups: Sequence[TensorGroup], channel: int = 0) -> None:
        from hpcsgd.kernels.sync import versioned_slots

        self.peers, self._groups, self._kernel = peers, groups, versioned_slots
        self.world = world = peers.world
        world.compile(self._warm_up)
        self._net = world.all.twin(2 + channel)
        self.nbytes = groups[0].nbytes
        self._row_bytes = max(64, peers.each * versioned_slots.SLOTS * self.nbytes)
        flags, rows = world.window(versioned_slots.flags_size(peers.each)), world.window(self._row_bytes)
        shared = all(world.gather(flags is not None and rows is not None))
        #: The ranks whose slots can be read in place.
        self._members = world.members if shared else [world.rank]
        if shared:
            assert flags is not None and rows is not None
            self._flags, self._rows = flags.rows.view(np.int32), torch.from_numpy(rows.rows)
        else:
            self._flags = np.zeros((1, versioned_slots.flags_size(peers.each) // 4), np.int32)
            self._rows = torch.zeros(1, self._row_bytes, dtype=torch.uint8)
        self._spaces: dict[tuple[int, int, int], list[Tensor]] = {}
        self._next = [0] * peers.each
        self._sending: dict[tuple[int, int], list[tuple[Any, int]]] = {}
        self._inboxes: dict[int, Tensor] = {}
        self._number = next(self._net.users) % _EXCHANGES
        self._tags = max(2, self._net.tag_limit // (_EXCHANGES * peers.each**2))

    def _warm_up(self) -> None:
        slots, flags = self._kernel, np.zeros(self._kernel.flags_size(1) // 4, np.int32)
        slots.publish(flags, 0, 0, 1, 1)
        slots.find(flags, 0, 1, 0, 0)
        slots.release(flags, 0, 0)
        slots.wait_until_free(flags, 0, 0, 0, 0)
        slots.holds(flags, 0, 0, 1)
        for dtype in {bucket.host.dtype for bucket in self._groups[0]}:
            combine(torch.zeros(1, dtype=dtype), [(torch.zeros(1, dtype=dtype), 1.0)])

    def show(self, peer: int, version: int, readers: Sequence[int]) -> None:
        """Let `readers`, each of which averages it once, see the model that a peer of this rank has now.

        Waits until one of the peer's slots has been read by all.
        """
        if not readers:
            return
        index = self.peers.index(peer)
        slot, self._next[index] = self._next[index], 1 - self._next[index]
        what = f"slot of peer {peer} for version {version}"
        row = self._members.index(self.world.rank)
        self._until(
            lambda micros: self._kernel.wait_until_free(
                self._flags[row], index, slot, self.world.spins, micros
            ),
            f"{what}: the readers of an older version",
            readers,
        )
        for request, rank in self._sending.pop((index, slot), []):
            self._net.wait(request, what, rank)
        space = self._space(row, index, slot)
        to_host(self._groups[index], space)
        here = [reader for reader in readers if self.peers.rank_of(reader) in self._members]
        self._kernel.publish(self._flags[row], index, slot, version + 1, len(here))
        away = [reader for reader in readers if self.peers.rank_of(reader) not in self._members]
        if away:
            messages = pieces(self._bytes(row, index, slot))
            self._sending[index, slot] = [
                (self._net.isend(piece, rank, self._tag(peer, reader, version)), rank)
                for reader, rank in ((reader, self.peers.rank_of(reader)) for reader in away)
                for piece in messages
            ]

    def mix(self, peer: int, version: int, terms: Terms, into: Sequence[Tensor] | None = None) -> None:
        """A peer of this rank takes on the weighted sum of the models shown as `version`.

        Parameters
        ----------
        peer
            Who averages; it counts with the model it has now.
        version
            Of the others' models.
        terms
            Whom to average, and how much each counts.
        into
            Where the sum goes, one tensor a bucket, on the host; default: the peer's own group.
        """
        group = self._groups[self.peers.index(peer)]
        expected = {
            source: self._expect(number, peer, source, version)
            for number, (source, _) in enumerate(terms)
            if self.peers.rank_of(source) not in self._members
        }
        seen: list[tuple[list[Tensor], float]] = []
        reading: list[tuple[int, int, int]] = []
        for source, weight in terms:
            if source == peer:
                own = [bucket.host for bucket in group]
                to_host(group, own)
                seen.append((own, weight))
            elif source in expected:
                seen.append((self._arrived(source, version, *expected[source]), weight))
            else:
                reading.append(self._found(source, version))
                seen.append((self._space(*reading[-1]), weight))

        def add_up(number: int, out: Tensor) -> None:
            combine(out, [(parts[number], weight) for parts, weight in seen])

        if into is None:
            from_host(group, add_up)
        else:
            for number, out in enumerate(into):
                add_up(number, out)
        for row, index, slot in reading:
            if not self._kernel.holds(self._flags[row], index, slot, version + 1):
                raise HpcsgdError(
                    f"a model was overwritten while it was read, version {version}",
                    rank=self.world.rank,
                    do="report this: two runs must not share an exchange",
                )
            self._kernel.release(self._flags[row], index, slot)
            if self._members[row] != self.world.rank:
                self.world.traffic.shared += self.nbytes

    def clear(self) -> None:
        """Forget all versions, where their numbers begin again; collective, with nothing in flight."""
        self.world.gather(None, "the end of an exchange")
        self._flags[self._members.index(self.world.rank)] = 0
        self._next = [0] * self.peers.each
        self.world.gather(None, "the new start of an exchange")

    @property
    def sends(self) -> bool:
        """Whether some ranks are reached by messages."""
        return len(self._members) < self.world.size

    def push(self) -> float:
        """Move the messages on that `show` has begun; a service, where jobs are submitted and waited for.

        Unlike `settle` it holds up no later job until they have been received.
        """
        for request, _ in [sent for requests in self._sending.values() for sent in requests]:
            request.Test()
        return LISTENING

    def settle(self) -> None:
        """Let the messages leave that jobs so far `show`, while the compute thread goes on."""
        if self.sends:
            self.world.progress.submit("messages to neighbours", self._sent)

    def _sent(self) -> None:
        for requests in self._sending.values():
            for request, rank in requests:
                self._net.wait(request, "messages to neighbours", rank)
            requests.clear()

    def _found(self, source: int, version: int) -> tuple[int, int, int]:
        """Row, index and slot of a model that is shown on this node, once it is."""
        row, index = self._members.index(self.peers.rank_of(source)), self.peers.index(source)
        found = -1

        def look(micros: int) -> bool:
            nonlocal found
            found = self._kernel.find(self._flags[row], index, version + 1, self.world.spins, micros)
            return bool(found >= 0)

        self._until(look, f"model of peer {source}, version {version}", [source])
        return row, index, found

    def _until(self, done: Any, what: str, peers: Sequence[int]) -> None:
        def check() -> bool:
            # What has been sent to other nodes only moves on inside MPI.
            waiting = [r for requests in self._sending.values() for r, _ in requests if not r.Test()]
            return bool(done(_LOOK_AT_MESSAGES if waiting else SLICE_OF_WAIT))

        self.world.waiter.until(check, what, lambda: {self.peers.rank_of(peer) for peer in peers})

    def _expect(self, number: int, peer: int, source: int, version: int) -> tuple[Tensor, list[Any]]:
        if number not in self._inboxes:
            self._inboxes[number] = torch.empty(self.nbytes, dtype=torch.uint8)
        inbox, rank = self._inboxes[number], self.peers.rank_of(source)
        tag = self._tag(source, peer, version)
        return inbox, [self._net.irecv(piece, rank, tag) for piece in pieces(inbox)]

    def _arrived(self, source: int, version: int, inbox: Tensor, requests: list[Any]) -> list[Tensor]:
        for request in requests:
            self._net.wait(request, f"model of peer {source}, version {version}", self.peers.rank_of(source))
        return parts_of(self._groups[0], inbox)

    def _tag(self, source: int, reader: int, version: int) -> int:
        each = self.peers.each
        pair = (version % self._tags * each + self.peers.index(source)) * each + self.peers.index(reader)
        return pair * _EXCHANGES + self._number

    def _bytes(self, row: int, index: int, slot: int) -> Tensor:
        first = (index * self._kernel.SLOTS + slot) * self.nbytes
        return self._rows[row, first : first + self.nbytes]

    def _space(self, row: int, index: int, slot: int) -> list[Tensor]:
        """A slot as tensors like the buckets'."""
        place = (row, index, slot)
        if place not in self._spaces:
            self._spaces[place] = parts_of(self._groups[0], self._bytes(*place))
        return self._spaces[place]


def parts_of(group: TensorGroup, memory: Tensor) -> list[Tensor]:
    """Bytes, as many as a group has, as tensors like its buckets'."""
    parts, first = [], 0
    for bucket in group:
        parts.append(memory[first : first + bucket.nbytes].view(bucket.flat.dtype))
        first += bucket.nbytes
    return parts


@functools.cache
def _steps(nbytes: int) -> list[tuple[int, int]]:
    starts = range(0, nbytes, _MESSAGE_BYTES)
    return [(start, min(start + _MESSAGE_BYTES, nbytes)) for start in starts]


def pieces(memory: Tensor) -> list[Any]:
    """What goes into one MPI message each, which counts in an int."""
    return [memory[start:stop].numpy() for start, stop in _steps(memory.numel())]
