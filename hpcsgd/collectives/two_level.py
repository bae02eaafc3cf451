"""Two-level all-reduce: memory that its ranks share within each node, rings between nodes.

Each local rank owns one slice of the bucket, sums it over its node, and all-reduces it by a ring of the ranks
that own the same slice on the other nodes: one ring for each rank of a node, at the same time (the multi-ring
of arXiv 1801.03855; our reading: on slices of the sum of a node). The smallest node determines the number of
rings.
"""

from __future__ import annotations

from hpcsgd.collectives import node
from hpcsgd.collectives.ring import RingCollective
from hpcsgd.collectives.staging import on_host
from hpcsgd.mpi.tasks import Steps
from hpcsgd.tensors.group import Bucket


def allreduce(bucket: Bucket, scale: float) -> Steps[None]:
    """Sum the bucket over all ranks of all nodes."""
    world = bucket.world
    ring = min(world.local_rank, world.rings)
    # Ranks beyond the last ring own no slice, but pass the barriers before and after the node's reduction.
    part = bucket.part(ring, world.rings) if world.internode else slice(0, 0)
    if world.local_size > 1:
        yield node.barrier(bucket)
        # Scaled before the sums between nodes, which would overflow in half precision.
        node.reduce(bucket, part, scale, to_all=False)
    elif scale != 1.0:
        bucket.own_row[part].mul_(scale)
    if world.internode:
        with on_host(bucket, part) as values:
            yield from RingCollective(world.internode, values).allreduce(1.0)
    if world.local_size > 1:
        node.copy_to_node(bucket, part)
        yield node.barrier(bucket)
