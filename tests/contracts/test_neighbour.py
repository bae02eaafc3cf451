"""Neighbour exchange: exact sums of the requested versions, and deadlines that name a missing rank."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hpcsgd import HpcsgdError, TensorGroup, topology
from hpcsgd.collectives.neighbour_exchange import Exchange as Exchange_
from hpcsgd.collectives.peers import Peers
from hpcsgd.tensors.weighted_sum import weighted_sum
from tests.support.launch import launch

LAYOUTS = [(0, True), (2, True), (0, False)]
SHAPES = [(3, 5), (1,), (70_000,), (17,)]


class Exchange(Exchange_):
    """One whose calls are jobs, as they must be where messages are under way in the communication thread."""

    def publish(self, *arguments: Any) -> None:
        self.world.progress.run("publish", lambda: super(Exchange, self).publish(*arguments))

    def mix(self, *arguments: Any) -> None:
        self.world.progress.run("mix", lambda: super(Exchange, self).mix(*arguments))


def groups_of(peers: Peers, dtype: torch.dtype = torch.float64) -> list[TensorGroup]:
    tensors = [(str(i), torch.zeros(shape, dtype=dtype)) for i, shape in enumerate(SHAPES)]
    return [TensorGroup(peers.world, tensors, bucket_mib=0.25) for _ in peers.local]


def value(peer: int, version: int, length: int) -> torch.Tensor:
    """Return the model that a peer publishes: integers, exact in float16 too."""
    numbers = torch.arange(length) % 7
    return (numbers + peer * 8 + version % 5).double()


def write(group: TensorGroup, peer: int, version: int) -> None:
    for bucket in group:
        bucket.flat.copy_(value(peer, version, bucket.numel))


@pytest.mark.mpi
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_weighted_sum_of_published_models(
    world_of: Callable[..., Any], layout: tuple[int, bool], each: int, dtype: torch.dtype
) -> None:
    world = world_of(*layout)
    peers = Peers(world, each * world.size)
    groups = groups_of(peers, dtype)
    exchange = Exchange(peers, groups)
    # Sources in any order, oneself among them or not, and weights that every dtype holds.
    terms = {
        peer: [((peer + shift) % peers.size, 0.25 * (shift + 1)) for shift in (2, 0, 1)][: peers.size]
        for peer in range(peers.size)
    }
    if peers.size < 3:
        terms = {peer: [(source, 0.5) for source in range(peers.size)] for peer in terms}
    for version in range(3):
        for peer, group in zip(peers.local, groups, strict=True):
            write(group, peer, version)
            exchange.publish(peer, version, [r for r, t in terms.items() if r != peer and peer in dict(t)])
        for peer, group in zip(peers.local, groups, strict=True):
            exchange.mix(peer, version, terms[peer])
            for bucket in group:
                expected = sum(w * value(p, version, bucket.numel) for p, w in terms[peer])
                torch.testing.assert_close(
                    bucket.flat.double(), expected, rtol=torch.finfo(dtype).eps, atol=0
                )
        exchange.flush()
    world.progress.drain()


@pytest.mark.mpi
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_irregular_exchanges_in_any_timing_never_read_another_version(
    world_of: Callable[..., Any], layout: tuple[int, bool]
) -> None:
    world = world_of(*layout)
    peers = Peers(world)
    [group] = groups_of(peers)
    exchange, me = Exchange(peers, [group]), world.rank
    common, own = np.random.default_rng(3), np.random.default_rng(world.rank)
    for version in range(60):
        # Who shows to whom changes from version to version; most take no part and are ahead or behind.
        active = [int(p) for p in common.permutation(peers.size)[: max(2, peers.size // 2)]]
        ring = dict(zip(active, active[1:] + active[:1], strict=True))
        if me in ring and len(set(active)) > 1:
            write(group, me, version)
            exchange.publish(me, version, [p for p, source in ring.items() if source == me])
            if own.random() < 0.2:
                time.sleep(0.003 * own.random())
            exchange.mix(me, version, [(ring[me], 1.0)])
            for bucket in group:
                assert torch.equal(bucket.flat, value(ring[me], version, bucket.numel))
            exchange.flush()
    world.progress.drain()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_slow_reader_still_reads_the_requested_version(
    world_of: Callable[..., Any], layout: tuple[int, bool]
) -> None:
    world = world_of(*layout)
    peers = Peers(world)
    [group] = groups_of(peers)
    exchange = Exchange(peers, [group])
    for version in range(5):  # more than there are slots: rank 0 must wait for its reader
        if world.rank == 0:
            write(group, 0, version)
            exchange.publish(0, version, [1])
            exchange.flush()
        elif world.rank == 1:
            time.sleep(0.01)
            exchange.mix(1, version, [(0, 1.0)])
            assert all(torch.equal(b.flat, value(0, version, b.numel)) for b in group)
    world.progress.drain()
    world.gather(None)


@pytest.mark.mpi(min_size=2)
def test_a_model_overwritten_while_it_is_read_is_an_error(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = Peers(world)
    [group] = groups_of(peers)
    exchange = Exchange(peers, [group])
    if world.rank == 0:
        exchange.publish(0, 4, [1])
    if world.rank == 1:
        other: Any = exchange._kernel

        def overwrite(*arguments: Any) -> bool:
            other.publish(exchange._flags[0], 0, 0, 99, 1)  # as a second writer would by mistake
            return bool(holds(*arguments))

        holds = other.holds_version
        monkeypatch.setattr(other, "holds_version", overwrite)
        with pytest.raises(HpcsgdError, match="overwritten while it was read, version 4"):
            steps = Exchange_.mix(exchange, 1, 4, [(0, 1.0)])
            world.waiter.complete(lambda: steps, "a sum")  # not as a task: those after it would fail too
    world.gather(None)


@pytest.mark.mpi
def test_versions_may_start_again_after_reset(world: Any) -> None:
    peers = Peers(world)
    [group] = groups_of(peers)
    exchange = Exchange(peers, [group])
    graph = topology.build("ring", peers.size)
    for repeat in range(2):
        for version in range(3):
            write(group, world.rank, version + 10 * repeat)
            exchange.publish(world.rank, version, graph.readers(world.rank))
            exchange.mix(world.rank, version, graph.row(world.rank))
            expected = sum(w * value(p, version + 10 * repeat, 17) for p, w in graph.row(world.rank))
            torch.testing.assert_close(group.views["3"], expected)
        exchange.reset()


def test_weighted_sum_may_overwrite_a_term() -> None:
    a, b = torch.randn(200_001, dtype=torch.float64), torch.randn(200_001, dtype=torch.float64)
    expected = 0.3 * b + 0.7 * a
    for out in (a.clone(), b.clone()):
        first, second = (a, out) if torch.equal(out, b) else (out, b)
        weighted_sum(out, [(second, 0.3), (first, 0.7)])
        torch.testing.assert_close(out, expected, rtol=1e-14, atol=1e-15)


_MISSING = """
import os, time
import torch
from hpcsgd import World, TensorGroup
from hpcsgd.collectives.neighbour_exchange import Exchange
from hpcsgd.errors import DeadlineExceeded
from hpcsgd.collectives.peers import Peers

