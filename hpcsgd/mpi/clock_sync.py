"""Offsets between the clocks of ranks."""

from __future__ import annotations

import time

import numpy as np

from hpcsgd.mpi.communicator import Communicator

_ROUND_TRIPS = 100
_OPERATION = "the comparison of clocks"


def measure_offset(comm: Communicator) -> dict[str, float]:
    """Measure the offset of `time.perf_counter` of rank 0 from that of this rank; collective.

    The fastest of some round trips has an error of at most half of its time (Cristian, 1989), whereas a mean
    or median over all trips has no bound.

    Returns
    -------
    dict
        In seconds: `offset`, to add to this rank's clock for that of rank 0; its largest `error`; and `at`,
        the time of the measurement on this rank's clock.
    """
    remote = np.zeros(1)
    if comm.rank == 0:
        for other in range(1, comm.size):
            for _ in range(_ROUND_TRIPS):
                comm.wait(comm.irecv(remote, other), _OPERATION, other)
                remote[0] = time.perf_counter()
                comm.wait(comm.isend(remote, other), _OPERATION, other)
        return {"at": time.perf_counter(), "offset": 0.0, "error": 0.0}
    trips = []
    for _ in range(_ROUND_TRIPS):
        sent = time.perf_counter()
        comm.wait(comm.isend(remote, 0), _OPERATION, 0)
        comm.wait(comm.irecv(remote, 0), _OPERATION, 0)
        received = time.perf_counter()
        trips.append((received - sent, float(remote[0]) - (sent + received) / 2, received))
    seconds, offset, at = min(trips)
    return {"at": at, "offset": offset, "error": seconds / 2}
