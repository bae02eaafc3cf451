"""Signals are recorded, whenever they arrive, and end nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from hpcsgd.commands import signals
from hpcsgd.commands.signals import SignalRecorder


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_recorded_while_installed_and_default_action_restored_afterwards(number: signal.Signals) -> None:
    before, recorder = signal.getsignal(number), SignalRecorder()
    with recorder.installed():
        assert recorder.received is None
        signal.raise_signal(number)
        assert recorder.received == number
    assert signal.getsignal(number) is before


def test_a_warning_that_comes_too_early_or_too_late_ends_nothing() -> None:
    signals.defer_sigusr1()
    signal.raise_signal(signal.SIGUSR1)
    first, second = SignalRecorder(), SignalRecorder()
    with first.installed():
        assert first.received == signal.SIGUSR1
    with second.installed():
        assert second.received is None, "it was for the first"
    signal.raise_signal(signal.SIGUSR1)
    with second.installed():
        assert second.received == signal.SIGUSR1


def test_a_warning_after_the_end_finds_no_handler_of_python() -> None:
    # Python resets its handlers when it ends; MPI is finalised after that.
    signals.defer_sigusr1()
    signals.ignore_sigusr1()
    signal.raise_signal(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
