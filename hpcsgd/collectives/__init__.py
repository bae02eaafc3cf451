"""Collectives on tensor groups and buckets, named as in mpi4py: `iallreduce` returns, `allreduce` waits.

Every rank must call the same collectives in the same order. The communication thread processes a group bucket
by bucket, in order. Results are bit-identical on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcsgd.collectives import mpi_library, node, ring, two_level
from hpcsgd.collectives.staging import CUDA_AWARE, Operation, via_host
from hpcsgd.errors import BadOption, unknown
from hpcsgd.mpi.progress import Work
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

ALGORITHMS: dict[str, Callable[[Bucket, str, float], None]] = {
    "library": mpi_library.allreduce,
    "ring": ring.allreduce,
    "node": node.allreduce,
    "two-level": two_level.allreduce,
}
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
        "auto" (default), "library" (the MPI library's), "ring", "node" (in the node's shared memory) or
        "two-level" (shared memory within a node, one ring a local rank between nodes).

    Returns
    -------
    Work
        Done when the whole target is reduced.

    Raises
    ------
    BadOption
        The algorithm does not exist or does not fit the layout of the ranks, or a dtype cannot be summed.
    """
    return _submit(target, "all-reduce", _allreduce, *_checked(target, scale, algorithm))


def allreduce(target: Target, scale: float | None = None, algorithm: str = "auto") -> None:
    """Run `iallreduce` and wait for it."""
    _run(target, "all-reduce", _allreduce, *_checked(target, scale, algorithm))


def ibroadcast(target: Target, root: int = 0) -> Work:
    """Start to overwrite the target with that of rank `root` (default 0).

    Raises
    ------
    BadOption
        `root` is no rank.
    """
    return _submit(target, "broadcast", _broadcast, _checked_root(target, root))


def broadcast(target: Target, root: int = 0) -> None:
    """Run `ibroadcast` and wait for it."""
    _run(target, "broadcast", _broadcast, _checked_root(target, root))


def ireduce_scatter(target: Target, scale: float | None = None) -> Work:
    """Start to set `bucket.part(r, ranks)` on rank r to `scale` (default 1/ranks) times its sum.

    The other elements of each bucket are undefined afterwards.

    Raises
    ------
    BadOption
        A dtype cannot be summed.
    """
    factor, _ = _checked(target, scale, "auto")
    return _submit(target, "reduce-scatter", _reduce_scatter, factor)


def reduce_scatter(target: Target, scale: float | None = None) -> None:
    """Run `ireduce_scatter` and wait for it."""
    factor, _ = _checked(target, scale, "auto")
    _run(target, "reduce-scatter", _reduce_scatter, factor)


def iallgather(target: Target) -> Work:
    """Start to fill each bucket with `bucket.part(r, ranks)` of every rank r."""
    return _submit(target, "all-gather", _allgather)


def allgather(target: Target) -> None:
    """Run `iallgather` and wait for it."""
    _run(target, "all-gather", _allgather)


def choose_algorithm(bucket: Bucket) -> str:
    """Return the all-reduce algorithm of "auto", by the layout of the ranks and the size of the bucket."""
    world = bucket.world
    if world.nodes == 1 and bucket.rows:
        return "node"
    if bucket.nbytes < RING_MIN_BYTES:
        return "library"
    return "two-level" if bucket.rows else "ring"


def _allreduce(bucket: Bucket, operation: str, scale: float, name: str) -> None:
    if bucket.world.size == 1:
        if scale != 1.0:
            bucket.host.mul_(scale)
    else:
        ALGORITHMS[choose_algorithm(bucket) if name == "auto" else name](bucket, operation, scale)


def _allreduce_on_device(bucket: Bucket, operation: str, scale: float, name: str) -> None:
    mpi_library.allreduce_on_device(bucket, scale)


CUDA_AWARE[_allreduce] = _allreduce_on_device


def _broadcast(bucket: Bucket, operation: str, root: int) -> None:
    _implementation(bucket, mpi_library).broadcast(bucket, operation, root)


def _reduce_scatter(bucket: Bucket, operation: str, scale: float) -> None:
    _implementation(bucket, ring).reduce_scatter(bucket, operation, scale)


def _allgather(bucket: Bucket, operation: str) -> None:
    _implementation(bucket, ring).allgather(bucket, operation)


def _implementation(bucket: Bucket, between_nodes: Any) -> Any:
    return node if bucket.rows and bucket.world.nodes == 1 else between_nodes


def _checked(target: Target, scale: float | None, name: str) -> tuple[float, str]:
    """Check the arguments, and return the factor of the sum and the name of the algorithm."""
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
    return 1.0 / target.world.size if scale is None else scale, name


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


def _submit(target: Target, kind: str, operation: Operation, *arguments: Any) -> Work:
    progress, work = target.world.progress, None
    for bucket in _buckets(target):
        name = _operation_name(kind, bucket)
        work = progress.submit(name, via_host(operation, bucket, name, *arguments))
    # Jobs are executed in order, and none after a failed one, so the last work represents all.
    return work or progress.submit(f"{kind} of an empty group", lambda: None)


def _run(target: Target, kind: str, operation: Operation, *arguments: Any) -> None:
    progress = target.world.progress
    for bucket in _buckets(target):
        name = _operation_name(kind, bucket)
        progress.run(name, via_host(operation, bucket, name, *arguments))


def _operation_name(kind: str, bucket: Bucket) -> str:
    return f"{kind} of bucket {bucket.index} at step {bucket.world.activity.step}"
