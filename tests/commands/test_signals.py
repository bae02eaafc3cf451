"""Signals are recorded, whenever they arrive, and end nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import suppress

import pytest

from hpcsgd.commands import signals
from hpcsgd.commands.signals import SignalRecorder


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield
    signals._deferred.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_recorded_while_installed_and_default_action_restored_after_an_error(number: signal.Signals) -> None:
    before, recorder = signal.getsignal(number), SignalRecorder()
    with suppress(KeyError), recorder.installed():
        assert recorder.received is None
        signal.raise_signal(number)
        assert recorder.received == number
        raise KeyError
    assert signal.getsignal(number) is before


def test_a_stop_of_work_that_is_done_ends_nothing_and_is_for_the_next() -> None:
    first, second = SignalRecorder(), SignalRecorder()
    with first.installed():
        pass
    signal.raise_signal(signal.SIGTERM)
    with second.installed():
        assert second.received == signal.SIGTERM
    assert first.received is None


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_after_the_end_finds_no_handler_of_python(number: signal.Signals) -> None:
    # Python resets its handlers when it ends; MPI is finalised after that.
    signals.defer_sigusr1()
    signals.ignore_stops()
    signal.raise_signal(number)
    assert signal.getsignal(number) == signal.SIG_IGN
