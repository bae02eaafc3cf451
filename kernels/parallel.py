"""Work on the host in pieces, which several threads may share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

#: Elements of a piece: in float32 they fit the second-level cache.
PIECE = 256 * 1024


def in_pieces(piece: Callable[[int, int], None], count: int, size: int, grain: int = 1) -> Iterator[None]:
    """Call `piece(first, last)` over [0, count), about `size` at a time, cut at multiples of `grain`.

    With several threads (`torch.get_num_threads()`) as many pieces are done between one yield and the next.
    """
    threads = torch.get_num_threads()
    size = max(1, size // grain) * grain
    cuts = [(first, min(first + size, count)) for first in range(0, count, size)]
    for first in range(0, len(cuts), threads):
        batch = cuts[first : first + threads]
        if len(batch) == 1:
            piece(*batch[0])
        else:
            for done in [_pool(threads).submit(piece, *each) for each in batch]:
                done.result()
        yield


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "hpcsgd kernels")
