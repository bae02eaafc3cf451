"""The rules that close iterations, without any model."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsgd import BadOption, topology
from hpcsgd.strategies import delays
from hpcsgd.strategies.backup_workers.closing_rule import IterationCloser, fixed_backups
from hpcsgd.strategies.backup_workers.virtual_time import VirtualTime
from hpcsgd.topology.graphs import adjacency, is_connected
from hpcsgd.topology.mixing import metropolis, metropolis_among

GRAPHS = ["ring", "star", "complete", "exponential", "one-peer-exponential", "random-regular:degree=4"]

built = cache(topology.build)


@st.composite
def cases(draw: st.DrawFn) -> tuple[topology.Topology, int | None]:
    name = draw(st.sampled_from(GRAPHS))
    graph = built(name, draw(st.integers(6 if ":" in name else 1, 9)))
    backups = draw(st.none() | st.integers(0, max(0, graph.size - 2)))
    return graph, backups


@settings(deadline=None, max_examples=30)
@given(cases(), st.randoms(use_true_random=False))
def test_iterations_close_by_the_rule_in_any_order_of_peers(
    case: tuple[topology.Topology, int | None], random
) -> None:  # type: ignore[no-untyped-def]
    graph, backups = case
    edges, links, end = graph.spanning(), graph.edges(), 15
    closer = IterationCloser(graph.size, edges, backups)
    unused, busy, done, joined = set(edges), set(range(graph.size)), set[int](), set[tuple[int, int]]()
    entered_by: dict[int, int] = {}
    while closer.iteration < end:
        assert busy, "deadlock: all wait"
        t = closer.iteration
        peers = random.sample(sorted(busy), random.randint(1, min(2, len(busy))))
        assert set(closer.awaited) == busy
        assert closer.mark_done(peers, end) == t
        busy -= {*peers}
        done |= {*peers}
        entered_by |= dict.fromkeys(peers, t)
        inside = {edge for edge in edges if set(edge) <= done}
        closes = len(done) >= graph.size - backups if backups is not None else unused & inside or not edges
        assert closer.iteration == t + bool(closes)
        if closes:
            for peer in done:
                assert closer.participants(peer) == sorted(done) and entered_by[peer] == t
            joined |= {link for link in links if set(link) <= done}
            unused -= inside
            if not unused:
                assert backups is not None or is_connected(graph.size, joined)
                unused, joined = set(edges), set()
            assert {edges[number] for number in closer.unused_edges} == unused
            busy, done = busy | done, set()
    assert all(closer.mark_done([peer], end) is None for peer in busy)
    assert closer.iteration == end and not done


def test_participants_stay_readable_for_a_late_peer() -> None:
    closer = IterationCloser(4, [(0, 1), (1, 2), (2, 3)], 2)
    closer.mark_done([2, 3], 99)
    for t in range(1, 50):
        assert closer.mark_done([0, 1], 99) == t
    assert closer.participants(2) == closer.participants(3) == [2, 3]


def test_two_closers_with_one_memory_have_one_state() -> None:
    memory = np.zeros(1 + 3 + 2 + 9, np.int32)
    one, other = (IterationCloser(3, [(0, 1), (1, 2)], None, memory) for _ in range(2))
    one.open()
    one.mark_done([1], 9)
    assert other.awaited == [0, 2]
    other.mark_done([2], 9)
    assert one.iteration == 1 and one.participants(1) == [1, 2] and one.unused_edges == [0]


@settings(deadline=None, max_examples=30)
@given(cases(), st.sampled_from(["exponential", "pareto", "slow:factor=10", "constant", "none"]))
def test_virtual_time_is_theta(case: tuple[topology.Topology, int | None], spec: str) -> None:
    graph, backups = case
    size, delay = graph.size, delays.build(spec).sample
    time = VirtualTime(IterationCloser(size, graph.spanning(), backups), delays.build(spec))
    ends, numbers, unused = [delay(p, 0) for p in range(size)], [0] * size, set(graph.spanning())
    for t in range(20):
        if t == 10:  # resume from the saved state
            state = time.state_dict()
            time = VirtualTime(IterationCloser(size, graph.spanning(), backups), delays.build(spec))
            time.load_state_dict(state)
        if backups is not None:
            theta = sorted(ends)[size - backups - 1]
        else:
            theta = min((max(ends[a], ends[b]) for a, b in unused), default=ends[0])
        done = [p for p in range(size) if ends[p] <= theta]
        unused = {edge for edge in unused if not set(edge) <= {*done}} or set(graph.spanning())
        assert time.next() == done and time.seconds == theta
        for p in done:
            numbers[p] += 1
            ends[p] = theta + delay(p, numbers[p])


def test_equal_delays_let_all_take_part() -> None:
    for spec in ("none", "constant"):
        time = VirtualTime(IterationCloser(5, list(pairwise(range(5))), None), delays.build(spec))
        assert all(time.next() == [0, 1, 2, 3, 4] for _ in range(5))
        assert time.seconds == (5 if spec == "constant" else 0)


def test_a_slow_peer_delays_its_own_edges_only() -> None:
    """On a path whose last peer is 8 times slower, an epoch takes as long as one gradient of that peer."""
    time = VirtualTime(
        IterationCloser(4, list(pairwise(range(4))), None), delays.build("slow:peer=3+factor=8")
    )
    full = VirtualTime(IterationCloser(4, list(pairwise(range(4))), 0), delays.build("slow:peer=3+factor=8"))
    for _ in range(40):
        time.next(), full.next()
    assert full.seconds == 320 and time.seconds <= 170


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.data())
def test_weights_among_members_are_those_of_their_own_graph(size: int, data: st.DataObject) -> None:
    graph = built(data.draw(st.sampled_from(["ring", "star", "complete"])), size)
    members = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
    rows = metropolis_among(adjacency(size, graph.edges()), members)
    matrix = np.eye(size)
    for peer, row in rows.items():
        assert row == sorted(row)
        matrix[peer] = 0
        for other, weight in row:
            matrix[peer, other] = weight
    links = [link for link in graph.edges() if {*link} <= {*members}]
    np.testing.assert_allclose(matrix, metropolis(size, links), atol=1e-15)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_fixed_backups_leave_two_peers_to_average(size: int) -> None:
    assert [fixed_backups(b, size) for b in range(size - 1)] == list(range(size - 1))
    assert fixed_backups("dynamic", size) is None and fixed_backups(3, 1) == 3
    for wrong in (-1, size - 1, "all"):
        with pytest.raises(BadOption, match=f"0 to {size - 2}"):
            fixed_backups(wrong, size)
