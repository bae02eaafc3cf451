"""The ring all-reduce: reduce-scatter and all-gather round a ring, cut in segments that overlap.

Rank r receives from r-1 and sends to r+1. Each of the p chunks makes p-1 hops in which the receivers
add their own, then p-1 hops in which they keep the finished chunk: 2(p-1)/p of the bytes leave each
rank, the least possible. A segment goes on as soon as it has arrived and been added, so the link idles
only for the first one.

Reading of arXiv 1801.03855 section on tensor collectives (ring reduce-scatter + all-gather); the
segmenting is ours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hpcsgd.mpi.communicator import Transport
from hpcsgd.tensors.group import Bucket, cut

_SEGMENT_BYTES = 256 * 1024
_IN_FLIGHT = 4  # receives posted ahead


def allreduce(bucket: Bucket, what: str, scale: float) -> None:
    """Sum the bucket over all ranks round one ring."""
    Ring(bucket.world.all, bucket.host, what).allreduce(scale)


def reduce_scatter(bucket: Bucket, what: str, scale: float) -> None:
    """The first half: each rank has the sum of its part."""
    Ring(bucket.world.all, bucket.host, what).reduce_scatter(scale)


def allgather(bucket: Bucket, what: str) -> None:
    """The second half: every rank gets every part."""
    Ring(bucket.world.all, bucket.host, what).allgather()


class Ring:
    """One trip of a flat tensor round the ranks of a communicator.

    Parameters
    ----------
    net
        The communicator.
    flat
        1-D, contiguous, on the host, of the same length on every rank; reduced in place.
    what
        The operation, for errors.
    tag
        Of its messages: trips with different tags may be under way at the same time. Default 0.
    """

    def __init__(self, net: Transport, flat: Tensor, what: str, tag: int = 0) -> None:
        self._net = net
        self._what = what
        self._tag = tag
        self._left, self._right = (net.rank - 1) % net.size, (net.rank + 1) % net.size
        chunks = [flat[cut(flat, rank, net.size)] for rank in range(net.size)]
        longest = max(chunk.numel() for chunk in chunks)
        self._pieces = max(1, -(-longest * flat.element_size() // _SEGMENT_BYTES))
        self._step = max(1, -(-longest // self._pieces))
        self._segments = [
            [chunk[i * self._step : (i + 1) * self._step] for i in range(self._pieces)] for chunk in chunks
        ]

    def allreduce(self, scale: float) -> None:
        """Every rank gets `scale` times the sum."""
        self._wait(self.steps(scale))

    def steps(self, scale: float) -> Iterator[tuple[Any, int]]:
        """`allreduce` without waiting: yields each request, and its peer, that must be complete to go on."""
        return self._travel(0, 2 * (self._net.size - 1), scale)

    def reduce_scatter(self, scale: float) -> None:
        """Rank r gets `scale` times the sum in chunk r."""
        self._wait(self._travel(0, self._net.size - 1, scale))

    def allgather(self) -> None:
        """Every rank gets chunk r of rank r."""
        self._wait(self._travel(self._net.size - 1, 2 * (self._net.size - 1), 1.0))

    def _wait(self, steps: Iterator[tuple[Any, int]]) -> None:
        for request, peer in steps:
            self._net.wait(request, self._what, peer)

    def _travel(self, first_hop: int, last_hop: int, scale: float) -> Iterator[tuple[Any, int]]:
        """Hops [first, last): below p-1 what arrives is added to, from there on it is final.

        At hop h rank r sends chunk r-1-h and receives chunk r-2-h, which it sends at hop h+1.
        """
        p, pieces = self._net.size, self._pieces
        if p == 1:
            for segment in self._segments[0]:
                _scale(segment, scale)
            return
        items = [(hop, piece) for hop in range(first_hop, last_hop) for piece in range(pieces)]
        # A receive lands in place once its chunk has left; p*pieces items later that is long begun.
        ahead = min(_IN_FLIGHT, p * pieces, len(items))
        spare = [self._segments[0][0].new_empty(self._step) for _ in range(ahead)]
        sent: dict[tuple[int, int], Any] = {}
        posted: deque[tuple[Any, Tensor]] = deque()

        def send(hop: int, piece: int) -> None:
            chunk = (self._net.rank - 1 - hop) % p
            buffer = _bytes(self._segments[chunk][piece])
            sent[chunk, piece] = self._net.isend(buffer, self._right, self._tag)

        def post(item: int) -> Iterator[tuple[Any, int]]:
            hop, piece = items[item]
            chunk = (self._net.rank - 2 - hop) % p
            target = self._segments[chunk][piece]
            if hop < p - 1:
                target = spare[item % ahead][: target.numel()]
            elif (chunk, piece) in sent:
                yield sent.pop((chunk, piece)), self._right
            posted.append((self._net.irecv(_bytes(target), self._left, self._tag), target))

        for piece in range(pieces):
            if first_hop == 0:
                _scale(self._segments[(self._net.rank - 1) % p][piece], scale)
            send(first_hop, piece)
        for item in range(ahead):
            yield from post(item)
        for item, (hop, piece) in enumerate(items):
            request, arrived = posted.popleft()
            yield request, self._left
            if hop < p - 1:
                own = self._segments[(self._net.rank - 2 - hop) % p][piece]
                torch.add(arrived, own, alpha=1 if scale == 1.0 else scale, out=own)
            if hop + 1 < last_hop:
                send(hop + 1, piece)
            if item + ahead < len(items):
                yield from post(item + ahead)
        for request in sent.values():
            yield request, self._right


def _scale(segment: Tensor, scale: float) -> None:
    if scale != 1.0:
        segment.mul_(scale)


def _bytes(tensor: Tensor) -> Any:
    return tensor.view(torch.uint8).numpy()
