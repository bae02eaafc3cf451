"""Simulated computation times of gradients, to study stragglers; the same on every rank. NumPy only."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from hpcsgd import registry
from hpcsgd.errors import BadOption
from hpcsgd.registry import Within
from hpcsgd.registry.limits import Natural, Seconds, Seed

_LONGEST = 1e9  # seconds, which a process can sleep


class Delays(ABC):
    """A distribution of the seconds that each gradient of each peer takes.

    A sample is a function of peer and number alone: every rank can compute those of all peers, in any order.
    A distribution with options is a dataclass, whose fields are these.

    Attributes
    ----------
    slow
        Peers that are slower than the others; none by default.
    """

    slow = range(0)

    def __post_init__(self) -> None:
        registry.check_fields(self)

    def sample(self, peer: int, number: int) -> float:
        """Return the seconds, at most 1e9, of gradient `number`, from 0, of a peer."""
        return min(self._seconds(peer, number), _LONGEST)

    @abstractmethod
    def _seconds(self, peer: int, number: int) -> float: ...

    def check_peers(self, size: int) -> None:
        """Raise `BadOption` on all ranks if slow peers are not among `size` peers; of one any may be."""
        if size > 1 and self.slow.stop > size:
            raise BadOption(
                "options peer and count of the delays 'slow' name peers that do not exist",
                expected=f"some of the peers 0 to {size - 1}",
                got=f"peer={self.slow.start}, count={len(self.slow)}",
                everywhere=True,
            )

    def clamp_to(self, size: int) -> None:
        """Keep the slow peers among the first `size`, because others have failed."""
        self.slow = range(min(self.slow.start, size), min(self.slow.stop, size))


class NoDelay(Delays):
    """Gradients take no time."""

    def _seconds(self, peer: int, number: int) -> float:
        return 0.0


@dataclass(eq=False)
class ConstantDelay(Delays):
    """All gradients take equally long.

    Parameters
    ----------
    seconds
        Time of a gradient, at least 0. Default 1.
    """

    seconds: Seconds = 1.0

    def _seconds(self, peer: int, number: int) -> float:
        return self.seconds


@dataclass(eq=False)
class SlowPeers(Delays):
    """One peer, or several with consecutive numbers, are slower than the others.

    Parameters
    ----------
    peer
        Number of the first slow peer. Default 0.
    factor
        Ratio of the slow peers' time to that of the others, at least 0. Default 4.
    seconds
        Time of a gradient of the other peers. Default 1.
    count
        Number of slow peers. Default 1.
    """

    peer: Natural = 0
    factor: Annotated[float, Within(0, 1e9)] = 4.0
    seconds: Seconds = 1.0
    count: Natural = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.slow = range(self.peer, self.peer + self.count)

    def _seconds(self, peer: int, number: int) -> float:
        return self.seconds * (self.factor if peer in self.slow else 1.0)


@dataclass(eq=False)
class ExponentialDelay(Delays):
    """An exponentially distributed time added to `base`.

    Parameters
    ----------
    mean
        Mean of the added time, in seconds. Default 1.
    base
        Minimum of every gradient, in seconds. Default 0.
    seed
        Seed of the samples. Default 0.
    """

    mean: Seconds = 1.0
    base: Seconds = 0.0
    seed: Seed = 0

    def _seconds(self, peer: int, number: int) -> float:
        return self.base - self.mean * math.log(_uniform(self.seed, peer, number))


@dataclass(eq=False)
class ParetoDelay(Delays):
    """A heavy-tailed time added to `base`: P(more than t) = (scale / t) ** shape for t above scale.

    Parameters
    ----------
    shape
        At least 0.06; the smaller, the heavier the tail: the variance is infinite up to 2, the mean up to 1.
        Default 1.5.
    scale
        Minimum of the added time, in seconds. Default 1.
    base
        Constant part of every gradient's time, in seconds. Default 0.
    seed
        Seed of the samples. Default 0.
    """

    shape: Annotated[float, Within(0.06, 1e3)] = 1.5  # below, the largest sample overflows
    scale: Seconds = 1.0
    base: Seconds = 0.0
    seed: Seed = 0

    def _seconds(self, peer: int, number: int) -> float:
        return self.base + self.scale * math.pow(_uniform(self.seed, peer, number), -1 / self.shape)


#: The distributions by the name that the option `delays` uses.
DELAYS: dict[str, Callable[..., Delays]] = {
    "none": NoDelay,
    "constant": ConstantDelay,
    "slow": SlowPeers,
    "exponential": ExponentialDelay,
    "pareto": ParetoDelay,
}


def build(spec: str) -> Delays:
    """Make delays from ``NAME`` or ``NAME:key=value+key=value``.

    Parameters
    ----------
    spec
        A name of `DELAYS` and its options, separated by ``+`` or ``,``; inside the options of a strategy,
        which are separated by commas, only ``+`` is possible.

    Raises
    ------
    BadOption
        Unknown name or option, or a value out of range.
    """
    return registry.build(DELAYS, spec.replace("+", ","), "delays")


#: A spec that `build` reads, as annotation of an option.
DelaysSpec = Annotated[str, registry.Accepted(build)]


def _uniform(seed: int, peer: int, number: int) -> float:
    """Return a sample of the uniform distribution on (0, 1]."""
    return 1.0 - float(np.random.default_rng([seed, peer, number]).random())
