"""Collectives on tensor groups and buckets, named as in mpi4py: `iallreduce` returns, `allreduce` waits.

Every rank must call the same collectives in the same order. The communication thread processes a group bucket
by bucket, in order. Results are bit-identical on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hpcsgd.collectives import mpi_library, node, ring, two_level
from hpcsgd.collectives.staging import CUDA_AWARE, IN_WINDOWS, Operation, after_compute, via_host
from hpcsgd.errors import BadOption, unknown
from hpcsgd.mpi.tasks import Steps, Work
from hpcsgd.tensors.group import SUMMABLE, Bucket, TensorGroup

__all__ = [
    "ALGORITHMS",
    "allgather",
    "allreduce",
    "broadcast",
    "choose_algorithm",
    "iallgather",
    "iallreduce",
    "ibroadcast",
    "ireduce_scatter",
    "reduce_scatter",
]

Target = TensorGroup | Bucket

ALGORITHMS: dict[str, Callable[[Bucket, float], Steps[None]]] = {
    "library": mpi_library.allreduce,
    "ring": ring.allreduce,
    "node": node.allreduce,
    "two-level": two_level.allreduce,
}
CUDA_AWARE |= dict.fromkeys(ALGORITHMS.values(), mpi_library.allreduce_on_device)
IN_WINDOWS |= {node.allreduce, node.broadcast, node.reduce_scatter, node.allgather, two_level.allreduce}
#: Below this size the 2(p-1) hops of a ring cost more than the bandwidth that it saves.
RING_MIN_BYTES = 256 * 1024


def iallreduce(target: Target, scale: float | None = None, algorithm: str = "auto") -> Work:
    """Start to replace each element by `scale` times its sum over all ranks.

    Parameters
    ----------
    target
        A group, or one of its buckets.
    scale
        Factor of the sum; default 1/ranks, the mean. Half precisions are summed in float32 within a node and
        scaled before they are summed between nodes, so a mean in float16 does not overflow.
    algorithm
        "auto" (default), "library" (the MPI library's), "ring", "node" (in memory that the ranks of the node
        share: of the host, or on a GPU windows of device memory) or "two-level" (that within a node, one
        ring a local rank between nodes).

    Returns
    -------
    Work
        Done when the whole target is reduced.

    Raises
    ------
    BadOption
        The algorithm does not exist or does not fit the layout of the ranks, or a dtype cannot be summed.
    """
    factor = _checked(target, scale, algorithm)
    return _submit(target, "all-reduce", partial(_choose_allreduce, algorithm), factor)


def allreduce(target: Target, scale: float | None = None, algorithm: str = "auto") -> None:
    """Run `iallreduce` and wait for it."""
    factor = _checked(target, scale, algorithm)
    _run(target, "all-reduce", partial(_choose_allreduce, algorithm), factor)


def ibroadcast(target: Target, root: int = 0) -> Work:
    """Start to overwrite the target with that of rank `root` (default 0).

    Raises
    ------
    BadOption
        `root` is no rank.
    """
    return _submit(target, "broadcast", _choose_broadcast, _checked_root(target, root))


def broadcast(target: Target, root: int = 0) -> None:
    """Run `ibroadcast` and wait for it."""
    _run(target, "broadcast", _choose_broadcast, _checked_root(target, root))


def ireduce_scatter(target: Target, scale: float | None = None) -> Work:
    """Start to set `bucket.part(r, ranks)` on rank r to `scale` (default 1/ranks) times its sum.

    The other elements of each bucket are undefined afterwards.

    Raises
    ------
    BadOption
        A dtype cannot be summed.
    """
    return _submit(target, "reduce-scatter", _choose_reduce_scatter, _checked(target, scale))


def reduce_scatter(target: Target, scale: float | None = None) -> None:
    """Run `ireduce_scatter` and wait for it."""
    _run(target, "reduce-scatter", _choose_reduce_scatter, _checked(target, scale))


def iallgather(target: Target) -> Work:
    """Start to fill each bucket with `bucket.part(r, ranks)` of every rank r."""
    return _submit(target, "all-gather", _choose_allgather)


def allgather(target: Target) -> None:
    """Run `iallgather` and wait for it."""
    _run(target, "all-gather", _choose_allgather)


def choose_algorithm(bucket: Bucket) -> str:
    """Return the all-reduce algorithm of "auto", by the layout of the ranks and the size of the bucket."""
    world = bucket.world
    if world.nodes == 1 and bucket.rows:
        return "node"
    if bucket.nbytes < RING_MIN_BYTES:
        return "library"
    return "two-level" if bucket.rows else "ring"


def _choose_allreduce(name: str, bucket: Bucket) -> Operation:
    if bucket.world.size == 1:
        return _scale
    return ALGORITHMS[choose_algorithm(bucket) if name == "auto" else name]


def _scale(bucket: Bucket, scale: float) -> None:
    if scale != 1.0:
        bucket.flat.mul_(scale)


def _choose_broadcast(bucket: Bucket) -> Operation:
    return node.broadcast if _is_inside_node(bucket) else mpi_library.broadcast


def _choose_reduce_scatter(bucket: Bucket) -> Operation:
    return node.reduce_scatter if _is_inside_node(bucket) else ring.reduce_scatter


def _choose_allgather(bucket: Bucket) -> Operation:
    return node.allgather if _is_inside_node(bucket) else ring.allgather


def _is_inside_node(bucket: Bucket) -> bool:
    return bool(bucket.rows) and bucket.world.nodes == 1


def _checked(target: Target, scale: float | None, name: str = "auto") -> float:
    """Check the arguments, and return the factor of the sum."""
    for bucket in _buckets(target):
        if bucket.flat.dtype not in SUMMABLE:
            raise BadOption(
                f"tensor {bucket.names[0]} has a dtype that cannot be averaged",
                expected=", ".join(map(str, SUMMABLE)),
                got=bucket.flat.dtype,
                do="convert the tensor to one of these dtypes, or leave it out of the TensorGroup",
                everywhere=True,
            )
    if name != "auto":
        check_algorithm(target, name)
    return 1.0 / target.world.size if scale is None else scale


def check_algorithm(target: Target, name: str) -> None:
    """Raise `BadOption` for an all-reduce algorithm that does not exist or does not fit the target."""
    world = target.world
    if name not in ALGORITHMS:
        raise unknown("all-reduce algorithm", name, ["auto", *ALGORITHMS])
    if world.size == 1 or name not in ("node", "two-level"):
        return
    shared = all(bucket.rows for bucket in _buckets(target))
    if not shared or (name == "node" and world.nodes > 1):
        raise BadOption(
            f"all-reduce algorithm {name!r} does not fit the layout of the ranks",
            expected="shared memory" + (" and all ranks on one node" if name == "node" else ""),
            got=f"{world.nodes} nodes, shared memory: {'yes' if shared else 'no'}",
            do="use algorithm 'auto' (--algorithm auto)",
            everywhere=True,
        )


def _checked_root(target: Target, root: int) -> int:
    size = target.world.size
    if not 0 <= root < size:
        raise BadOption(
            "the root of a broadcast is not one of the ranks", expected=f"0 to {size - 1}", got=root
        )
    return root


def _buckets(target: Target) -> list[Bucket]:
    return [target] if isinstance(target, Bucket) else target.buckets


def _submit(target: Target, kind: str, choose: Callable[[Bucket], Operation], *arguments: Any) -> Work:
    progress, work = target.world.progress, None
    for bucket in _buckets(target):
        name = _operation_name(kind, bucket)
        work = progress.submit(name, _job(choose(bucket), bucket, *arguments))
    # Jobs are executed in order, and none after a failed one, so the last work represents all.
    return work or progress.submit(f"{kind} of an empty group", lambda: None)


def _run(target: Target, kind: str, choose: Callable[[Bucket], Operation], *arguments: Any) -> None:
    progress = target.world.progress
    for bucket in _buckets(target):
        name = _operation_name(kind, bucket)
        progress.run(name, _job(choose(bucket), bucket, *arguments))


def _job(operation: Operation, bucket: Bucket, *arguments: Any) -> Callable[[], object]:
    if operation is _scale:  # a single rank, which communicates nothing
        return after_compute(bucket.flat.device, partial(operation, bucket, *arguments))
    return via_host(operation, bucket, *arguments)


def _operation_name(kind: str, bucket: Bucket) -> str:
    return f"{kind} of bucket {bucket.index} at step {bucket.world.activity.step}"
