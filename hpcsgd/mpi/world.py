"""World: who the ranks are, where they run, and how this one talks to the others."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import socket
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from hpcsgd.diagnostics import trace_file
from hpcsgd.diagnostics.activity import Status, card
from hpcsgd.diagnostics.trace import Off, Trace
from hpcsgd.diagnostics.traffic import Traffic
from hpcsgd.errors import BadOption, Disagreement, HpcsgdError, RankFailed
from hpcsgd.mpi import clock_sync, launcher, shutdown, ulfm
from hpcsgd.mpi.communicator import Transport
from hpcsgd.mpi.progress import Progress
from hpcsgd.mpi.shared_memory import Window, Windows
from hpcsgd.mpi.stall_detector import Lookout
from hpcsgd.mpi.waiting import Waiter, timeout_from_environment

_SPINS_WITH_A_CORE_EACH = 20_000
_SPINS_ON_SHARED_CORES = 200
_SLOT_BYTES = 16 * 1024  # beyond, what each rank reads of all others costs more than a second barrier
SLICE_OF_WAIT = 50_000  # microseconds that a native wait may last before Python looks around


T = TypeVar("T")


class World:
    """The ranks of one job.

    Parameters
    ----------
    comm
        An mpi4py communicator; it is duplicated, never used itself. Default: `MPI.COMM_WORLD`.
        Without `mpiexec` this is a world of one rank.
    device
        Where models live: "cpu", "cuda", "cuda:1", or "auto" (default): `cuda:<local rank>` where
        there is one, else the CPU.
    timeout
        Seconds after which any wait ends with an error; default `HPCSGD_TIMEOUT`, or 300.

    Attributes
    ----------
    rank, size
        This rank and the number of ranks.
    node, nodes, local_rank, local_size
        The index of this rank's node, the number of nodes, and the rank and number of ranks inside it.
        `HPCSGD_RANKS_PER_NODE` splits nodes further, by socket say.

    Raises
    ------
    HpcsgdError
        Where the environment says that more ranks were started than MPI sees.
    """

    def __init__(self, comm: Any = None, *, device: str = "auto", timeout: float | None = None) -> None:
        from mpi4py import MPI

        if comm is None:
            _check_launcher(MPI)
            comm = MPI.COMM_WORLD
        timeout = timeout if timeout is not None else timeout_from_environment()
        # The first meeting of all ranks, so the one that must not wait for ever.
        private, meeting = comm.Idup()
        what = "the start of hpcsgd.World, which all ranks must reach"
        Waiter(comm.rank, timeout).until(meeting.Test, what)
        private.Set_errhandler(MPI.ERRORS_RETURN)
        self._begin(private, private.allgather(socket.gethostname()), device, timeout)

    def _begin(self, private: Any, hosts: list[str], device: str, timeout: float) -> None:
        """Take up a communicator that is nobody else's, of ranks on these hosts."""
        from mpi4py import MPI

        self._communicators: list[Any] = [private]
        self.rank: int = private.rank
        self.size: int = private.size
        self.host = hosts[self.rank]
        self._device_name, self.timeout = device, timeout
        self.status = Status()
        self.traffic = Traffic()
        self.waiter = Waiter(self.rank, self.timeout)
        self._watch = ulfm.Watch(private, hosts)
        threaded = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        self.progress = Progress(self.waiter, self.status, threaded=threaded)
        self._lookout = Lookout(self._keep(private.Dup()), self.waiter, self.status)

        def look_around() -> None:
            self._watch.look()
            self._lookout.look_around()

        self.waiter.look_around = look_around
        if not threaded and self.rank == 0:
            warnings.warn(
                "MPI gives no MPI_THREAD_MULTIPLE: communication runs in the main thread and overlaps "
                "with nothing",
                RuntimeWarning,
                stacklevel=3,
            )

        self._widest_node = _ranks_per_node()
        # Questions of a few bytes about settings, steps and metrics: not what a method sends.
        self._asides = Traffic()
        self._set_up(MPI, private, range(self.size))
        if self.size > 1:
            self._lookout.meet(self.control.gather_objects(card(), "the meeting of all ranks"))
        self.device = _device(device, self.local_rank)
        #: MPI may be given device memory: `HPCSGD_CUDA_AWARE=1`. It is never guessed, for an MPI that
        #: cannot reads it as host memory and crashes.
        self.cuda_aware = os.environ.get("HPCSGD_CUDA_AWARE", "0") == "1"
        self._whole = True
        shutdown.drain_at_exit(self.progress)
        if self.size > 1:
            shutdown.end_all_ranks_on_an_exception()
            self.progress.start()
        if folder := os.environ.get("HPCSGD_TRACE"):
            self.trace_into(Path(folder))

    @property
    def trace(self) -> Off:
        """Where events go that are worth a place in a timeline."""
        return self.waiter.trace

    def trace_into(self, folder: Path) -> None:
        """Trace all ranks, until the world is closed, into `trace.json` in a folder; collective.

        `HPCSGD_TRACE=FOLDER` does so from the beginning, and then nothing else does.
        """
        if self.trace.on:
            return
        part, progress = trace_file.part_of(folder, self.rank), self.progress
        self.together(lambda: trace_file.clear(folder) if self.rank == 0 else None)
        file = self.together(lambda: part.open("wb", buffering=0))
        about = {"rank": self.rank, "host": self.host, **clock_sync.compare(self.control)}
        self.waiter.trace = Trace(file, about, self.traffic, self.status, progress.inside)
        shutdown.flush_at_exit(self.waiter.trace)
        self.trace_folder = folder

    def _end_trace(self) -> None:
        if not self.trace.on:
            return
        trace, self.waiter.trace = self.trace, Off()
        trace.end(clock_sync.compare(self.control))
        self.control.barrier("the end of the trace")
        if self.rank == 0:
            try:
                trace_file.merge(self.trace_folder)
            except (OSError, HpcsgdError) as error:  # a run does not end for its trace
                warnings.warn(f"the parts of the trace stay apart: {error}", RuntimeWarning, stacklevel=2)

    def survivors(self) -> tuple[World, RankFailed]:
        """The ranks that are left when some have died, as a world, and the error; collective over them.

        This world, and all that was made with it, is of no use afterwards, and cannot be closed.
        """
        self._abandon()
        shutdown.leave_behind()
        watch = self._watch
        while True:
            comm, hosts, error = watch.survivors()
            left = object.__new__(World)
            try:
                left._begin(comm, hosts, self._device_name, self.timeout)
                return left, error
            except Exception as failure:
                watch = ulfm.Watch(comm, hosts)
                if not watch.explains(failure):
                    raise
                left._abandon()  # one more has died meanwhile

    def has_lost_ranks(self, error: BaseException) -> bool:
        """Whether ranks have died, and that is what an error comes from."""
        return self._watch.explains(error)

    def _abandon(self) -> None:
        self._closed = True
        self.trace.flush()
        # Whoever waits in one of them for a rank that has left it waits no longer.
        for comm in self._communicators:
            comm.Revoke()
        self.progress.abandon()

    def split(self, color: int) -> World:
        """The ranks that bring the same color as a world of their own; collective.

        They keep their order, and share this world's threads, clocks and counters; close it before this one.
        """
        from mpi4py import MPI

        part = copy.copy(self)
        part._communicators, part._whole = [], False
        with self.progress.waiting("the split of a world"):
            comm = part._keep(self.control.comm.Split(color, self.rank))
        part.rank, part.size = comm.rank, comm.size
        colors = self.gather(color, "the split of a world")
        part._set_up(MPI, comm, [self.all.ranks[r] for r, its in enumerate(colors) if its == color])
        return part

    def _set_up(self, MPI: Any, comm: Any, ranks: Sequence[int]) -> None:
        self._closed = False
        self.all = Transport(comm, ranks, self.waiter, self.traffic)
        self.control = Transport(self._keep(comm.Dup()), ranks, self.waiter, self._asides)
        self._split(MPI, comm)
        self._share_cores()
        self._set_up_barrier()

    def _split(self, MPI: Any, comm: Any) -> None:
        node = self._keep(comm.Split_type(MPI.COMM_TYPE_SHARED, self.rank))
        if self._widest_node > 0:
            node = self._keep(node.Split(node.rank // self._widest_node, self.rank))
        self.local_rank: int = node.rank
        self.local_size: int = node.size
        leaders = sorted(set(comm.allgather(node.allgather(self.rank)[0])))
        members = node.allgather(self.rank)
        self.nodes = len(leaders)
        self.node = leaders.index(members[0])
        self.members: list[int] = members
        names = self.all.ranks
        self.node_transport = Transport(node, [names[r] for r in members], self.waiter, self._asides)
        #: Ranks per node that take part in the exchange between nodes, one slice of the data each.
        sizes = comm.allgather(self.local_size)
        self.lanes: int = min(sizes)
        self.widest: int = max(sizes)
        lane = self.local_rank if self.local_rank < self.lanes else MPI.UNDEFINED
        across = comm.Split(lane, self.rank)
        self.across: Transport | None = None
        if across != MPI.COMM_NULL:
            self._keep(across)
            peers = across.allgather(names[self.rank])
            self.across = Transport(across, peers, self.waiter, self.traffic)

    def _set_up_barrier(self) -> None:
        self._windows = Windows(self.node_transport)
        if self.local_rank == 0:
            _unlink_segments_of_mpich()
        self.flags: np.ndarray | None = None
        self._slots: dict[tuple[int, np.dtype[Any]], np.ndarray] = {}
        self._turn = 0
        if self.local_size == 1:
            return
        from hpcsgd.kernels.sums import node_reduce
        from hpcsgd.kernels.sync import barrier

        window = self.window(barrier.flags_size(self.local_size))
        if window is not None:
            self.flags = window.rows[0].view(np.int32)
            for turn, slots in enumerate((self.window(_SLOT_BYTES), self.window(_SLOT_BYTES))):
                for dtype in map(np.dtype, (np.float32, np.float64)):
                    if slots is not None:
                        self._slots[turn, dtype] = slots.rows.view(dtype)
            self.compile(node_reduce.warm_up)

    def compile(self, warm_up: Callable[[], None]) -> None:
        """Let one rank of each node compile kernels, which the others then find in the cache; collective."""
        for turn in (self.local_rank == 0, self.local_rank != 0):
            if turn:
                warm_up()
            self.node_transport.barrier("the compilation of kernels")

    def _share_cores(self) -> None:
        """How many threads this rank may compute with, given who else runs on its cores."""
        mine = os.sched_getaffinity(0)
        everyone = self.node_transport.gather_objects(mine, "the comparison of core bindings")
        sharing = sum(bool(mine & other) for other in everyone)
        self.threads: int = max(1, len(mine) // sharing)
        crowded = sharing > len(mine)
        self.spins = _SPINS_ON_SHARED_CORES if crowded else _SPINS_WITH_A_CORE_EACH
        if len(mine) == 1 < len(set().union(*everyone)) and self.rank == 0:
            warnings.warn(
                "each rank is bound to one core, which its two threads share; start with "
                "`mpiexec -bind-to none` (MPICH: default), `mpiexec --bind-to none` (Open MPI) or "
                "`srun --cpu-bind=none`, or give each rank more cores",
                RuntimeWarning,
                stacklevel=2,
            )

    @property
    def name(self) -> int:
        """This rank in the whole job, of which this world may be a part: what errors call it."""
        return self.all.ranks[self.rank]

    def next_slots(self, nbytes: int, dtype: np.dtype[Any]) -> np.ndarray | None:
        """Shared rows, one a rank, for a message of `nbytes` that all ranks read; None for a larger one.

        There are two sets, taken in turn by the same calls on every rank: who writes into one has been
        through the barrier that all were through when they had read it.
        """
        if nbytes > _SLOT_BYTES or (1, dtype) not in self._slots or (0, dtype) not in self._slots:
            return None
        self._turn = 1 - self._turn
        return self._slots[self._turn, dtype]

    def window(self, nbytes: int) -> Window | None:
        """Zeroed memory of `nbytes` a rank that the node's ranks share; None where there is none.

        Collective over the node. `HPCSGD_SHARED_MEMORY=0` behaves as if there were none.
        """
        if os.environ.get("HPCSGD_SHARED_MEMORY", "1") == "0":
            return None
        return self._windows.allocate(nbytes)

    def make_barrier(self) -> NodeBarrier:
        """A barrier of the node's ranks, apart from that of `node_barrier`; collective over the node."""
        return NodeBarrier(self)

    def node_barrier(self, what: str) -> None:
        """Wait for all ranks of the node, by flags in shared memory."""
        from hpcsgd.kernels.sync import barrier

        flags = self.flags
        assert flags is not None, "only where the node has shared memory"
        target = barrier.arrive(flags, self.local_size, self.local_rank)
        self.waiter.until(
            lambda: bool(barrier.completed(flags, target, self.spins, SLICE_OF_WAIT)),
            what,
            lambda: self.missing_on_node(int(target)),
        )

    def missing_on_node(self, target: int) -> list[int]:
        """The ranks (of the job) that have not arrived at a barrier generation."""
        from hpcsgd.kernels.sync import barrier

        assert self.flags is not None
        absent = barrier.missing(self.flags, self.local_size, target)
        return [self.all.ranks[self.members[r]] for r in absent]

    def gather(self, value: object, what: str = "a gather of small objects") -> list[Any]:
        """The picklable `value` of every rank, on every rank; only from the compute thread."""
        if self.size == 1:
            return [value]
        with self.progress.waiting(what):
            return self.control.gather_objects(value, what)

    def together(self, action: Callable[[], T]) -> T:
        """Do something that may fail on some ranks only, so that it then fails on all.

        Raises
        ------
        HpcsgdError
            On all ranks alike, with the error of the first rank that failed.
        """
        try:
            result, error = action(), None
        except Exception as failure:
            error = failure
        errors = self.gather(None if error is None else _word(error), "the outcome of a common action")
        failed = [rank for rank, text in enumerate(errors) if text is not None]
        if failed:
            raise HpcsgdError(
                errors[failed[0]],
                rank=None if len(failed) == self.size else failed,
                everywhere=True,
            ) from (None if isinstance(error, HpcsgdError) else error)
        return result

    def agree(self, fields: Mapping[str, object]) -> None:
        """Check that all ranks brought the same values.

        Raises
        ------
        Disagreement
            On all ranks, naming the first field that differs, its values, and the ranks.
        """
        for name, values in _columns(self.gather(dict(fields), "the comparison of settings")):
            if all(value == values[0] for value in values):
                continue
            got, expected = first_difference(values)
            odd = [rank for rank, value in enumerate(values) if value != values[0]]
            raise Disagreement(
                f"{name} differs from that of rank 0",
                rank=odd,
                expected=f"{expected} (rank 0)",
                got=f"{got} (rank {odd[0]})",
                do="start all ranks with the same script, arguments and package versions",
                everywhere=True,
            )

    def _keep(self, comm: Any) -> Any:
        self._communicators.append(comm)
        return comm

    def close(self) -> None:
        """Finish outstanding communication and free the communicators; collective, idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._whole:
            self.progress.stop()
        else:
            self.progress.drain()
        if self._whole:
            self._end_trace()
        if not shutdown.is_complete():
            return  # see `ending.leave`
        if self._whole:
            self._lookout.close(self.gather)
        self.control.barrier("the end of the world")
        self.waiter.look_around()
        self.flags = None
        self._slots.clear()
        for transport in filter(None, (self.all, self.across, self.control)):
            transport.free_twins()
        for comm in reversed(self._communicators):
            comm.Free()

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.trace.flush()


class NodeBarrier:
    """A barrier of a node's ranks that is passed without waiting; only where they share memory.

    Parameters
    ----------
    world
        The ranks.
    """

    def __init__(self, world: World) -> None:
        from hpcsgd.kernels.sync import barrier

        self._kernels, self._ranks, self._me = barrier, world.local_size, world.local_rank
        window = world.window(barrier.flags_size(self._ranks))
        assert window is not None, "only where the node has shared memory"
        self._flags = window.rows[0].view(np.int32)

    def arrive(self) -> Callable[[], bool]:
        """Say that this rank is here; returns what tells whether all are. Not before the last one is over."""
        target = int(self._kernels.arrive(self._flags, self._ranks, self._me))
        return lambda: self._kernels.passed(self._flags, target)


def _word(error: Exception) -> str:
    return str(error) if isinstance(error, HpcsgdError) else f"{type(error).__name__}: {error}"


def _columns(rows: list[dict[str, object]]) -> list[tuple[str, list[object]]]:
    return [(name, [row.get(name) for row in rows]) for name in rows[0]]


def first_difference(values: list[object]) -> tuple[object, object]:
    """The first one that is not as the first, and the first; of lists, where these begin to differ."""
    first = values[0]
    other = next(value for value in values if value != first)
    if isinstance(first, list) and isinstance(other, list):
        for position in range(max(len(first), len(other))):
            a = first[position] if position < len(first) else "nothing"
            b = other[position] if position < len(other) else "nothing"
            if a != b:
                return f"{b} at position {position}", f"{a} at position {position}"
    return other, first


def _ranks_per_node() -> int:
    """Of `HPCSGD_RANKS_PER_NODE`; 0: all."""
    text = os.environ.get("HPCSGD_RANKS_PER_NODE", "0")
    if not text.isdigit():
        raise BadOption("HPCSGD_RANKS_PER_NODE", expected="a whole number; 0: the node", got=repr(text))
    return int(text)


def _check_launcher(MPI: Any) -> None:
    variable, count = launcher.size()
    if MPI.COMM_WORLD.size == 1 < count:
        raise HpcsgdError(
            "MPI sees one rank, but more were started",
            expected=f"{count} ranks ({variable}={count})",
            got=f"size 1, from {MPI.Get_library_version().splitlines()[0].strip()}",
            do="start with the mpiexec of the MPI that mpi4py was built for; under Slurm with "
            "`srun --mpi=pmi2` (MPICH) or `srun --mpi=pmix` (Open MPI)",
        )


def _unlink_segments_of_mpich() -> None:
    # MPICH removes its start-up segment in MPI_Finalize only, so a job that is aborted leaves it in
    # memory. All ranks of the node have mapped it by now; the name is not needed any more.
    with contextlib.suppress(OSError):
        maps = Path("/proc/self/maps").read_text()
        for segment in set(re.findall(r"/dev/shm/mpich_shm_\w+", maps)):
            os.unlink(segment)


def _device(name: str, local_rank: int) -> torch.device:
    if name != "auto":
        index = local_rank % max(1, torch.cuda.device_count())
        return torch.device("cuda", index) if name == "cuda" else torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")
