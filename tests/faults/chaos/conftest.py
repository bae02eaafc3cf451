"""The options of the trial, which tests/conftest.py declares, and its deadline."""

from __future__ import annotations

import random

import pytest

from tests.faults.chaos.trial import Options

#: Seconds to start, to recover from the last faults, and to end.
_MORE = 600.0


@pytest.fixture
def chaos(request: pytest.FixtureRequest) -> Options:
    """The options on pytest's command line."""
    given = {name: request.config.getoption(f"--chaos-{name}") for name in ("seed", "seconds", "faults")}
    return Options(**{"seed": random.randrange(2**32)} | {k: v for k, v in given.items() if v is not None})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "chaos" in getattr(item, "fixturenames", ()):
            seconds = config.getoption("--chaos-seconds") or Options.seconds
            item.add_marker(pytest.mark.timeout(seconds + _MORE))
