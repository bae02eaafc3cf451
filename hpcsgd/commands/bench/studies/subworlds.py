"""Methods with and without servers in one job, all with the same number of workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from hpcsgd.mpi.world import World
from hpcsgd.strategies import build


def ranks_per_method(methods: Sequence[str], ranks: int) -> dict[str, int]:
    """The number of ranks of each strategy with which all have equally many workers, as many as possible.

    Parameters
    ----------
    methods
        Strategy specs.
    ranks
        The ranks of the job.
    """
    strategies = {method: build(method) for method in methods}
    workers = min(strategy.workers(ranks) for strategy in strategies.values())
    return {
        method: next(count for count in range(workers, ranks + 1) if strategy.workers(count) == workers)
        for method, strategy in strategies.items()
    }


@contextmanager
def split_worlds(world: World, counts: Sequence[int]) -> Iterator[Mapping[int, World]]:
    """Context with a world of the first `count` ranks for each of `counts`; collective.

    The remaining ranks get a world of their own, which is unused.
    """
    subworlds = {
        count: world if count == world.size else world.split(int(world.rank >= count))
        for count in dict.fromkeys(counts)
    }
    yield subworlds
    for subworld in subworlds.values():
        if subworld is not world:
            subworld.close()
