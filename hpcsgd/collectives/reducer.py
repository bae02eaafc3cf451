"""Reduction of a tensor group over all ranks, bucket by bucket as they become ready, plain or compressed."""

from __future__ import annotations

from typing import Any

from hpcsgd.collectives import iallreduce
from hpcsgd.collectives.compressed import CompressedReducer
from hpcsgd.compress.base import Compressor
from hpcsgd.mpi.tasks import Work
from hpcsgd.tensors.group import Bucket, TensorGroup


class PlainReducer:
    """Sums buckets without compression, by `iallreduce`.

    Parameters
    ----------
    group
        The group to be summed.
    algorithm
        See `iallreduce`.
    """

    def __init__(self, group: TensorGroup, algorithm: str) -> None:
        self._algorithm = algorithm
        self._works: list[Work] = []

    def start(self, bucket: Bucket, scale: float, sequence_number: int | None = None) -> None:
        """Start to replace a bucket by `scale` times its sum; in order, none twice before `finish`.

        Parameters
        ----------
        bucket
            A bucket of the group.
        scale
            Factor of the sum.
        sequence_number
            Number of the reduction, from which compression derives its random numbers; equal on all ranks.
            Default: the current step.
        """
        self._works.append(iallreduce(bucket, scale, self._algorithm))

    def finish(self) -> bool:
        """Wait for all started sums; False: a value is not finite, and all ranks must skip the step."""
        works, self._works = self._works, []
        for work in works:
            work.wait()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank to be saved in a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""


def make_reducer(
    group: TensorGroup,
    algorithm: str,
    compressor: Compressor | None,
    seed: int = 0,
    nonfinite: str = "error",
    kind: str = "gradient",
) -> PlainReducer | CompressedReducer:
    """Create the reducer of a group; collective.

    Parameters
    ----------
    group
        The group, to be summed in place.
    algorithm
        See `hpcsgd.collectives.iallreduce`.
    compressor
        The compression scheme; None for no compression. A single rank does not compress.
    seed
        Seed of the random numbers of compression, equal on all ranks. Default 0.
    nonfinite
        Treatment of NaN and infinity in a compressed bucket: "error" (default) on the rank that holds it, or
        "skip", to skip the step on all ranks.
    kind
        Meaning of the tensors, for errors. Default "gradient".

    Raises
    ------
    BadOption
        The scheme does not fit the ranks or the algorithm.
    """
    if compressor is None or group.world.size == 1:
        return PlainReducer(group, algorithm)
    return CompressedReducer(group, algorithm, compressor, seed, nonfinite, kind)
