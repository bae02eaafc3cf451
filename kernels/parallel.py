"""Chunked work on the host, on as many threads as torch uses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

#: Elements of a chunk: in float32 they fit the second-level cache.
CHUNK = 256 * 1024


def in_chunks(
    process: Callable[[int, int], None], count: int, size: int, multiple: int = 1
) -> Iterator[None]:
    """Call `process(first, last)` over [0, count) in chunks, and yield between them.

    With several threads (`torch.get_num_threads()`) as many chunks are processed between two yields.

    Parameters
    ----------
    process
        Works on the items [first, last).
    count
        Number of items.
    size
        Items of a chunk, approximately.
    multiple
        Chunks begin at multiples of this number. Default 1.
    """
    threads = torch.get_num_threads()
    size = max(1, size // multiple) * multiple
    bounds = [(first, min(first + size, count)) for first in range(0, count, size)]
    for first in range(0, len(bounds), threads):
        batch = bounds[first : first + threads]
        if len(batch) == 1:
            process(*batch[0])
        else:
            for future in [_pool(threads).submit(process, *chunk) for chunk in batch]:
                future.result()
        yield


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "hpcsgd kernels")
