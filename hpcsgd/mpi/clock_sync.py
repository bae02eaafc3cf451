"""How far the clocks of ranks are apart."""

from __future__ import annotations

import time

import numpy as np

from hpcsgd.mpi.communicator import Transport

_TRIPS = 100
_WHAT = "the comparison of clocks"


def compare(transport: Transport) -> dict[str, float]:
    """What to add to `time.perf_counter` of this rank for that of rank 0; collective.

    By the fastest of some round trips: that is wrong by at most half of its time (Cristian, 1989), whereas
    a mean or median over all trips has no bound.

    Returns
    -------
    dict
        In seconds: `offset`, its largest `error`, and when it was so, `at` on this rank's clock.
    """
    theirs = np.zeros(1)
    if transport.rank == 0:
        for other in range(1, transport.size):
            for _ in range(_TRIPS):
                transport.wait(transport.irecv(theirs, other), _WHAT, other)
                theirs[0] = time.perf_counter()
                transport.wait(transport.isend(theirs, other), _WHAT, other)
        return {"at": time.perf_counter(), "offset": 0.0, "error": 0.0}
    trips = []
    for _ in range(_TRIPS):
        left = time.perf_counter()
        transport.wait(transport.isend(theirs, 0), _WHAT, 0)
        transport.wait(transport.irecv(theirs, 0), _WHAT, 0)
        back = time.perf_counter()
        trips.append((back - left, float(theirs[0]) - (left + back) / 2, back))
    length, offset, at = min(trips)
    return {"at": at, "offset": offset, "error": length / 2}
