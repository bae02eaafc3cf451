"""Invariants of all topologies: doubly stochastic, connected, neighbours consistent with the matrix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsgd.errors import BadOption, HpcsgdError
from hpcsgd.topology import TOPOLOGIES, Topology, build, metropolis
from hpcsgd.topology.mixing import Matrix
from tests.support.topology_cases import IMPOSSIBLE, SPECS, made, over_sizes

every_family = pytest.mark.parametrize("spec", SPECS)


class Given(Topology):
    """A topology of given matrices."""

    def __init__(self, *matrices: Matrix | list[list[float]], directed: bool = False) -> None:
        super().__init__(len(matrices[0]))
        self.given, self.period, self.directed = matrices, len(matrices), directed

    def build(self, step: int) -> Matrix:
        return np.array(self.given[step], float)


def joined(size: int, edges: list[tuple[int, int]]) -> bool:
    name = list(range(size))
    for a, b in edges:
        name = [name[a] if other == name[b] else other for other in name]
    return len(set(name)) == 1


@every_family
def test_each_matrix_is_doubly_stochastic_and_symmetric_unless_directed(spec: str) -> None:
    for topology in over_sizes(spec):
        for step in range(topology.period):
            matrix = topology.matrix(step)
            assert matrix.shape == (topology.size, topology.size) and matrix.dtype == np.float64
            assert (matrix >= 0).all() and (topology.directed or (matrix == matrix.T).all())
            np.testing.assert_allclose(matrix.sum(axis=0), 1, rtol=0, atol=1e-12)
            np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=0, atol=1e-12)
            assert matrix is topology.matrix(step + 3 * topology.period) and not matrix.flags.writeable


@every_family
def test_rows_sources_and_readers_agree_with_the_matrix(spec: str) -> None:
    for topology in over_sizes(spec):
        used = set()
        for step in range(topology.period):
            matrix, rebuilt, by = topology.matrix(step), np.zeros((topology.size, topology.size)), set()
            for peer in range(topology.size):
                row, readers = topology.row(peer, step), topology.readers(peer, step)
                assert row == sorted(row) and all(weight > 0 for _, weight in row)
                for source, weight in row:
                    rebuilt[peer, source] = weight
                assert topology.sources(peer, step) == [source for source, _ in row if source != peer]
                assert readers == sorted(readers)
                by |= {(reader, peer) for reader in readers}
            assert (rebuilt == matrix).all()
            assert by == {(i, j) for i, j in np.argwhere(matrix).tolist() if i != j}
            used |= {(min(edge), max(edge)) for edge in by}
        assert topology.edges() == sorted(used)


@every_family
def test_spanning_edges_join_all_peers_and_are_a_path_where_there_is_one(spec: str) -> None:
    for topology in over_sizes(spec):
        size, chosen = topology.size, topology.spanning()
        assert set(chosen) <= set(topology.edges()) and len(chosen) == size - 1 and joined(size, chosen)
        assert chosen == build(spec, size).spanning()
        if spec != "star":
            assert np.bincount(np.ravel(chosen).astype(int)).max(initial=0) <= 2


@every_family
def test_a_period_contracts_disagreement_by_the_second_singular_value_and_no_more(spec: str) -> None:
    for topology in over_sizes(spec):
        size = topology.size
        mean = np.full((size, size), 1 / size)
        worst = np.linalg.svd(topology.product() - mean)[2][0]
        models = np.column_stack([worst, np.random.default_rng(size).normal(size=(size, 5))])
        after = models
        for step in range(topology.period):
            rows = [topology.row(peer, step) for peer in range(size)]
            after = np.array([sum(weight * after[j] for j, weight in row) for row in rows])
        np.testing.assert_allclose(after.mean(axis=0), models.mean(axis=0), atol=1e-12)
        before = np.linalg.norm(models - mean @ models, axis=0)
        kept = np.linalg.norm(after - mean @ after, axis=0)
        rate = (1 - topology.spectral_gap()) ** topology.period
        assert rate < 1 and (kept <= rate * before + 1e-11).all()
        assert kept[0] == pytest.approx(rate * before[0], abs=1e-11)


@pytest.mark.parametrize(("size", "gap"), [(4, 2 / 3), (12, (2 - 3**0.5) / 3), (64, None)])
def test_the_gap_of_a_ring_is_that_of_the_formula(size: int, gap: float | None) -> None:
    formula = 2 / 3 * (1 - np.cos(2 * np.pi / size))
    assert made("ring", size).spectral_gap() == pytest.approx(formula, rel=1e-9)
    assert gap is None or formula == pytest.approx(gap)


def test_an_impossible_number_of_peers_is_refused_and_another_offered() -> None:
    assert {spec.partition(":")[0] for spec, _ in IMPOSSIBLE} == {"hypercube", "random-regular"}
    for spec, size in IMPOSSIBLE:
        with pytest.raises(BadOption, match=r"use .*\d"):
            build(spec, size)


@pytest.mark.parametrize("spec", sorted(TOPOLOGIES))
@pytest.mark.parametrize("size", [0, -3])
def test_no_peers_are_refused(spec: str, size: int) -> None:
    with pytest.raises(BadOption, match="from 1 to"):
        build("file:path=none" if spec == "file" else spec, size)


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(st.just(n), st.sets(st.tuples(*[st.integers(0, n - 1)] * 2)))
    )
)
@settings(max_examples=50, deadline=None)
def test_metropolis_weights_of_any_graph(graph: tuple[int, set[tuple[int, int]]]) -> None:
    size, pairs = graph
    edges = {(min(edge), max(edge)) for edge in pairs if edge[0] != edge[1]}
    matrix = metropolis(size, [edge for edge in pairs if edge[0] != edge[1]])
    degrees = [sum(peer in edge for edge in edges) for peer in range(size)]
    expected = np.zeros((size, size))
    for a, b in edges:
        expected[a, b] = expected[b, a] = 1 / (1 + max(degrees[a], degrees[b]))
    np.fill_diagonal(expected, [1 - expected[i].sum() for i in range(size)])
    np.testing.assert_allclose(matrix, expected, atol=1e-15)
    assert (np.diag(matrix) > 0).all()


@pytest.mark.parametrize("edge", [(0, 0), (0, 3), (-1, 2)])
def test_metropolis_refuses_invalid_edges(edge: tuple[int, int]) -> None:
    with pytest.raises(HpcsgdError, match="0 to 2"):
        metropolis(3, [edge])


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        (Given([[1, 0, 0], [0, 1, 0]]), "shape"),
        (Given([[1.5, -0.5], [-0.5, 1.5]]), r"W\[0, 1\]"),
        (Given([[np.nan, 1], [1, 0]]), r"W\[0, 0\]"),
        (Given([[0.5, 0.5], [0.5, 0.6]]), "sum of row 1"),
        (Given([[0.5, 0.5], [1, 0]]), "sum of column 0"),
        (Given([[0, 1, 0], [0, 0, 1], [1, 0, 0]]), "directed = True"),
        (Given(np.eye(3)), "not connected"),
        (Given(np.eye(2), np.eye(2)[:1]), "step 1"),
    ],
)
def test_a_wrong_matrix_is_named(topology: Topology, message: str) -> None:
    with pytest.raises(HpcsgdError, match=message):
        topology.matrix()


def test_steps_may_be_disconnected_where_their_union_is_not() -> None:
    pairs = Given([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]], [[1, 0, 0], [0, 0.5, 0.5], [0, 0.5, 0.5]])
    assert pairs.sources(1, 0) == [0] and pairs.sources(1, 3) == [2] and pairs.sources(0, 1) == []
    assert pairs.spanning() == [(0, 1), (1, 2)]


@pytest.mark.parametrize("peer", [-1, 5])
def test_a_peer_that_does_not_exist_is_refused(peer: int) -> None:
    with pytest.raises(HpcsgdError, match="0 to 4"):
        made("ring", 5).sources(peer)
