"""Collectives on tensor groups and buckets, in mpi4py's words: `iallreduce` returns, `allreduce` waits.

Every rank calls the same collectives in the same order. A group is communicated bucket by bucket, in
order, by the communication thread. Results are bit-identical on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from hpcsgd.collectives import library, node, ring, two_level
from hpcsgd.collectives.stage import staged
from hpcsgd.errors import BadOption, unknown
from hpcsgd.progress import Work
from hpcsgd.tensors import SUMMABLE, Bucket, TensorGroup
from hpcsgd.world import World

__all__ = [
    "ALGORITHMS",
    "allgather",
    "allreduce",
    "broadcast",
    "choose",
    "iallgather",
    "iallreduce",
    "ibroadcast",
    "ireduce_scatter",
    "reduce_scatter",
]

Target = TensorGroup | Bucket
Job = Callable[[Bucket, str], None]

ALGORITHMS: dict[str, Callable[[Bucket, str, float], None]] = {
    "library": library.allreduce,
    "ring": ring.allreduce,
    "node": node.allreduce,
    "two-level": two_level.allreduce,
}
#: Below this many bytes a ring's 2(p-1) hops cost more than the bandwidth they save.
RING_FROM = 128 * 1024


def iallreduce(target: Target, scale: float | None = None, algorithm: str = "auto") -> Work:
    """Start to replace each element by `scale` times its sum over all ranks.

    Parameters
    ----------
    target
        A group, or one of its buckets.
    scale
        Factor of the sum; default 1/ranks, the mean. Half precisions are summed in float32 inside a
        node and scaled before they are summed between nodes, so a mean in float16 does not overflow.
    algorithm
        "auto" (default), "library" (MPI's own), "ring", "node" (in the node's shared memory) or
        "two-level" (shared memory inside a node, one ring per local rank between nodes).

    Returns
    -------
    Work
        Over when the whole target is reduced.

    Raises
    ------
    BadOption
        For an algorithm that does not exist, or that the layout of the ranks does not allow.
    """
    job, direct = _allreduce_job(target, scale, algorithm)
    return _submit(target, "all-reduce", job, direct)


def allreduce(target: Target, scale: float | None = None, algorithm: str = "auto") -> None:
    """`iallreduce`, and wait for it."""
    job, direct = _allreduce_job(target, scale, algorithm)
    _run(target, "all-reduce", job, direct)


def ibroadcast(target: Target, root: int = 0) -> Work:
    """Start to overwrite the target with that of rank `root`."""
    return _submit(target, "broadcast", _broadcast_job(target, root))


def broadcast(target: Target, root: int = 0) -> None:
    """`ibroadcast`, and wait for it."""
    _run(target, "broadcast", _broadcast_job(target, root))


def ireduce_scatter(target: Target, scale: float | None = None) -> Work:
    """Start to reduce: rank r gets `scale` (default 1/ranks) times the sum in `bucket.part(r, ranks)`.

    The rest of each bucket holds no meaningful values afterwards.
    """
    return _submit(target, "reduce-scatter", _scatter_job(target, scale))


def reduce_scatter(target: Target, scale: float | None = None) -> None:
    """`ireduce_scatter`, and wait for it."""
    _run(target, "reduce-scatter", _scatter_job(target, scale))


def iallgather(target: Target) -> Work:
    """Start to fill each bucket with every rank's `bucket.part(rank, ranks)`."""
    return _submit(target, "all-gather", _gather_job(target))


def allgather(target: Target) -> None:
    """`iallgather`, and wait for it."""
    _run(target, "all-gather", _gather_job(target))


def choose(bucket: Bucket) -> str:
    """The all-reduce algorithm that "auto" stands for, from the layout of the ranks and the size."""
    world = bucket.world
    if world.nodes == 1 and bucket.rows:
        return "node"
    if bucket.nbytes < RING_FROM:
        return "library"
    return "two-level" if bucket.rows else "ring"


