"""Simulated computation times of gradients, to study stragglers; the same on every rank. NumPy only."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from hpcsgd import registry
from hpcsgd.errors import BadOption


class Delays(ABC):
    """A distribution of the seconds that each gradient of each peer takes.

    A sample is a function of peer and number alone: every rank can compute those of all peers, in any order.
    """

    @abstractmethod
    def sample(self, peer: int, number: int) -> float:
        """Return the seconds of gradient `number`, from 0, of a peer."""


class NoDelay(Delays):
    """Gradients take no time."""

    def sample(self, peer: int, number: int) -> float:
        return 0.0


class ConstantDelay(Delays):
    """All gradients take equally long.

    Parameters
    ----------
    seconds
        Time of a gradient, at least 0. Default 1.
    """

    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds = _at_least_0("seconds", seconds)

    def sample(self, peer: int, number: int) -> float:
        return self.seconds


class SlowPeers(ConstantDelay):
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

    def __init__(self, peer: int = 0, factor: float = 4.0, seconds: float = 1.0, count: int = 1) -> None:
        super().__init__(seconds)
        self.factor = _at_least_0("factor", factor)
        self.slow = range(peer, peer + int(_at_least_0("count", count)))

    def sample(self, peer: int, number: int) -> float:
        return self.seconds * (self.factor if peer in self.slow else 1.0)


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

    def __init__(self, mean: float = 1.0, base: float = 0.0, seed: int = 0) -> None:
        self.mean, self.base, self.seed = _at_least_0("mean", mean), _at_least_0("base", base), seed
        _at_least_0("seed", seed)

    def sample(self, peer: int, number: int) -> float:
        return self.base - self.mean * math.log(_uniform(self.seed, peer, number))


class ParetoDelay(Delays):
    """A heavy-tailed time added to `base`: P(more than t) = (scale / t) ** shape for t above scale.

    Parameters
    ----------
    shape
        Above 0; the smaller, the heavier the tail: the variance is infinite up to 2, the mean up to 1.
        Default 1.5.
    scale
        Minimum of the added time, in seconds. Default 1.
    base
        Constant part of every gradient's time, in seconds. Default 0.
    seed
        Seed of the samples. Default 0.
    """

    def __init__(self, shape: float = 1.5, scale: float = 1.0, base: float = 0.0, seed: int = 0) -> None:
        if not (math.isfinite(shape) and shape > 0):
            raise BadOption("option shape of Pareto delays is out of range", expected="above 0", got=shape)
        self.shape, self.scale, self.base = shape, _at_least_0("scale", scale), _at_least_0("base", base)
        self.seed = seed
        _at_least_0("seed", seed)

    def sample(self, peer: int, number: int) -> float:
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


def _uniform(seed: int, peer: int, number: int) -> float:
    """Return a sample of the uniform distribution on (0, 1]."""
    return 1.0 - float(np.random.default_rng([seed, peer, number]).random())


def _at_least_0(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise BadOption(
            f"option {name} of delays is out of range", expected="at least 0, and finite", got=value
        )
    return value
