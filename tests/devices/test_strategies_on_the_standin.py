"""Strategies and compression on the stand-in for a GPU: the bits of the CPU, and the waits it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.support import device_cases as cases

pytestmark = [pytest.mark.standin, pytest.mark.mpi(min_size=2)]

#: Waits and events without which a result is wrong here, at each of their places. (Of the others some are
#: doubled by a later wait, some would tear a tensor, of which the stand-in reads all at once, and some would
#: give what memory held before.)
NEEDED = {
    "collectives/compressed.py:CompressedReducer._exchange synchronize",
    "collectives/compressed.py:CompressedReducer._run_codec record",
    "collectives/compressed.py:CompressedReducer._run_codec.steps wait",
    "collectives/compressed.py:CompressedReducer._run_codec.steps synchronize",
    "collectives/staging.py:after_compute record",
    "collectives/staging.py:after_compute.run wait",
    "collectives/staging.py:via_host.run synchronize",
    "collectives/staging.py:via_host.run wait",
    "collectives/staging.py:to_host synchronize",
    "collectives/staging.py:via_host record",
    "strategies/lasgd/averaging.py:Averaging._begin_round wait",
    "strategies/lasgd/averaging.py:Averaging._merge record",
}


@pytest.fixture(scope="module")
def on_cpu() -> dict[str, bytes]:
    """The parameters of each case on the CPU."""
    with cases.world_on("cpu") as world:
        return {name: cases.train(world, name) for name in cases.CASES}


@pytest.mark.parametrize("name", cases.CASES)
def test_the_device_has_the_bits_of_the_cpu(world: Any, on_cpu: dict[str, bytes], name: str) -> None:
    assert cases.train(world, name) == on_cpu[name]


def test_rounds_beside_steps_change_no_sum(world: Any) -> None:
    expected = sum((step + rank) % 5 for step in range(30) for rank in range(world.size)) / world.size
    found = np.frombuffer(cases.train_beside_rounds(world))
    np.testing.assert_allclose(found, -expected)


@pytest.mark.timeout(400)
def test_each_wait_that_is_left_out_is_noticed(world: Any, on_cpu: dict[str, bytes]) -> None:
    from tests.support.standin.streams import omissions

    sites: dict[str, list[str]] = {}
    for name in [*cases.CASES, "beside"]:
        omissions.seen.clear()
        _result(world, name)
        for site in sorted(set().union(*world.gather(sorted(omissions.seen)))):
            sites.setdefault(site, []).append(name)
    expected = {**on_cpu, "beside": _result(world, "beside")}
    assert {_without_line(site) for site in sites} >= NEEDED
    for site, names in sorted(sites.items()):
        tries = [*dict.fromkeys(names[:3] + names[-2:])] * 3  # streams take turns by chance
        if _without_line(site) in NEEDED:
            assert any(_is_noticed(world, site, name, expected[name]) for name in tries), site


def _is_noticed(world: Any, site: str, name: str, expected: bytes) -> bool:
    from tests.support.standin.streams import omissions

    omissions.omitted = site
    try:
        found: Any = _result(world, name)
    except Exception as error:  # of whatever kind: it is noticed
        found = error
    finally:
        omissions.omitted = None
    return any(world.gather(found != expected))


def _result(world: Any, name: str) -> bytes:
    train: Callable[[Any], bytes] = (
        cases.train_beside_rounds if name == "beside" else lambda each: cases.train(each, name)
    )
    own = cases.world_on("standin", timeout=8)
    try:
        return train(own)
    finally:
        own.leave("the case is over")


def _without_line(site: str) -> str:
    place, what = site.split()
    return f"{place.rpartition(':')[0]} {what}"
