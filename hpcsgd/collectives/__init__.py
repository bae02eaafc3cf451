"""Collectives on tensor groups and buckets, in mpi4py's words: `iallreduce` returns, `allreduce` waits.

Every rank calls the same collectives in the same order. A group is communicated bucket by bucket, in
order, by the communication thread. Results are bit-identical on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcsgd.collectives import mpi_library, node, ring, two_level
from hpcsgd.collectives.staging import DIRECT, staged
from hpcsgd.errors import BadOption, unknown
from hpcsgd.mpi.progress import Work
from hpcsgd.tensors.group import SUMMABLE, Bucket, TensorGroup

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
Job = Callable[..., None]

ALGORITHMS: dict[str, Callable[[Bucket, str, float], None]] = {
    "library": mpi_library.allreduce,
    "ring": ring.allreduce,
    "node": node.allreduce,
    "two-level": two_level.allreduce,
}
#: Below this many bytes a ring's 2(p-1) hops cost more than the bandwidth they save.
RING_FROM = 256 * 1024


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
    return _submit(target, "all-reduce", _allreduce, *_checked(target, scale, algorithm))


def allreduce(target: Target, scale: float | None = None, algorithm: str = "auto") -> None:
    """`iallreduce`, and wait for it."""
    _run(target, "all-reduce", _allreduce, *_checked(target, scale, algorithm))


def ibroadcast(target: Target, root: int = 0) -> Work:
    """Start to overwrite the target with that of rank `root`."""
    return _submit(target, "broadcast", _broadcast, _checked_root(target, root))


def broadcast(target: Target, root: int = 0) -> None:
    """`ibroadcast`, and wait for it."""
    _run(target, "broadcast", _broadcast, _checked_root(target, root))


def ireduce_scatter(target: Target, scale: float | None = None) -> Work:
    """Start to reduce: rank r gets `scale` (default 1/ranks) times the sum in `bucket.part(r, ranks)`.

    The rest of each bucket holds no meaningful values afterwards.
    """
    factor, _ = _checked(target, scale, "auto")
    return _submit(target, "reduce-scatter", _reduce_scatter, factor)


def reduce_scatter(target: Target, scale: float | None = None) -> None:
    """`ireduce_scatter`, and wait for it."""
    factor, _ = _checked(target, scale, "auto")
    _run(target, "reduce-scatter", _reduce_scatter, factor)


def iallgather(target: Target) -> Work:
    """Start to fill each bucket with every rank's `bucket.part(rank, ranks)`."""
    return _submit(target, "all-gather", _allgather)


def allgather(target: Target) -> None:
    """`iallgather`, and wait for it."""
    _run(target, "all-gather", _allgather)


def choose(bucket: Bucket) -> str:
    """The all-reduce algorithm that "auto" stands for, from the layout of the ranks and the size."""
    world = bucket.world
    if world.nodes == 1 and bucket.rows:
        return "node"
    if bucket.nbytes < RING_FROM:
        return "library"
    return "two-level" if bucket.rows else "ring"


def _allreduce(bucket: Bucket, what: str, scale: float, name: str) -> None:
    if bucket.world.size == 1:
        if scale != 1.0:
            bucket.host.mul_(scale)
    else:
        ALGORITHMS[choose(bucket) if name == "auto" else name](bucket, what, scale)


def _allreduce_on_device(bucket: Bucket, what: str, scale: float, name: str) -> None:
    mpi_library.allreduce_on_device(bucket, scale)


DIRECT[_allreduce] = _allreduce_on_device


def _broadcast(bucket: Bucket, what: str, root: int) -> None:
    _implementation(bucket, mpi_library).broadcast(bucket, what, root)


def _reduce_scatter(bucket: Bucket, what: str, scale: float) -> None:
    _implementation(bucket, ring).reduce_scatter(bucket, what, scale)


def _allgather(bucket: Bucket, what: str) -> None:
    _implementation(bucket, ring).allgather(bucket, what)


def _implementation(bucket: Bucket, between_nodes: Any) -> Any:
    return node if bucket.rows and bucket.world.nodes == 1 else between_nodes


def _checked(target: Target, scale: float | None, name: str) -> tuple[float, str]:
    """The factor of the sum and the algorithm, once these fit the target."""
    for bucket in _buckets(target):
        if bucket.flat.dtype not in SUMMABLE:
            raise BadOption(
                f"{bucket.names[0]} has a dtype that cannot be averaged",
                expected=", ".join(map(str, SUMMABLE)),
                got=bucket.flat.dtype,
                everywhere=True,
            )
    if name != "auto":
        check_algorithm(target, name)
    return 1.0 / target.world.size if scale is None else scale, name


def check_algorithm(target: Target, name: str) -> None:
    world = target.world
    if name not in ALGORITHMS:
        raise unknown("all-reduce algorithm", name, ["auto", *ALGORITHMS])
    if world.size == 1 or name not in ("node", "two-level"):
        return
    shared = all(bucket.rows for bucket in _buckets(target))
    if not shared or (name == "node" and world.nodes > 1):
        raise BadOption(
            f"all-reduce algorithm {name!r} does not fit",
            expected="shared memory" + (" and all ranks on one node" if name == "node" else ""),
            got=f"{world.nodes} nodes, shared memory: {'yes' if shared else 'no'}",
            do="use 'auto'",
            everywhere=True,
        )


def _checked_root(target: Target, root: int) -> int:
    size = target.world.size
    if not 0 <= root < size:
        raise BadOption("root of a broadcast", expected=f"0 to {size - 1}", got=root)
    return root


def _buckets(target: Target) -> list[Bucket]:
    return [target] if isinstance(target, Bucket) else target.buckets


def _submit(target: Target, name: str, job: Job, *arguments: Any) -> Work:
    progress, work = target.world.progress, None
    for bucket in _buckets(target):
        what = _what(name, bucket)
        work = progress.submit(what, staged(job, bucket, what, *arguments))
    # Jobs are done in order, and none after a failed one: the last stands for all.
    return work or progress.submit(f"{name} of an empty group", lambda: None)


def _run(target: Target, name: str, job: Job, *arguments: Any) -> None:
    progress = target.world.progress
    for bucket in _buckets(target):
        what = _what(name, bucket)
        progress.run(what, staged(job, bucket, what, *arguments))


def _what(name: str, bucket: Bucket) -> str:
    return f"{name} of bucket {bucket.index} at step {bucket.world.status.step}"
