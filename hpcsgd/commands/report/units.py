"""Units of time and size that make numbers short."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """A unit: its symbol, and its size in seconds or bytes."""

    symbol: str
    size: float


_TIME = (Unit("ms", 1e-3), Unit("s", 1.0), Unit("min", 60.0), Unit("h", 3600.0))
_BYTES = (Unit("B", 1.0), Unit("kB", 1e3), Unit("MB", 1e6), Unit("GB", 1e9), Unit("TB", 1e12))


def time_unit(longest: float) -> Unit:
    """The unit for durations up to `longest` seconds."""
    return _unit(_TIME, longest, {"min": 5.0, "h": 2.0})


def byte_unit(largest: float) -> Unit:
    """The unit for sizes up to `largest` bytes."""
    return _unit(_BYTES, largest, {})


def significant(value: float, digits: int) -> str:
    """A number with exactly `digits` significant digits."""
    return f"{value:#.{digits}g}".rstrip(".")


def _unit(units: Sequence[Unit], largest: float, at_least: dict[str, float]) -> Unit:
    fitting = [unit for unit in units if largest >= at_least.get(unit.symbol, 1.0) * unit.size]
    return fitting[-1] if fitting else units[0]
