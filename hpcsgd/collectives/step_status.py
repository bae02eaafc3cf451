"""The status of a step: numbers that must be equal on all ranks, and flags of which one rank's is enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from hpcsgd.errors import Disagreement, HpcsgdError
from hpcsgd.mpi.rank_calls import EQUAL_PASSES, RankCalls
from hpcsgd.mpi.world import World

#: Numbers that are equal on all ranks in each step, and the remedy where they are not.
REMEDIES = {
    "number of steps": "call run.step(), or run.skip(), once for each batch on every rank",
    "number of batches": "take equally many batches in each step on every rank: call run.step(), or "
    "run.skip() where the step is left out; one of several batches of a step is left out by going on",
    "number of backward passes in this step": EQUAL_PASSES,
    "list of trained parameters": "freeze, unfreeze and add parameters in the same step on every rank",
    "use of run.step(weight=...)": "pass a weight on every rank or on none",
}


class StepStatus:
    """Compares numbers over all ranks and combines flags, by one all-reduce of a few bytes.

    The bitwise or of a number and of its complement show whether it is the same on all ranks.

    Parameters
    ----------
    world
        The ranks; collective when made.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._communicator = world.control.dup("status of steps")

    def exchange(self, numbers: Mapping[str, int], flags: np.ndarray, operation: str) -> np.ndarray:
        """Return for each flag whether a rank has set it; collective.

        Parameters
        ----------
        numbers
            Numbers of 64 bits, by keys of `REMEDIES`, in an order that is the same on all ranks.
        flags
            (any,), bool.
        operation
            The operation, for errors.

        Raises
        ------
        Disagreement
            On all ranks, where a number differs: with its name, its values and the ranks.
        """
        equal, flags = self._combine(numbers, flags, operation)
        if not equal:
            raise self._difference(numbers)
        return flags

    def are_equal(self, numbers: Mapping[str, int], operation: str) -> bool:
        """Return whether numbers of 64 bits are equal on all ranks; collective."""
        return self._combine(numbers, np.zeros(0, np.bool_), operation)[0]

    def of_others(self, is_awaited: Callable[[RankCalls], bool] = lambda place: False) -> RankCalls | None:
        """Return the place of a rank that takes this step, for one that leaves it out; None: no rank does.

        Waits until that rank has completed its backward passes, or has begun one more than this rank has
        taken part in.

        Parameters
        ----------
        is_awaited
            Whether a rank at this place waits for this one elsewhere: the wait ends too. Default: never.
        """
        world, found = self._world, list[RankCalls]()
        others = [rank for rank in world.all.ranks if rank != world.global_rank]

        def is_known() -> bool:
            found.clear()
            while others:
                place = world.place(others[0])
                if place is None or not place.in_step or place.steps != world.calls.steps:
                    return False
                if not place.skipping:
                    found.append(place)
                    return place.completing or place.passes > world.calls.passes or is_awaited(place)
                others.pop(0)
            return True

        operation = f"the backward passes of other ranks in step {world.activity.step}"
        world.progress.until(is_known, operation, lambda: others[:1])
        return found[0] if found else None

    def _combine(
        self, numbers: Mapping[str, int], flags: np.ndarray, operation: str
    ) -> tuple[bool, np.ndarray]:
        if self._world.size == 1:
            return True, flags
        words = np.fromiter(numbers.values(), np.int64, len(numbers))
        message = np.concatenate([np.concatenate([words, ~words]).view(np.uint8), np.packbits(flags)])
        self._world.progress.run(operation, lambda: self._communicator.allreduce(message, operation, "BOR"))
        size = 16 * len(words)
        ones, zeros = message[:size].view(np.int64).reshape(2, -1)
        combined = np.unpackbits(message[size:], count=len(flags)).astype(np.bool_)
        return bool((ones == ~zeros).all()), combined

    def _difference(self, numbers: Mapping[str, int]) -> HpcsgdError:
        rows = self._world.gather(dict(numbers), "the comparison of a step")
        for name in numbers:
            values = [row[name] for row in rows]
            # The first rank of the majority is right.
            right = max(range(len(values)), key=lambda rank: (values.count(values[rank]), -rank))
            ranks = [rank for rank, value in enumerate(values) if value != values[right]]
            if ranks:
                reference = self._world.all.ranks[right]
                return Disagreement(
                    f"the {name} differs from that of rank {reference}, in step {self._world.activity.step}",
                    rank=[self._world.all.ranks[rank] for rank in ranks],
                    expected=f"{values[right]} (rank {reference})",
                    got=f"{values[ranks[0]]} (rank {self._world.all.ranks[ranks[0]]})",
                    do=REMEDIES[name],
                    everywhere=True,
                )
        raise AssertionError("equal numbers")
