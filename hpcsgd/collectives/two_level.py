"""The two-level all-reduce: shared memory inside each node, rings between nodes.

Each local rank owns one slice of the bucket, sums it over its node and takes it round a ring of the
ranks that own the same slice elsewhere: as many rings at once as the node has ranks (the multi-ring of
arXiv 1801.03855, on slices of the reduced node vector). Nodes of different size have as many rings as
the smallest one has ranks.
"""

from __future__ import annotations

from hpcsgd.collectives import node
from hpcsgd.collectives.ring import Ring
from hpcsgd.tensors.group import Bucket


def allreduce(bucket: Bucket, what: str, scale: float) -> None:
    """Sum the bucket over all ranks of all nodes."""
    world = bucket.world
    lane = min(world.local_rank, world.lanes)
    # Ranks beyond the last ring own nothing, but all wait for the node's buffers to be ready and done.
    part = bucket.part(lane, world.lanes) if world.across else slice(0, 0)
    if world.local_size > 1:
        world.node_barrier(what)
        # Scaled here, before the sums between nodes, which half precision would overflow.
        node.reduce(bucket, part, scale, to_all=False)
    elif scale != 1.0:
        bucket.host[part].mul_(scale)
    if world.across:
        Ring(world.across, bucket.host[part], what).allreduce(1.0)
    if world.local_size > 1:
        node.spread(bucket, part)
        world.node_barrier(what)
