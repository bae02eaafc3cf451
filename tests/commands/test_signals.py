"""Signals are noted, whenever they come, and end nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from hpcsgd.commands import signals
from hpcsgd.commands.signals import Signals


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_noted_inside_and_as_before_outside(number: signal.Signals) -> None:
    before, noted = signal.getsignal(number), Signals()
    with noted.noted():
        assert noted.caught is None
        signal.raise_signal(number)
        assert noted.caught == number
    assert signal.getsignal(number) is before


def test_a_warning_that_comes_too_early_or_too_late_ends_nothing() -> None:
    signals.keep()
    signal.raise_signal(signal.SIGUSR1)
    first, second = Signals(), Signals()
    with first.noted():
        assert first.caught == signal.SIGUSR1
    with second.noted():
        assert second.caught is None, "it was for the first"
    signal.raise_signal(signal.SIGUSR1)
    with second.noted():
        assert second.caught == signal.SIGUSR1
