"""Strategies and compression on the stand-in for a GPU: the bits of the CPU, and the waits it needs."""

from __future__ import annotations

import functools
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
    "collectives/bucket_shards.py:BucketShard.to_host synchronize",
    "collectives/node.py:barrier synchronize",
    "collectives/staging.py:_copied synchronize",
    "collectives/staging.py:after_compute record",
    "collectives/staging.py:after_compute.run synchronize",
    "collectives/staging.py:after_compute.run wait",
    "collectives/staging.py:copy_to synchronize",
    "compress/base.py:MaxMagnitude.exponent synchronize",
    "server/store.py:_to_host synchronize",
    "strategies/lasgd/averaging.py:Averaging._for_pass record",
    "strategies/lasgd/averaging.py:Averaging._for_pass wait",
    "strategies/lasgd/averaging.py:Averaging._for_update record",
    "strategies/teleportation/optimizer_state.py:PortableOptimizerState.load synchronize",
}


@functools.cache
def on_cpu(layout: str) -> dict[str, bytes]:
    """The parameters of each case on the CPU."""
    with cases.world_on("cpu", layout) as world:
        return {name: cases.train(world, name) for name in cases.CASES}


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("name", cases.CASES)
def test_the_device_has_the_bits_of_the_cpu(world: Any, name: str, layout: str) -> None:
    if "nodes" in layout and world.size < 3:
        pytest.skip("two nodes, one of several ranks, need 3 ranks")
    if layout == "staged nodes" and name.endswith("-auto"):
        pytest.skip("each rank compresses its own gradients, on the CPU each node the sum of its ranks")
    assert _result(layout, name) == on_cpu(layout)[name]


@pytest.mark.parametrize("layout", ["windows", "staged"])
def test_rounds_beside_steps_change_no_sum(world: Any, layout: str) -> None:
    expected = sum((step + rank) % 5 for step in range(30) for rank in range(world.size)) / world.size
    np.testing.assert_allclose(np.frombuffer(_result(layout, "beside")), -expected)


@pytest.mark.timeout(400)
def test_each_wait_that_is_left_out_is_noticed(world: Any) -> None:
    from tests.support.standin.streams import omissions

    trials: dict[str, list[tuple[str, str]]] = {}
    for layout in ("windows", "staged"):
        for name in [*cases.CASES, "beside"]:
            omissions.seen.clear()
            _result(layout, name)
            for site in sorted(set().union(*world.gather(sorted(omissions.seen)))):
                trials.setdefault(site, []).append((layout, name))
    assert {_without_line(site) for site in trials} >= NEEDED
    rounds = _result("windows", "beside")
    for site, found in sorted(trials.items()):
        tries = [*dict.fromkeys(found[:3] + found[-2:])] * 3  # streams take turns by chance
        expected = [rounds if name == "beside" else on_cpu(layout)[name] for layout, name in tries]
        if _without_line(site) in NEEDED:
            noticed = (_is_noticed(world, site, *each) for each in zip(tries, expected, strict=True))
            assert any(noticed), site


def _is_noticed(world: Any, site: str, trial: tuple[str, str], expected: bytes) -> bool:
    from tests.support.standin.streams import omissions

    omissions.omitted = site
    try:
        found: Any = _result(*trial)
    except Exception as error:  # of whatever kind: it is noticed
        found = error
    finally:
        omissions.omitted = None
    return any(world.gather(found != expected))


def _result(layout: str, name: str) -> bytes:
    train: Callable[[Any], bytes] = (
        cases.train_beside_rounds if name == "beside" else lambda each: cases.train(each, name)
    )
    own = cases.world_on("standin", layout, timeout=4)
    try:
        return train(own)
    finally:
        own.leave("the case is over")


def _without_line(site: str) -> str:
    place, what = site.split()
    return f"{place.rpartition(':')[0]} {what}"