for shared in "10":
    os.environ["HPCSGD_SHARED_MEMORY"] = shared
    world = World(timeout=60, device=str(torch.get_default_device()))
    group = TensorGroup(world, [("x", torch.zeros(1_000_000))])
    exchange = Exchange(Peers(world), [group])
    world.gather(None)
    world.waiter.timeout = 1.0
    if world.rank == 1:
        time.sleep(4)
        continue
    complete = world.waiter.complete
    complete(lambda: exchange.publish(0, 7, [1]), "publish")

    def publish_two():
        for version in (8, 9):
            yield from exchange.publish(0, version, [1])

    for job in (lambda: exchange.mix(0, 7, [(1, 1.0)]), publish_two):
        try:
            complete(job, "a wait")
        except DeadlineExceeded as error:
            text = str(error)
            assert "for rank 1" in text and ("version 7" in text or "version 9" in text), text
            print("named", flush=True)
time.sleep(0.5)
os._exit(0)
"""


def test_the_missing_rank_is_named() -> None:
    job = launch(_MISSING, 2, timeout=60)
    assert job.stdout.count("named") == 4, job


@pytest.mark.parametrize("length", [0, 1, 2047, 2048, 2049, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weighted_sum_rounds_each_product_and_each_sum_once(dtype: torch.dtype, length: int) -> None:
    weights = [0.3, 1.0, -1.7]
    terms = [torch.randn(length, dtype=dtype) for _ in weights]
    expected = terms[0].numpy(force=True) * np.asarray(weights[0], terms[0].numpy(force=True).dtype)
    for term, weight in zip(terms[1:], weights[1:], strict=True):
        expected = expected + np.asarray(weight, expected.dtype) * term.numpy(force=True)
    out = terms[1]
    weighted_sum(out, list(zip(terms, weights, strict=True)))
    np.testing.assert_array_equal(out.numpy(force=True), expected)
