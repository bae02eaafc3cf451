"""How long gradients take: delays to study stragglers with, drawn alike on every rank. NumPy alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from hpcsgd import registry
from hpcsgd.errors import BadOption


class Delays(ABC):
    """Seconds that each gradient of each peer takes.

    A draw depends on peer and number alone, so every rank can tell every peer's, in any order.
    """

    @abstractmethod
    def draw(self, peer: int, number: int) -> float:
        """Seconds of gradient `number`, from 0, of a peer."""


class NoDelay(Delays):
    """Gradients take no time."""

    def draw(self, peer: int, number: int) -> float:
        return 0.0


class Constant(Delays):
    """All gradients take equally long.

    Parameters
    ----------
    seconds
        How long. Default 1.
    """

    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds = _at_least_0("seconds", seconds)

    def draw(self, peer: int, number: int) -> float:
        return self.seconds


class Slow(Constant):
    """One peer, or a few neighbours, are slower than the others.

    Parameters
    ----------
    peer
        Which, or the first of them. Default 0.
    factor
        How many times as long their gradients take. Default 4.
    seconds
        How long the others' take. Default 1.
    count
        How many are slow. Default 1.
    """

    def __init__(self, peer: int = 0, factor: float = 4.0, seconds: float = 1.0, count: int = 1) -> None:
        super().__init__(seconds)
        self.factor = _at_least_0("factor", factor)
        self.slow = range(peer, peer + int(_at_least_0("count", count)))

    def draw(self, peer: int, number: int) -> float:
        return self.seconds * (self.factor if peer in self.slow else 1.0)


class Exponential(Delays):
    """base + an exponentially distributed time.

    Parameters
    ----------
    mean
        Of what is added to `base`, in seconds. Default 1.
    base
        What every gradient takes at least, in seconds. Default 0.
    seed
        Of the draws. Default 0.
    """

    def __init__(self, mean: float = 1.0, base: float = 0.0, seed: int = 0) -> None:
        self.mean, self.base, self.seed = _at_least_0("mean", mean), _at_least_0("base", base), seed
        _at_least_0("seed", seed)

    def draw(self, peer: int, number: int) -> float:
        return self.base - self.mean * math.log(_uniform(self.seed, peer, number))


class Pareto(Delays):
    """base + a heavy-tailed time: P(more than t) = (scale / t) ** shape for t above scale.

    Parameters
    ----------
    shape
        Above 0; the smaller, the heavier the tail: the variance is infinite up to 2, the mean up to 1.
        Default 1.5.
    scale
        The least that is added to `base`, in seconds. Default 1.
    base
        What every gradient takes besides, in seconds. Default 0.
    seed
        Of the draws. Default 0.
    """

    def __init__(self, shape: float = 1.5, scale: float = 1.0, base: float = 0.0, seed: int = 0) -> None:
        if not (math.isfinite(shape) and shape > 0):
            raise BadOption("shape of Pareto delays", expected="above 0", got=shape)
        self.shape, self.scale, self.base = shape, _at_least_0("scale", scale), _at_least_0("base", base)
        self.seed = seed
        _at_least_0("seed", seed)

    def draw(self, peer: int, number: int) -> float:
        return self.base + self.scale * math.pow(_uniform(self.seed, peer, number), -1 / self.shape)


#: What a strategy's option `delays` knows.
DELAYS: dict[str, Callable[..., Delays]] = {
    "none": NoDelay,
    "constant": Constant,
    "slow": Slow,
    "exponential": Exponential,
    "pareto": Pareto,
}


def build(spec: str) -> Delays:
    """Make delays from ``NAME`` or ``NAME:key=value+key=value``.

    Parameters
    ----------
    spec
        A name of `DELAYS` and its options, with ``+`` between them because a strategy separates its own
        options by commas.

    Raises
    ------
    BadOption
        Unknown name or option, or a value out of range.
    """
    return registry.build(DELAYS, spec.replace("+", ","), "delays")


def _uniform(seed: int, peer: int, number: int) -> float:
    """A number of (0, 1]."""
    return 1.0 - float(np.random.default_rng([seed, peer, number]).random())


def _at_least_0(what: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise BadOption(f"{what} of delays", expected="at least 0, and finite", got=value)
    return value
