"""Properties of each family."""

from __future__ import annotations

from math import log
from pathlib import Path

import numpy as np
import pytest

from hpcsgd.errors import BadOption, HpcsgdError
from hpcsgd.topology import BaseGraph, RandomRegular, Torus, build
from hpcsgd.topology.graphs import is_connected
from tests.support.topology_cases import made


@pytest.mark.parametrize("k", [1, 2, 3])
def test_base_graphs_reach_the_exact_mean_with_few_links(k: int) -> None:
    for size in range(1, 65):
        topology = BaseGraph(size, k)
        product = np.eye(size)
        for step in range(topology.period):
            product = topology.matrix(step) @ product
            assert max(len(topology.sources(peer, step)) for peer in range(size)) <= k
        np.testing.assert_allclose(product, 1 / size, rtol=0, atol=1e-12)
        assert topology.exact and topology.spectral_gap() == 1
        assert topology.period <= 2 * log(size, k + 1) + 2 + 1e-9


@pytest.mark.parametrize(
    ("size", "period"), [(3, 3), (5, 5), (6, 4), (7, 5), (8, 3), (10, 6), (12, 5), (25, 9), (63, 11)]
)
def test_base_graphs_of_one_link_are_as_long_as_published(size: int, period: int) -> None:
    assert BaseGraph(size).period == period


def test_one_peer_exponential_is_exact_for_powers_of_two_and_no_other_number() -> None:
    exact = [size for size in range(1, 40) if build("one-peer-exponential", size).exact]
    assert exact == [1, 2, 4, 8, 16, 32]


def test_one_peer_exponential_takes_turns_among_the_sources_of_exponential() -> None:
    once, turns = made("exponential", 13), made("one-peer-exponential", 13)
    for peer in range(13):
        seen = [turns.sources(peer, step) for step in range(turns.period)]
        assert seen == [[(peer - 2**step) % 13] for step in range(4)]
        assert sorted(source for (source,) in seen) == once.sources(peer)


def test_one_period_of_a_complete_graph_is_the_mean() -> None:
    np.testing.assert_allclose(made("complete", 13).matrix(), 1 / 13, atol=1e-15)


@pytest.mark.parametrize(
    ("size", "rows", "shape"), [(12, 0, (3, 4)), (16, 0, (4, 4)), (13, 0, (1, 13)), (12, 6, (6, 2))]
)
def test_a_torus_is_nearly_square_unless_rows_are_given(size: int, rows: int, shape: tuple[int, int]) -> None:
    torus = Torus(size, rows)
    assert (torus.rows, torus.columns) == shape


def test_a_torus_joins_the_four_beside_each_and_wraps_around() -> None:
    assert made("torus", 16).sources(0) == [1, 3, 4, 12]
    with pytest.raises(BadOption, match="1, 2, 3, 4, 6, 12"):
        build("torus:rows=5", 12)
    with pytest.raises(BadOption):
        build("torus:rows=-2", 12)


def test_a_hypercube_names_the_powers_beside() -> None:
    with pytest.raises(BadOption, match="use 8 or 16 peers"):
        build("hypercube", 12)


@pytest.mark.parametrize(("size", "degree"), [(2, 1), (9, 2), (12, 3), (12, 9), (33, 4), (64, 61)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_regular_graphs_are_regular_connected_and_set_by_the_seed(
    size: int, degree: int, seed: int
) -> None:
    edges = RandomRegular(size, degree, seed).edges_at(0)
    assert set(np.bincount(np.ravel(edges))) == {degree} and len(edges) == size * degree // 2
    assert is_connected(size, edges) and edges == RandomRegular(size, degree, seed).edges_at(0)


def test_other_seeds_draw_other_graphs() -> None:
    assert len({tuple(RandomRegular(16, 3, seed).edges_at(0)) for seed in range(5)}) > 1


@pytest.mark.parametrize(("size", "degree"), [(5, 3), (4, 4), (4, 1), (1000, 1000)])
def test_impossible_degrees_are_refused(size: int, degree: int) -> None:
    with pytest.raises(BadOption, match="use degree=2"):
        build(f"random-regular:degree={degree}", size)


def test_a_file_is_an_edge_list_with_comments(tmp_path: Path) -> None:
    path = tmp_path / "edges.txt"
    path.write_text("# a path\n0 2\n\n2  1 # and its end\n1 2\n")
    topology = build(f"file:path={path}", 3)
    assert topology.edges() == [(0, 2), (1, 2)] == topology.spanning()
    np.testing.assert_allclose(topology.matrix()[2], 1 / 3)


@pytest.mark.parametrize(
    ("text", "size", "message"),
    [
        ("0 1\n1\n", 2, "line 2"),
        ("0 1 0.5\n", 2, "line 1"),
        ("0 x\n", 2, "line 1"),
        ("0 1\n\n# no\n1 2\n", 2, r"line 4(.|\n)*use 3 peers"),
        ("1 1\n", 2, "line 1"),
        ("-1 0\n", 2, "line 1"),
        ("0 1\n", 3, "not connected(.|\n)*peer 2"),
        ("", 2, "not connected"),
        ("\N{SNOWMAN} 1\n", 2, "line 1"),
    ],
)
def test_a_wrong_file_names_the_line(tmp_path: Path, text: str, size: int, message: str) -> None:
    path = tmp_path / "edges.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(HpcsgdError, match=message):
        build(f"file:path={path}", size)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match=r"none\.txt"):
        build(f"file:path={tmp_path / 'none.txt'}", 2)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadOption, match="cannot read"):
        build(f"file:path={tmp_path / 'bytes'}", 2)


def test_errors_of_specs_list_valid_names() -> None:
    with pytest.raises(BadOption, match="one-peer-exponential"):
        build("rnig", 4)
    with pytest.raises(BadOption, match="degree=int"):
        build("random-regular:degree=4+sead=1", 8)
