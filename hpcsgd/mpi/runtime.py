"""The parts of a rank that a World shares with the worlds split from it."""

from __future__ import annotations

import warnings
from typing import Any

from hpcsgd.diagnostics.activity import ActivityRecord
from hpcsgd.diagnostics.traffic import Traffic
from hpcsgd.mpi import environment, ulfm
from hpcsgd.mpi.progress import Progress
from hpcsgd.mpi.stall_detector import StallDetector
from hpcsgd.mpi.waiting import DeadlineWaiter, WaitHooks


class Runtime:
    """Threads, deadlines, detectors and counters of one rank.

    Parameters
    ----------
    comm
        An mpi4py communicator of all ranks that belongs to hpcsgd.
    hosts
        The host name of each rank.
    device
        The device as the user has named it.
    timeout
        Seconds until a wait fails.

    Attributes
    ----------
    communicators
        All communicators of the whole world, to be freed or revoked.
    traffic, control_traffic
        Bytes of methods, and of small messages about settings, steps and metrics.
    """

    def __init__(self, comm: Any, hosts: list[str], device: str, timeout: float) -> None:
        from mpi4py import MPI

        detector_comm = comm.Dup()
        self.comm = comm
        self.communicators: list[Any] = [comm, detector_comm]
        self.host = hosts[comm.rank]
        self.device, self.timeout = device, timeout
        self.ranks_per_node = environment.ranks_per_node()
        self.shared_memory = environment.shared_memory_enabled()
        self.activity, self.traffic, self.control_traffic = ActivityRecord(), Traffic(), Traffic()
        self.waiter = DeadlineWaiter(comm.rank, timeout)
        self.failure_detector = ulfm.FailureDetector(comm, hosts)
        threaded = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        self.progress = Progress(self.waiter, self.activity, threaded=threaded)
        self.stall_detector = StallDetector(detector_comm, self.waiter, self.activity)
        self.waiter.hooks = WaitHooks(
            check=self._check,
            poll=self.progress.poll,
            is_background=self.progress.in_background,
            explain=self.stall_detector.explain,
            warn=self.stall_detector.warn,
        )
        if not threaded and comm.rank == 0:
            warnings.warn(
                "MPI provides no MPI_THREAD_MULTIPLE: communication runs in the main thread and "
                "does not overlap with computation; start with an MPI library that provides it",
                RuntimeWarning,
                stacklevel=3,
            )

    def _check(self) -> None:
        self.failure_detector.check()
        self.stall_detector.poll()

    def abandon(self) -> None:
        """Give up all communication after ranks have failed; this runtime cannot be used afterwards."""
        self.waiter.tracer.flush()
        # Ranks that wait in one of them for a rank that has given up stop waiting.
        for comm in self.communicators:
            comm.Revoke()
        self.progress.abandon()