def _allreduce_job(target: Target, scale: float | None, name: str) -> tuple[Job, Job | None]:
    world = target.world
    factor = 1.0 / world.size if scale is None else scale
    if name not in ("auto", *ALGORITHMS):
        raise unknown("all-reduce algorithm", name, ["auto", *ALGORITHMS])
    _check_layout(world, name, _buckets(target))
    _check_summable(target)

    def job(bucket: Bucket, what: str) -> None:
        if world.size == 1:
            if factor != 1.0:
                bucket.host.mul_(factor)
        else:
            ALGORITHMS[choose(bucket) if name == "auto" else name](bucket, what, factor)

    def direct(bucket: Bucket, what: str) -> None:
        library.allreduce_on_device(bucket, factor)

    # MPI has no half precision: those go through the host, whatever MPI is given.
    wide = all(bucket.flat.element_size() >= 4 for bucket in _buckets(target))
    return job, direct if wide else None


def _check_layout(world: World, name: str, buckets: list[Bucket]) -> None:
    shared = all(bucket.rows for bucket in buckets)
    if world.size == 1 or name not in ("node", "two-level"):
        return
    if not shared or (name == "node" and world.nodes > 1):
        raise BadOption(
            f"all-reduce algorithm {name!r} does not fit",
            expected="shared memory" + (" and all ranks on one node" if name == "node" else ""),
            got=f"{world.nodes} nodes, shared memory: {'yes' if shared else 'no'}",
            do="use 'auto'",
            everywhere=True,
        )


def _broadcast_job(target: Target, root: int) -> Job:
    size = target.world.size
    if not 0 <= root < size:
        raise BadOption("root of a broadcast", expected=f"0 to {size - 1}", got=root)

    def job(bucket: Bucket, what: str) -> None:
        if bucket.rows and target.world.nodes == 1:
            node.broadcast(bucket, what, root)
        else:
            library.broadcast(bucket, what, root)

    return job


def _check_summable(target: Target) -> None:
    for bucket in _buckets(target):
        if bucket.flat.dtype not in SUMMABLE:
            raise BadOption(
                f"{bucket.names[0]} has a dtype that cannot be averaged",
                expected=", ".join(map(str, SUMMABLE)),
                got=bucket.flat.dtype,
                everywhere=True,
            )


def _scatter_job(target: Target, scale: float | None) -> Job:
    _check_summable(target)
    factor = 1.0 / target.world.size if scale is None else scale

    def job(bucket: Bucket, what: str) -> None:
        by = node if bucket.rows and target.world.nodes == 1 else ring
        by.reduce_scatter(bucket, what, factor)

    return job


def _gather_job(target: Target) -> Job:
    def job(bucket: Bucket, what: str) -> None:
        by = node if bucket.rows and target.world.nodes == 1 else ring
        by.allgather(bucket, what)

    return job


def _buckets(target: Target) -> list[Bucket]:
    return [target] if isinstance(target, Bucket) else target.buckets


def _submit(target: Target, name: str, job: Job, direct: Job | None = None) -> Work:
    progress, work = target.world.progress, None
    for what, run in _jobs(target, name, job, direct):
        work = progress.submit(what, run)
    # Jobs are done in order, and none after a failed one: the last stands for all.
    return work or progress.submit(f"{name} of an empty group", lambda: None)


def _run(target: Target, name: str, job: Job, direct: Job | None = None) -> None:
    for what, run in _jobs(target, name, job, direct):
        target.world.progress.run(what, run)


def _jobs(
    target: Target, name: str, job: Job, direct: Job | None
) -> Iterator[tuple[str, Callable[[], None]]]:
    for bucket in _buckets(target):
        what = f"{name} of {bucket} at step {target.world.status.step}"
        on_device = partial(direct, bucket, what) if direct else None
        yield what, staged(bucket, partial(job, bucket, what), on_device)
