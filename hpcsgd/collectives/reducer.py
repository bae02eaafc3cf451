"""The sum of a group over all ranks, bucket by bucket as these become ready, as it is or compressed."""

from __future__ import annotations

from typing import Any

from hpcsgd.collectives import iallreduce
from hpcsgd.collectives.compressed import Compressed
from hpcsgd.compress import Compressor
from hpcsgd.mpi.progress import Work
from hpcsgd.tensors.group import Bucket, TensorGroup


class Plain:
    """Sums buckets by `iallreduce`.

    Parameters
    ----------
    group
        What is summed.
    algorithm
        See `iallreduce`.
    """

    def __init__(self, group: TensorGroup, algorithm: str) -> None:
        self._algorithm = algorithm
        self._works: list[Work] = []

    def start(self, bucket: Bucket, scale: float, number: int | None = None) -> None:
        """Start to replace a bucket by `scale` times its sum; in order, none twice before `finish`.

        Parameters
        ----------
        bucket, scale
            Of the group; the factor.
        number
            Of the reduction, which random numbers of compression follow from; the same on all ranks.
            Default: that of the step.
        """
        self._works.append(iallreduce(bucket, scale, self._algorithm))

    def finish(self) -> bool:
        """Wait for what was started; False: a number is not finite, all ranks shall skip the step."""
        works, self._works = self._works, []
        for work in works:
            work.wait()
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold, of this rank."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


def reduction(
    group: TensorGroup,
    algorithm: str,
    compressor: Compressor | None,
    seed: int = 0,
    nonfinite: str = "error",
    what: str = "gradient",
) -> Plain | Compressed:
    """What sums the buckets of `group`; collective.

    Parameters
    ----------
    group
        Summed in place.
    algorithm
        See `hpcsgd.collectives.iallreduce`.
    compressor
        None sends them as they are, and so does a single rank.
    seed
        Of the random numbers of compression; the same on all ranks.
    nonfinite
        What NaN or infinity in a compressed bucket is: an "error" on the rank that has it, or a reason for
        all ranks to "skip" the step.
    what
        What a tensor of the group is, for errors.

    Raises
    ------
    BadOption
        Where the scheme does not fit the ranks or the algorithm.
    """
    if compressor is None or group.world.size == 1:
        return Plain(group, algorithm)
    return Compressed(group, algorithm, compressor, seed, nonfinite, what)
