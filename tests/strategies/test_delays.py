"""Delays: reproducible samples of the documented distributions."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest

from hpcsgd import BadOption
from hpcsgd.strategies import delays

SPECS = ["none", "constant:seconds=2", "slow:peer=1+factor=3", "exponential:seed=4", "pareto:shape=3,base=1"]


def sample(spec: str, peers: int = 3, numbers: int = 700) -> np.ndarray:
    delay = delays.build(spec).sample
    return np.array([[delay(peer, number) for number in range(numbers)] for peer in range(peers)])


@pytest.mark.parametrize("spec", SPECS)
def test_a_sample_depends_on_peer_and_number_alone(spec: str) -> None:
    found = sample(spec, numbers=20)
    other = delays.build(spec)
    for peer, number in reversed(list(np.ndindex(found.shape))):
        assert other.sample(peer, number) == found[peer, number]


def test_equal_delays_without_randomness() -> None:
    assert np.all(sample("none", numbers=5) == 0) and np.all(sample("constant:seconds=2", numbers=5) == 2)


def test_slow_delays_one_peer() -> None:
    assert sample("slow:peer=1+factor=3+seconds=0.5", numbers=2).tolist() == [[0.5] * 2, [1.5] * 2, [0.5] * 2]


def test_slow_delays_count_peers() -> None:
    found = sample("slow:peer=1+count=2+factor=3+seconds=0.5", peers=4, numbers=2)
    assert found.tolist() == [[0.5] * 2, [1.5] * 2, [1.5] * 2, [0.5] * 2]


@pytest.mark.parametrize(
    ("spec", "below"),
    [
        ("exponential:mean=2+base=1", lambda t: 1 - math.exp(-max(0, t - 1) / 2)),
        ("pareto:shape=1.5+scale=2+base=1", lambda t: 1 - (2 / max(2, t - 1)) ** 1.5),
    ],
)
def test_samples_have_the_documented_distribution(spec: str, below: object) -> None:
    found = np.sort(sample(spec).ravel())
    expected = np.array([below(t) for t in found])  # type: ignore[operator]
    # Kolmogorov-Smirnov: exceeds 1.95 / sqrt(n) once in a thousand; the samples are fixed.
    assert np.abs(expected - np.arange(len(found)) / len(found)).max() < 1.95 / math.sqrt(len(found))


@pytest.mark.parametrize("name", ["exponential", "pareto"])
def test_peers_gradients_and_seeds_are_independent(name: str) -> None:
    found = sample(name, numbers=500)
    ranks = found.argsort(axis=1).argsort(axis=1)
    assert np.all(np.abs(np.corrcoef(ranks)[np.triu_indices(3, 1)]) < 0.2)
    assert len(np.unique(found)) == found.size
    assert not np.any(sample(f"{name}:seed=1", numbers=500) == found)


@pytest.mark.parametrize("spec", ["never", "none:seconds=1"])
def test_wrong_specs_are_rejected(spec: str) -> None:
    with pytest.raises(BadOption):
        delays.build(spec)


def test_slow_peers_must_exist_unless_they_have_failed() -> None:
    slow = delays.build("slow:peer=2,count=2")
    slow.check_peers(4)
    slow.check_peers(1)
    with pytest.raises(BadOption, match=r"expected some of the peers 0 to 2, got peer=2, count=2"):
        slow.check_peers(3)
    slow.clamp_to(3)
    slow.check_peers(3)
    assert [slow.sample(peer, 0) for peer in range(3)] == [1.0, 1.0, 4.0]
    slow.clamp_to(1)
    slow.check_peers(1)
    assert slow.sample(0, 0) == 1.0


def test_the_longest_sample_can_be_slept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delays, "_uniform", lambda *_: 2.0**-53)
    for spec in ("pareto:shape=0.06,scale=1e9", "exponential:mean=1e9", "slow:seconds=1e9,factor=1e9"):
        assert delays.build(spec).sample(0, 0) == 1e9 <= threading.TIMEOUT_MAX
