"""World: the ranks of one job, their nodes, and the communicators between them."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hpcsgd.diagnostics import trace_file
from hpcsgd.diagnostics.activity import this_process
from hpcsgd.diagnostics.trace import NullTracer, Tracer
from hpcsgd.errors import DeadlineExceeded, HpcsgdError, RankFailed
from hpcsgd.mpi import clock_sync, consistency, departure, environment, interactive, shutdown, start, ulfm
from hpcsgd.mpi.communicator import Communicator
from hpcsgd.mpi.node import Node
from hpcsgd.mpi.rank_calls import RankCalls, different_calls
from hpcsgd.mpi.runtime import Runtime
from hpcsgd.registry import checked
from hpcsgd.registry.limits import Timeout

T = TypeVar("T")
_DIAGNOSIS_DELAY = 8.0  # seconds


class World:
    """The ranks of one job.

    Parameters
    ----------
    comm
        An mpi4py communicator; it is duplicated, and not used otherwise. Default: `MPI.COMM_WORLD`.
        Without `mpiexec` this is a world of one rank.
    device
        The device of the models: "cpu", "cuda", "cuda:1", or "auto" (default): `cuda:<local rank>` where
        there is one, else the CPU.
    timeout
        Seconds after which any wait ends with an error; default `HPCSGD_TIMEOUT`, or 300.

    Attributes
    ----------
    rank, size
        This rank and the number of ranks.
    node, nodes, local_rank, local_size
        The index of this rank's node, the number of nodes, and the rank and number of ranks inside it.
        `HPCSGD_RANKS_PER_NODE` splits nodes further, for example by socket.

    Raises
    ------
    HpcsgdError
        Where the environment shows that more ranks were started than MPI sees.
    """

    @checked
    def __init__(
        self,
        comm: Any = None,
        *,
        device: environment.DeviceName = "auto",
        timeout: Timeout | None = None,
    ) -> None:
        environment.check_variables()
        timeout = timeout if timeout is not None else environment.read("HPCSGD_TIMEOUT")
        MPI = start.initialize(timeout)
        environment.check_launcher(MPI)
        comm = MPI.COMM_WORLD if comm is None else comm
        departure.settle()
        if comm.size > 1:  # before the first wait, which a rank may never reach
            shutdown.abort_on_uncaught_exception()
        with start.at_start():
            private, places = start.meet(comm, timeout)
            private.Set_errhandler(MPI.ERRORS_RETURN)
            shutdown.set_reporting_rank(min(number for number, _ in places))
            runtime = Runtime(private, [host for _, host in places], device, timeout)
            runtime.connect(this_process())
        self._start(runtime)

    def _start(self, runtime: Runtime) -> None:
        """Start a whole world, which owns its runtime."""
        self._owns_runtime = True
        weakref.finalize(self, runtime.leave, "was dropped without close()").atexit = False
        self._connect(runtime, runtime.comm, range(runtime.comm.size), 0)
        self.device = environment.device(runtime.device, self.local_rank)
        shutdown.drain_at_exit(runtime)
        if self.size > 1:
            interactive.watch(runtime)
            kinds = {"the kind of device (device=, --device)": self.device.type}
            self.check_consistent(kinds | {"HPCSGD_CUDA_AWARE": self.cuda_aware})
        if folder := environment.read("HPCSGD_TRACE"):
            self.start_trace(folder)

    def _connect(self, runtime: Runtime, comm: Any, ranks: Sequence[int], part: int) -> None:
        """Create the communicators of these global ranks, which are part number `part` of the runtime's."""
        self._runtime, self._part, self._closed = runtime, part, False
        self.rank: int = comm.rank
        self.size: int = comm.size
        self.host, self.timeout = runtime.host, runtime.timeout
        self.cuda_aware: bool = environment.read("HPCSGD_CUDA_AWARE")
        self.activity, self.traffic = runtime.activity, runtime.traffic
        self.control_traffic = runtime.control_traffic
        self.waiter, self.progress = runtime.waiter, runtime.progress
        self.all = Communicator(comm, ranks, self.waiter, self.traffic)
        node, members = runtime.run_blocking(
            "the communicators of a world", lambda: self._make_communicators(comm)
        )
        #: The ranks of this rank's node, and the memory that they share.
        runtime.parts[part].communicators |= {"all": self.all, "control": self.control, "node": node}
        if self.internode is not None:
            runtime.parts[part].communicators["internode"] = self.internode
        self.local = Node(
            node,
            members,
            shared_memory=runtime.shared_memory,
            device_windows=runtime.device_windows,
        )
        runtime.parts[part].node = self.local

    def _make_communicators(self, comm: Any) -> tuple[Communicator, list[int]]:
        """Make those of this node, and between nodes; return that of the node, and its members."""
        control = self._free_at_close(comm.Dup())
        self.control = Communicator(control, self.all.ranks, self.waiter, self.control_traffic)
        node = self._split_by_node(comm)
        self._connect_nodes(comm)
        return node

    def _free_at_close(self, comm: Any) -> Any:
        self._runtime.parts[self._part].to_free.append(comm)
        return comm

    def _split_by_node(self, comm: Any) -> tuple[Communicator, list[int]]:
        from mpi4py import MPI

        part = self._free_at_close(comm.Split_type(MPI.COMM_TYPE_SHARED, self.rank))
        if (limit := self._runtime.ranks_per_node) > 0:
            part = self._free_at_close(part.Split(part.rank // limit, self.rank))
        members: list[int] = part.allgather(self.rank)
        leaders = sorted(set(comm.allgather(members[0])))
        self.nodes = len(leaders)
        self.node = leaders.index(members[0])
        ranks = [self.all.ranks[r] for r in members]
        node = Communicator(part, ranks, self.waiter, self.control_traffic)
        self.local_rank, self.local_size = node.rank, node.size
        return node, members

    def _connect_nodes(self, comm: Any) -> None:
        from mpi4py import MPI

        sizes = comm.allgather(self.local_size)
        #: Ranks per node that take part in the exchange between nodes, each with a slice of the data.
        self.rings: int = min(sizes)
        self.max_local_size: int = max(sizes)
        ring = self.local_rank if self.local_rank < self.rings else MPI.UNDEFINED
        internode = comm.Split(ring, self.rank)
        #: The ranks with this local rank, one a node; None on ranks that take no part.
        self.internode: Communicator | None = None
        if internode != MPI.COMM_NULL:
            ranks = self._free_at_close(internode).allgather(self.global_rank)
            self.internode = Communicator(internode, ranks, self.waiter, self.traffic)

    @property
    def global_rank(self) -> int:
        """This rank in the whole job, of which this world may be a part; errors name it."""
        return self.all.ranks[self.rank]

    @property
    def tracer(self) -> NullTracer:
        """Records the events of the timeline, see `start_trace`."""
        return self.waiter.tracer

    def start_trace(self, folder: Path) -> None:
        """Trace all ranks, until the world is closed, into `trace.json` in a folder; collective.

        `HPCSGD_TRACE=FOLDER` traces from the start; later calls then have no effect.
        """
        if self.tracer.on:
            return
        part = trace_file.part_of(folder, self.rank)
        self.collectively(lambda: trace_file.clear(folder) if self.rank == 0 else None)
        file = self.collectively(lambda: part.open("wb", buffering=0))
        header = {"rank": self.rank, "host": self.host, **clock_sync.measure_offset(self.control)}
        in_communication = self.progress.in_communication_thread
        self.waiter.tracer = Tracer(file, header, self.traffic, self.activity, in_communication)
        shutdown.flush_at_exit(self.waiter.tracer)
        self.trace_folder = folder

    def _end_trace(self) -> None:
        if not self.tracer.on:
            return
        tracer, self.waiter.tracer = self.tracer, NullTracer()
        tracer.end(clock_sync.measure_offset(self.control))
        self.control.barrier("the end of the trace")
        if self.rank == 0:
            try:
                trace_file.merge(self.trace_folder)
            except (OSError, HpcsgdError) as error:  # a failed trace must not fail the run
                warnings.warn(
                    f"the parts of the trace were not merged: {error}; fix the cause and run "
                    f"`hpcsgd trace {self.trace_folder}`",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def survivors(self) -> tuple[World, RankFailed]:
        """Return a world of the ranks that have not failed, and the error; collective over them.

        This world, and all objects created with it, cannot be used or closed afterwards.
        """
        self._closed = True
        self._runtime.abandon()
        shutdown.mark_ranks_lost()
        detector = self._runtime.failure_detector
        while True:
            comm, hosts, error = detector.shrink()
            runtime = None
            try:
                runtime = Runtime(comm, hosts, self._runtime.device, self.timeout)
                runtime.connect(this_process())
                return _Survivors(runtime), error
            except Exception as failure:
                detector = ulfm.FailureDetector(comm, hosts)
                if not detector.caused(failure):
                    raise
                if runtime is not None:
                    runtime.abandon()  # another rank has failed meanwhile

    def has_lost_ranks(self, error: BaseException) -> bool:
        """Return whether ranks have failed and caused an error."""
        return self._runtime.failure_detector.caused(error)

    def split(self, color: int) -> World:
        """Return the ranks with the same color as a world of their own; collective.

        They keep their order, and share this world's threads, clocks and counters; close it before this one.
        """
        colors = self.gather(color, "the split of a world")
        split = partial(self.control.comm.Split, color, self.rank)
        comm = self._runtime.run_blocking("the split of a world", split)
        return _Subworld(self, comm, [self.all.ranks[r] for r, other in enumerate(colors) if other == color])

    def gather(self, value: object, operation: str = "a gather of small objects") -> list[Any]:
        """Return the picklable `value` of every rank, on every rank; only from the compute thread."""
        if self.size == 1:
            return [value]
        with self.progress.waiting(operation):
            return self.control.gather_objects(value, operation)

    @property
    def calls(self) -> RankCalls:
        """The place of this rank in its program, by which ranks find out that they never meet."""
        return self._runtime.stall_detector.calls

    def place(self, global_rank: int) -> RankCalls | None:
        """Return the place of another rank in its program; None where it does not answer in some seconds."""
        return self._runtime.stall_detector.place(global_rank)

    def meet(self, call: str, value: object = None) -> list[Any]:
        """Return the values of all ranks, as `gather` does, for a call that every rank must make.

        Parameters
        ----------
        call
            The call, for errors: "averaged()".
        value
            Any picklable value.

        Raises
        ------
        Disagreement
            On all ranks, where they are in different calls; on one, where others will never make this call.
        """
        if self.size == 1:
            return [value]
        calls = self.calls
        calls.calls, calls.call = calls.calls + 1, call
        try:
            rows = self.gather((call, value), call)
        finally:
            calls.call = ""
        if any(row[0] != call for row in rows):
            raise different_calls([row[0] for row in rows], self.all.ranks)
        return [row[1] for row in rows]

    @contextmanager
    def busy(self, work: str) -> Iterator[None]:
        """Context manager for long work of this rank alone: others wait for it beyond their deadline.

        Parameters
        ----------
        work
            Name of the work, for warnings.
        """
        before, self.activity.busy = self.activity.busy, work
        try:
            yield
        finally:
            self.activity.busy = before

    def collectively(self, action: Callable[[], T]) -> T:
        """Run an action that may fail on some ranks only, and raise on all ranks if it does.

        Raises
        ------
        HpcsgdError
            On all ranks, with the error of the first rank that failed.
        """
        return consistency.collectively(self.gather, action)

    def check_consistent(self, fields: Mapping[str, object]) -> None:
        """Check that each field is equal on all ranks.

        Raises
        ------
        Disagreement
            On all ranks, naming the first field that differs, its values, and the ranks.
        """
        consistency.check_consistent(self.gather, fields)

    def leave(self, reason: str, delay: float = 0.0) -> None:
        """Give this world up on this rank; local, idempotent.

        What is outstanding is completed in the background; then other ranks that wait for this one get the
        error `RankLeft`. The world is freed when all ranks have left it.

        Parameters
        ----------
        reason
            A clause for that error: "was left after ValueError".
        delay
            Seconds until the other ranks are notified. Default 0.
        """
        if not self._closed and self._owns_runtime:
            self.tracer.flush()
            self._runtime.leave(reason, delay)
        self._closed = True

    def leave_after(self, error: BaseException) -> None:
        """Give this world up after an exception, see `leave`."""
        # Others whose deadline passes at the same time report it themselves, with the states of all ranks.
        delay = _DIAGNOSIS_DELAY if isinstance(error, DeadlineExceeded) else 0.0
        text = str(error).split("\n")[0][:200]
        self.leave(f"was left after {type(error).__name__}{f': {text}' * bool(text)}", delay)

    def close(self) -> None:
        """Complete outstanding communication and free the communicators; collective, idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._owns_runtime:
            self.progress.stop()
            self._end_trace()
        else:
            self.progress.drain()
        if not shutdown.all_ranks_alive():
            return  # freeing would wait for failed ranks, see `shutdown.exit_process`
        if self._owns_runtime:
            self._runtime.stall_detector.close(self.gather)
            self._runtime.departure.receive_interruptions(self.gather)
        windows = self.local.release_windows()
        next(windows)
        self.control.barrier("the end of the world")
        next(windows, None)
        self.waiter.hooks.check()
        self.local.release()
        part = self._runtime.parts.pop(self._part)
        for communicator in part.communicators.values():
            communicator.free_duplicates()
        for comm in reversed(part.to_free):
            comm.Free()
        if self._owns_runtime:
            self._runtime.release()

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif error is not None:
            self.leave_after(error)


class _Survivors(World):
    """The ranks that are left of a world, with a runtime of their own."""

    def __init__(self, runtime: Runtime) -> None:
        self._start(runtime)


class _Subworld(World):
    """Some ranks of a world, which shares its runtime."""

    def __init__(self, whole: World, comm: Any, ranks: Sequence[int]) -> None:
        self._owns_runtime, self.device = False, whole.device
        self._connect(whole._runtime, comm, ranks, whole._runtime.add_part(comm))
