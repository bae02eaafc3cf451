"""The parts of a rank that a World shares with the worlds split from it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from hpcsgd.diagnostics import observer
from hpcsgd.diagnostics.activity import ActivityRecord, ProcessInfo
from hpcsgd.diagnostics.traffic import Traffic
from hpcsgd.mpi import environment, launcher, ulfm
from hpcsgd.mpi.communicator import Communicator
from hpcsgd.mpi.departure import Departure, Part
from hpcsgd.mpi.progress import Progress
from hpcsgd.mpi.stall_detector import StallDetector
from hpcsgd.mpi.waiting import DeadlineWaiter, WaitHooks

T = TypeVar("T")

_names = itertools.count()
#: Whether this process has started an observer.
_observed: list[bool] = []


def _observe(processes: list[ProcessInfo]) -> None:
    """Start the observer of a job on one machine: on others a rank may just have ended first by mpiexec."""
    from mpi4py import MPI

    is_whole = len(processes) == MPI.COMM_WORLD.size and len({each.host for each in processes}) == 1
    if is_whole and not _observed:
        _observed.append(True)
        observer.start(processes)


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
    parts
        The communicators of the whole world, number 0, and of the worlds split from it, by number.
    traffic, control_traffic
        Bytes of methods, and of small messages about settings, steps and metrics.
    """

    def __init__(self, comm: Any, hosts: list[str], device: str, timeout: float) -> None:
        from mpi4py import MPI

        self.comm = comm
        self.host = hosts[comm.rank]
        self.device, self.timeout = device, timeout
        self.ranks_per_node: int = environment.read("HPCSGD_RANKS_PER_NODE")
        self.shared_memory: bool = environment.read("HPCSGD_SHARED_MEMORY")
        self.device_windows: bool = environment.read("HPCSGD_DEVICE_WINDOWS")
        self.activity, self.traffic, self.control_traffic = ActivityRecord(), Traffic(), Traffic()
        self.waiter = DeadlineWaiter(comm.rank, timeout)
        detector_comm, request = comm.Idup()
        self.waiter.until(request.Test, "a communicator for control messages")
        self.parts = {0: Part(to_free=[comm, detector_comm])}
        self._parts_begun = 1
        self.failure_detector = ulfm.FailureDetector(comm, hosts)
        threaded = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        self.progress = Progress(self.waiter, self.activity, threaded=threaded)
        self.stall_detector = StallDetector(detector_comm, self.waiter, self.activity)
        self.departure = Departure(
            comm.rank, comm.size, self.stall_detector.channel, self.waiter, self.parts, self.release
        )
        self.is_open = True
        self.waiter.hooks = WaitHooks(
            check=self._check,
            answer=self.stall_detector.channel.poll,
            poll=self.progress.poll,
            is_background=self.progress.in_background,
            explain=self.stall_detector.explain,
            warn=self.stall_detector.warn,
            compare=self.stall_detector.compare,
            is_busy=self.stall_detector.is_busy,
        )
        if not threaded and comm.rank == 0:
            warnings.warn(
                "MPI provides no MPI_THREAD_MULTIPLE: communication runs in the main thread and "
                "does not overlap with computation; start with an MPI library that provides it",
                RuntimeWarning,
                stacklevel=3,
            )

    def connect(self, process: ProcessInfo) -> None:
        """Let the ranks find each other's records, and answer each other, from now on; collective.

        Parameters
        ----------
        process
            This process.
        """
        if self.comm.size == 1:
            return
        everyone = Communicator(self.comm, range(self.comm.size), self.waiter, self.control_traffic)
        name = f"{self.host} {process.pid} {next(_names)}"
        both = everyone.gather_objects((process, name), "the exchange of process ids")
        processes, names = map(list, zip(*both, strict=True))
        self.stall_detector.calls.world = names[0]
        self.stall_detector.connect(processes)
        self.progress.start()
        if self.comm.rank == 0 and launcher.names_processes_only():
            _observe(processes)

    def run_blocking(self, operation: str, call: Callable[[], T]) -> T:
        """Return the result of MPI calls that return only when all ranks make them.

        They run in the communication thread, for which this one waits with a deadline.
        """
        return call() if self.comm.size == 1 else self.progress.submit(operation, call).wait()

    def _check(self) -> None:
        self.failure_detector.check()
        self.stall_detector.poll()
        self.departure.check()

    def add_part(self, comm: Any) -> int:
        """Return the number of a new part with one communicator; collective over its ranks."""
        number, self._parts_begun = self._parts_begun, self._parts_begun + 1
        self.parts[number] = Part(to_free=[comm])
        return number

    def leave(self, reason: str, delay: float = 0.0) -> None:
        """Leave the world, see `Departure`; local, idempotent, and safe in the garbage collector."""
        if self.is_open:
            self.is_open = False
            self.departure.begin(reason, delay)
            self.progress.leave(self.departure)

    def end(self, timeout: float) -> None:
        """Complete the queue at the end of the program, so that no thread of this rank calls MPI any more."""
        self.leave("was not closed before the end of the program")
        if self.departure.has_thread:
            self.progress.stop(timeout)

    def release(self) -> None:
        """Release what refers to this runtime, or to other processes, after the communicators are freed."""
        self.is_open = False
        self.departure.end()
        self.waiter.hooks = WaitHooks()
        self.stall_detector.release()
        self.progress.release()

    def abandon(self) -> None:
        """Give up all communication after ranks have failed; this runtime cannot be used afterwards."""
        self.is_open = False
        self.waiter.tracer.flush()
        # Ranks that wait in one of them for a rank that has given up stop waiting.
        for comm in self.parts[0].to_free:
            comm.Revoke()
        self.progress.abandon()
