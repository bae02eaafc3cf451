"""Neighbour exchange: peers publish their models, version by version, and average those of their neighbours.

Models of peers on the same node are read in place, in shared memory of the host or in windows of device
memory: each peer has two slots there, and fills the one that has no readers. To other nodes a slot is sent as
a message. Every model has a version number, so a peer never averages an older or newer version than
requested, nor a partly written one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcsgd.collectives.peers import Peers
from hpcsgd.collectives.staging import copy_to, wait_for_compute
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.node import NATIVE_WAIT_SLICE
from hpcsgd.mpi.tasks import POLL_INTERVAL, Steps, Wait
from hpcsgd.tensors.group import TensorGroup
from hpcsgd.tensors.memory import pinned
from hpcsgd.tensors.weighted_sum import weighted_sum

#: (peer, weight) pairs of a weighted sum of models, in the order of summation.
Terms = Sequence[tuple[int, float]]

_MESSAGE_BYTES = 2**30
_POLL_MICROSECONDS = 200  # between two polls of pending sends, while waiting in shared memory
_EXCHANGES = 16  # of one world, whose messages have distinct tags


class Exchange:
    """Publication and averaging of the models of all peers; collective when created.

    Its steps are those of tasks of the communication thread, or executed one after the other in its place.

    Parameters
    ----------
    peers
        The peers of all ranks.
    groups
        The group to publish, for each peer of this rank; all groups have equal layouts, on all ranks.
    channel
        Distinguishes the messages of the exchanges of one run. Default 0.

    Attributes
    ----------
    peers, world
        The peers, and their ranks.
    nbytes
        Bytes of a model.
    device
        Where models are summed: where the slots are.
    """

    def __init__(self, peers: Peers, groups: Sequence[TensorGroup], channel: int = 0) -> None:
        from hpcsgd.kernels.sync import versioned_slots

        self.peers, self._groups, self._kernel = peers, groups, versioned_slots
        self.world = world = peers.world
        world.local.compile_kernels(self._warm_up)
        self._communicator = world.all.dup(f"neighbour exchange {channel}")
        self.nbytes = groups[0].nbytes
        self._row_bytes = max(64, peers.per_rank * versioned_slots.SLOTS * self.nbytes)
        flags = world.local.allocate(versioned_slots.flags_size(peers.per_rank))
        rows = self._allocate_rows()
        shared = all(world.gather(flags is not None and rows is not None))
        #: The ranks whose slots can be read in place.
        self._members = world.local.members if shared else [world.rank]
        if shared:
            assert flags is not None and rows is not None
            self._flags, self._rows = flags.rows.view(np.int32), rows
        else:
            self._flags = np.zeros((1, versioned_slots.flags_size(peers.per_rank) // 4), np.int32)
            self._rows = [pinned(self._row_bytes, world.device)]
        self.device = self._rows[0].device
        self._slots: dict[tuple[int, int, int], list[Tensor]] = {}
        self._next_slot = [0] * peers.per_rank
        self._sends: dict[tuple[int, int], list[tuple[Any, int]]] = {}
        #: Host memory of messages, of slots that are elsewhere.
        self._send_buffers: dict[tuple[int, int], Tensor] = {}
        self._receive_buffers: dict[int, Tensor] = {}
        self._received: dict[int, Tensor] = {}
        self._number = self._communicator.next_id() % _EXCHANGES
        self._version_tags = max(2, self._communicator.tag_limit // (_EXCHANGES * peers.per_rank**2))

    def _allocate_rows(self) -> list[Tensor] | None:
        """Return memory of each rank of the node for its slots: windows where the groups are windowed."""
        local, buckets = self.world.local, self._groups[0].buckets
        if buckets and buckets[0].windowed:
            return local.allocate_on_device(self._row_bytes, self.world.device)
        memory = local.allocate(self._row_bytes)
        return [torch.from_numpy(row) for row in memory.rows] if memory is not None else None

    def _warm_up(self) -> None:
        slots, flags = self._kernel, np.zeros(self._kernel.flags_size(1) // 4, np.int32)
        slots.publish(flags, 0, 0, 1, 1)
        slots.wait_for_version(flags, 0, 1, 0, 0)
        slots.release(flags, 0, 0)
        slots.wait_until_free(flags, 0, 0, 0, 0)
        slots.holds_version(flags, 0, 0, 1)
        for dtype in {bucket.flat.dtype for bucket in self._groups[0]}:
            weighted_sum(
                torch.zeros(1, dtype=dtype, device="cpu"), [(torch.zeros(1, dtype=dtype, device="cpu"), 1.0)]
            )

    def publish(self, peer: int, version: int, readers: Sequence[int]) -> Steps[None]:
        """Publish the current model of a peer of this rank as `version`.

        Waits until all readers of the version before the last have released the peer's next slot.

        Parameters
        ----------
        peer
            The peer.
        version
            Version number of the model.
        readers
            The peers that average it, each of them once.
        """
        if not readers:
            return
        index = self.peers.index(peer)
        slot, self._next_slot[index] = self._next_slot[index], 1 - self._next_slot[index]
        operation = f"slot of peer {peer} for version {version}"
        row = self._members.index(self.world.rank)
        yield self._wait(
            lambda micros: self._kernel.wait_until_free(
                self._flags[row], index, slot, self.world.local.spins, micros
            ),
            f"{operation}: the readers of an older version",
            readers,
        )
        for request, rank in self._sends.pop((index, slot), []):
            yield self._completion(request, rank, operation)
        copy_to(self._groups[index], self._slot(row, index, slot))
        local = [reader for reader in readers if self.peers.rank_of(reader) in self._members]
        self._kernel.publish(self._flags[row], index, slot, version + 1, len(local))
        remote = [reader for reader in readers if self.peers.rank_of(reader) not in self._members]
        if remote:
            messages = message_buffers(self._message(row, index, slot))
            self._sends[index, slot] = [
                (self._communicator.isend(message, rank, self._tag(peer, reader, version)), rank)
                for reader, rank in ((reader, self.peers.rank_of(reader)) for reader in remote)
                for message in messages
            ]

    def mix(self, peer: int, version: int, terms: Terms, into: Sequence[Tensor] | None = None) -> Steps[None]:
        """Set the model of a peer of this rank to the weighted sum of models of `version`.

        Parameters
        ----------
        peer
            The peer; its own term is its current model.
        version
            Version number of the other peers' models.
        terms
            (peer, weight) pairs, in the order of summation.
        into
            Destination of the sum, one tensor a bucket, on `device`. Default: the group of the peer.
        """
        group = self._groups[self.peers.index(peer)]
        receives = {
            source: self._post_receives(number, peer, source, version)
            for number, (source, _) in enumerate(terms)
            if self.peers.rank_of(source) not in self._members
        }
        models: list[tuple[list[Tensor], float]] = []
        slots: list[tuple[int, int, int]] = []
        for source, weight in terms:
            if source == peer:
                models.append((self._own_buffers(group), weight))
                copy_to(group, models[-1][0])
            elif source in receives:
                models.append(((yield from self._receive(source, version, *receives[source])), weight))
            else:
                slots.append((yield from self._find_slot(source, version)))
                models.append((self._slot(*slots[-1]), weight))

        for number, out in enumerate(self._own_buffers(group) if into is None else into):
            weighted_sum(out, [(buckets[number], weight) for buckets, weight in models])
        for bucket in group if into is None and self.device != self.world.device else ():
            bucket.flat.copy_(bucket.host, non_blocking=True)
        wait_for_compute(self.world.device)
        for row, index, slot in slots:
            if not self._kernel.holds_version(self._flags[row], index, slot, version + 1):
                raise HpcsgdError(
                    f"the slot of a model was overwritten while it was read, version {version}",
                    rank=self.world.rank,
                    do="use one Run at a time on these ranks; if there is only one, report this "
                    "as a bug of hpcsgd",
                )
            self._kernel.release(self._flags[row], index, slot)
            if self._members[row] != self.world.rank:
                self.world.traffic.count(shared=self.nbytes)

    def _own_buffers(self, group: TensorGroup) -> list[Tensor]:
        return [bucket.flat if bucket.flat.device == self.device else bucket.host for bucket in group]

    def reset(self) -> None:
        """Discard all versions, so that their numbers can start again; collective, with nothing in flight."""
        self.world.gather(None, "the end of an exchange")
        self._flags[self._members.index(self.world.rank)] = 0
        self._next_slot = [0] * self.peers.per_rank
        self.world.gather(None, "the new start of an exchange")

    @property
    def uses_messages(self) -> bool:
        """Whether some ranks have no common memory with this one, and are sent messages."""
        return len(self._members) < self.world.size

    def progress_sends(self) -> Steps[None]:
        """Progress the sends of `publish`; a service, for methods whose tasks are submitted and waited for.

        Unlike `flush` it does not delay later tasks until the messages have been received.
        """
        while True:
            for request, _ in [send for sends in self._sends.values() for send in sends]:
                request.Test()
            yield POLL_INTERVAL

    def flush(self) -> None:
        """Submit a task that completes all sends so far, while the compute thread continues."""
        if self.uses_messages:
            self.world.progress.submit("messages to neighbours", self._complete_sends)

    def _complete_sends(self) -> Steps[None]:
        for sends in self._sends.values():
            for request, rank in sends:
                yield self._completion(request, rank)
            sends.clear()

    def _completion(self, request: Any, rank: int, operation: str | None = None) -> Wait:
        return self._communicator.completion(request, rank)._replace(operation=operation)

    def _find_slot(self, source: int, version: int) -> Steps[tuple[int, int, int]]:
        """Wait for a model of a peer of this node; returns its row, index and slot."""
        row, index = self._members.index(self.peers.rank_of(source)), self.peers.index(source)
        slot, spins = -1, self.world.local.spins

        def is_published(micros: int) -> bool:
            nonlocal slot
            slot = self._kernel.wait_for_version(self._flags[row], index, version + 1, spins, micros)
            return bool(slot >= 0)

        yield self._wait(is_published, f"model of peer {source}, version {version}", [source])
        return row, index, slot

    def _wait(self, done: Any, operation: str, peers: Sequence[int]) -> Wait:
        def check() -> bool:
            # Sends to other nodes only progress within MPI calls.
            pending = [r for sends in self._sends.values() for r, _ in sends if not r.Test()]
            return bool(done(_POLL_MICROSECONDS if pending else NATIVE_WAIT_SLICE))

        return Wait(check, lambda: {self.peers.rank_of(peer) for peer in peers}, operation)

    def _message(self, row: int, index: int, slot: int) -> Tensor:
        """Return the bytes of a slot of this rank, in memory of the host."""
        model = self._slot_bytes(row, index, slot)
        if self.device.type == "cpu":
            return model
        if (index, slot) not in self._send_buffers:
            self._send_buffers[index, slot] = pinned(self.nbytes, self.device)
        message = self._send_buffers[index, slot].copy_(model, non_blocking=True)
        wait_for_compute(self.device)
        return message

    def _post_receives(self, number: int, peer: int, source: int, version: int) -> tuple[int, list[Any]]:
        if number not in self._receive_buffers:
            self._receive_buffers[number] = pinned(self.nbytes, self.device)
        memory, rank = self._receive_buffers[number], self.peers.rank_of(source)
        tag = self._tag(source, peer, version)
        return number, [self._communicator.irecv(part, rank, tag) for part in message_buffers(memory)]

    def _receive(self, source: int, version: int, number: int, requests: list[Any]) -> Steps[list[Tensor]]:
        """Wait for a model that is sent as message; returns it on `device`, one tensor a bucket."""
        operation = f"model of peer {source}, version {version}"
        for request in requests:
            yield self._completion(request, self.peers.rank_of(source), operation)
        memory = self._receive_buffers[number]
        if self.device.type != "cpu":
            if number not in self._received:
                self._received[number] = torch.empty_like(memory, device=self.device)
            memory = self._received[number].copy_(memory, non_blocking=True)
        return split_by_bucket(self._groups[0], memory)

    def _tag(self, source: int, reader: int, version: int) -> int:
        count, version_tag = self.peers.per_rank, version % self._version_tags
        pair = (version_tag * count + self.peers.index(source)) * count + self.peers.index(reader)
        return pair * _EXCHANGES + self._number

    def _slot_bytes(self, row: int, index: int, slot: int) -> Tensor:
        first = (index * self._kernel.SLOTS + slot) * self.nbytes
        return self._rows[row][first : first + self.nbytes]

    def _slot(self, row: int, index: int, slot: int) -> list[Tensor]:
        """Return a slot as one tensor a bucket."""
        key = (row, index, slot)
        if key not in self._slots:
            self._slots[key] = split_by_bucket(self._groups[0], self._slot_bytes(*key))
        return self._slots[key]


def split_by_bucket(group: TensorGroup, memory: Tensor) -> list[Tensor]:
    """Return the bytes of a model (nbytes,) as one tensor a bucket, of its dtype."""
    parts, first = [], 0
    for bucket in group:
        parts.append(memory[first : first + bucket.nbytes].view(bucket.flat.dtype))
        first += bucket.nbytes
    return parts


@functools.cache
def _message_bounds(nbytes: int) -> list[tuple[int, int]]:
    starts = range(0, nbytes, _MESSAGE_BYTES)
    return [(start, min(start + _MESSAGE_BYTES, nbytes)) for start in starts]


def message_buffers(memory: Tensor) -> list[Any]:
    """Split memory (bytes) into buffers of MPI messages, whose lengths must fit an int."""
    return [memory[start:stop].numpy() for start, stop in _message_bounds(memory.numel())]
