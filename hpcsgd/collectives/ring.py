"""Ring all-reduce: reduce-scatter and all-gather on a ring, with chunks divided into pipelined sub-chunks.

Rank r receives from r-1 and sends to r+1. Each of the p chunks makes p-1 hops in which the receiver adds its
own chunk, then p-1 hops in which the receiver stores the final chunk: each rank sends 2(p-1)/p of the bytes,
the minimum. A sub-chunk is sent on as soon as it has been received and added, so the link is idle only during
the first one.

Ring reduce-scatter and all-gather: arXiv 1801.03855, section on tensor collectives. Our addition: sub-chunks.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from hpcsgd.mpi.communicator import Communicator
from hpcsgd.mpi.tasks import Steps
from hpcsgd.tensors.group import Bucket, aligned_part

_SUBCHUNK_BYTES = 256 * 1024
_IN_FLIGHT = 4  # receives posted ahead


def allreduce(bucket: Bucket, scale: float) -> Steps[None]:
    """Sum the bucket over all ranks by one ring."""
    return RingCollective(bucket.world.all, bucket.host).allreduce(scale)


def reduce_scatter(bucket: Bucket, scale: float) -> Steps[None]:
    """Sum the bucket so that each rank holds the sum of its part: the first half of the ring."""
    return RingCollective(bucket.world.all, bucket.host).reduce_scatter(scale)


def allgather(bucket: Bucket) -> Steps[None]:
    """Distribute the parts to all ranks: the second half of the ring."""
    return RingCollective(bucket.world.all, bucket.host).allgather()


class RingCollective:
    """A collective on one flat tensor by a ring of the ranks of a communicator.

    Parameters
    ----------
    communicator
        The ranks.
    flat
        1-D, contiguous, on the host, of the same length on every rank; reduced in place.
    tag
        Tag of its messages; ring collectives with different tags may overlap. Default 0.
    """

    def __init__(self, communicator: Communicator, flat: Tensor, tag: int = 0) -> None:
        self._communicator, self._tag = communicator, tag
        rank, ranks = communicator.rank, communicator.size
        self._left, self._right = (rank - 1) % ranks, (rank + 1) % ranks
        chunks = [flat[aligned_part(flat, index, ranks)] for index in range(ranks)]
        longest = max(chunk.numel() for chunk in chunks)
        count = max(1, -(-longest * flat.element_size() // _SUBCHUNK_BYTES))
        self._subchunk_size = size = max(1, -(-longest // count))
        self._subchunks = [[chunk[i * size : (i + 1) * size] for i in range(count)] for chunk in chunks]

    def allreduce(self, scale: float) -> Steps[None]:
        """Set the tensor to `scale` times its sum, on every rank."""
        return self._hops(0, 2 * (self._communicator.size - 1), scale)

    def reduce_scatter(self, scale: float) -> Steps[None]:
        """Set chunk r on rank r to `scale` times its sum."""
        return self._hops(0, self._communicator.size - 1, scale)

    def allgather(self) -> Steps[None]:
        """Set chunk r to that of rank r, on every rank."""
        return self._hops(self._communicator.size - 1, 2 * (self._communicator.size - 1), 1.0)

    def _hops(self, first_hop: int, last_hop: int, scale: float) -> Steps[None]:
        """Execute hops [first, last): received sub-chunks are partial sums before hop p-1, final from it on.

        At hop h rank r sends chunk r-1-h and receives chunk r-2-h, which it sends at hop h+1.
        """
        p, rank, count = self._communicator.size, self._communicator.rank, len(self._subchunks[0])
        if p == 1:
            for subchunk in self._subchunks[0]:
                _scale(subchunk, scale)
            return
        items = [(hop, index) for hop in range(first_hop, last_hop) for index in range(count)]
        # A receive may overwrite a chunk once that is sent; the send was started p * count items before.
        ahead = min(_IN_FLIGHT, p * count, len(items))
        spare = [self._subchunks[0][0].new_empty(self._subchunk_size) for _ in range(ahead)]
        sent: dict[tuple[int, int], Any] = {}
        posted: deque[tuple[Any, Tensor]] = deque()

        def send(hop: int, index: int) -> None:
            chunk = (rank - 1 - hop) % p
            buffer = _bytes(self._subchunks[chunk][index])
            sent[chunk, index] = self._communicator.isend(buffer, self._right, self._tag)

        def post(item: int) -> Steps[None]:
            hop, index = items[item]
            chunk = (rank - 2 - hop) % p
            target = self._subchunks[chunk][index]
            if hop < p - 1:
                target = spare[item % ahead][: target.numel()]
            elif (chunk, index) in sent:
                yield self._communicator.completion(sent.pop((chunk, index)), self._right)
            posted.append((self._communicator.irecv(_bytes(target), self._left, self._tag), target))

        for index in range(count):
            if first_hop == 0:
                _scale(self._subchunks[(rank - 1) % p][index], scale)
            send(first_hop, index)
        for item in range(ahead):
            yield from post(item)
        for item, (hop, index) in enumerate(items):
            request, received = posted.popleft()
            yield self._communicator.completion(request, self._left)
            if hop < p - 1:
                own = self._subchunks[(rank - 2 - hop) % p][index]
                torch.add(received, own, alpha=1 if scale == 1.0 else scale, out=own)
            if hop + 1 < last_hop:
                send(hop + 1, index)
            if item + ahead < len(items):
                yield from post(item + ahead)
        for request in sent.values():
            yield self._communicator.completion(request, self._right)


def _scale(subchunk: Tensor, scale: float) -> None:
    if scale != 1.0:
        subchunk.mul_(scale)


def _bytes(tensor: Tensor) -> Any:
    return tensor.view(torch.uint8).numpy()
