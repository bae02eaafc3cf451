"""Methods with servers and without, in one job: all have as many workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from hpcsgd import registry
from hpcsgd.mpi.world import World
from hpcsgd.strategies import STRATEGIES


def ranks_of(methods: Sequence[str], ranks: int) -> dict[str, int]:
    """How many ranks each strategy takes to have as many workers as the one with the most servers."""
    strategies = {method: registry.build(STRATEGIES, method, "strategy") for method in methods}
    workers = min(strategy.workers(ranks) for strategy in strategies.values())
    return {
        method: next(count for count in range(workers, ranks + 1) if strategy.workers(count) == workers)
        for method, strategy in strategies.items()
    }


@contextmanager
def parts_of(world: World, counts: Sequence[int]) -> Iterator[Mapping[int, World]]:
    """Worlds of the first so many ranks, by their number; collective.

    The ranks beyond get a world too, of themselves, which nobody needs.
    """
    parts = {
        count: world if count == world.size else world.split(int(world.rank >= count))
        for count in dict.fromkeys(counts)
    }
    yield parts
    for part in parts.values():
        if part is not world:
            part.close()
