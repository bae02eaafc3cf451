"""TELEPORTATION: recursion of the tokens, transfer of optimizer states, and idle peers."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpcsgd import AllReduce, BadOption, HpcsgdError, Run, Teleportation, World, topology
from hpcsgd.strategies.teleportation.tokens import sample_holders
from tests.support.teleport_runs import (
    MOMENTUM,
    OPTIMIZERS,
    Regression,
    batch,
    begin,
    data,
    loaders,
    simulate,
    tokens,
    train,
    vector,
)

PAUSE = 1.8  # seconds
LAYOUTS = [(0, True), (2, True), (0, False)]


def test_holders_are_a_uniform_choice_in_random_order() -> None:
    for size, count in ((1, 1), (5, 2), (6, 6)):
        found = [sample_holders(7, step, size, count) for step in range(2000)]
        assert all(len(set(holders)) == count for holders in found)
        places = np.array([np.bincount(np.array(found)[:, m], minlength=size) for m in range(count)])
        np.testing.assert_allclose(places, 2000 / size, atol=6 * np.sqrt(2000 / size))
        sample_holders.cache_clear()
        assert sample_holders(7, 1999, size, count) == found[1999]
    assert sample_holders(7, 0, 30, 30) != sample_holders(8, 0, 30, 30)


@pytest.mark.mpi
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tokens_obey_the_recursion(world_of: Callable[..., Any], layout: tuple[int, bool]) -> None:
    world = world_of(*layout)
    n = world.size
    for size, active, name in (
        (n, n, "ring"),
        (n, (n + 1) // 2, "base:k=1"),
        (2 * n, n, "exponential"),
        (2 * n, 2 * n, "base:k=1"),
    ):
        found = []
        for fused in (True, False):
            with begin(world, Teleportation(active, name, fused), "plain", size) as run:
                train(run, 9)
                assert world.gather(run.steps) == [9] * n
                found.append(tokens(run))
        np.testing.assert_array_equal(*found)
        np.testing.assert_allclose(found[0], simulate(size, active, name, 0.0, 9), rtol=1e-11)


@pytest.mark.mpi
@pytest.mark.parametrize("fused", [True, False])
def test_momentum_moves_with_its_token(world: Any, fused: bool) -> None:
    size = 2 * world.size
    with begin(world, Teleportation(2, "ring", fused), nodes=size) as run:
        batches = [data(peer) for peer in run.peers]
        # With zeros instead of no gradients `shift` decays as all others do.
        for x, y in run.batches(batches, steps=12):
            run.zero_grad(set_to_none=False)
            (
                nn.functional.mse_loss(run.model(x), y) + 0 * sum(p.sum() for p in run.model.parameters())
            ).backward()
            run.step()
        np.testing.assert_allclose(tokens(run), simulate(size, 2, "ring", MOMENTUM, 12), rtol=1e-11)


@pytest.mark.mpi
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("optimizer", ["dampened", "slowing", "adam"])
def test_one_token_is_one_process_on_the_same_data(
    world_of: Callable[..., Any], layout: tuple[int, bool], optimizer: str
) -> None:
    world = world_of(*layout)
    alone, visits = Regression(), Counter[int]()
    own = OPTIMIZERS[optimizer](alone.parameters())
    for step in range(12):
        (peer,) = sample_holders(3, step, world.size, 1)
        x, y = batch(peer, visits[peer])
        visits[peer] += 1
        own.zero_grad()
        nn.functional.mse_loss(alone(x), y).backward()
        own.step()
    with begin(world, Teleportation(1), optimizer) as run:
        assert train(run, 12) == visits[world.rank]
        np.testing.assert_array_equal(tokens(run)[0], vector(alone))
        assert run.consensus_distance() == 0
        with run.averaged():
            np.testing.assert_array_equal(vector(run.model), vector(alone))


@pytest.mark.mpi
def test_all_active_and_complete_is_allreduce(world: Any) -> None:
    with begin(world, Teleportation(world.size, "complete"), "plain") as run:
        train(run, 8)
        found = tokens(run)
    model = Regression()
    reference = Run(model, OPTIMIZERS["plain"](model.parameters()), AllReduce(), comm=world)
    with reference as run:
        train(run, None, [batch(world.rank, step) for step in range(8)])
        np.testing.assert_allclose(found, np.tile(vector(model), (world.size, 1)), rtol=1e-11)


@pytest.mark.mpi
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_segments_and_resuming_change_no_bit(world: Any, optimizer: str) -> None:
    def make() -> Run:
        return begin(world, Teleportation((world.size + 1) // 2, "ring"), optimizer)

    with make() as straight:
        train(straight, 10)
        expected = tokens(straight)
    with make() as cut:
        batches = loaders(cut)
        train(cut, 5, batches)
        state = copy.deepcopy(cut.state_dict())
        train(cut, 1, batches)
        train(cut, 0, batches)
        train(cut, 4, batches)
        np.testing.assert_array_equal(tokens(cut), expected)
    seen = Counter(
        peer for step in range(5) for peer in sample_holders(3, step, world.size, (world.size + 1) // 2)
    )
    rest = [batch(world.rank, seen[world.rank] + visit) for visit in range(5)]
    with make() as resumed:
        train(resumed, 3)
        resumed.load_state_dict(state)
        train(resumed, 5, rest)
        np.testing.assert_array_equal(tokens(resumed), expected)


@pytest.mark.mpi
def test_peers_have_the_same_bits_on_any_rank(world: Any, alone: Any) -> None:
    def final(where: World, optimizer: str, fused: bool) -> np.ndarray:
        with begin(where, Teleportation(3, "exponential", fused), optimizer, 3 * world.size) as run:
            train(run, 10)
            return tokens(run)

    for optimizer in ("momentum", "adam"):
        expected = final(alone, optimizer, True)
        for fused in (True, False):
            np.testing.assert_array_equal(final(world, optimizer, fused), expected)


@pytest.mark.mpi
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["exponential", "base:k=1"])
def test_messages_are_those_of_the_schedule(world_of: Callable[..., Any], fused: bool, name: str) -> None:
    world, steps = world_of(0, False), 10
    active = max(1, world.size - 1)
    graph = topology.build(name, active)
    expected = hops = 0
    for step in range(steps):
        now, after = (sample_holders(3, t, world.size, active) for t in (step, step + 1))
        moved = sum(a != b for a, b in zip(now, after, strict=True))
        links = [(m, s) for m in range(active) for s in graph.sources(m, step)]
        stays = sum(after[m] == now[s] for m, s in [*links, *((m, m) for m in range(active))])
        expected += len(links) + (active - stays if fused else moved)
        hops += moved

    def sent(optimizer: str) -> tuple[float, int]:
        before = world.traffic.sent
        with begin(world, Teleportation(active, name, fused), optimizer) as run:
            train(run, 4)
            train(run, steps - 4)
            nbytes = run.strategy.parameters.group.nbytes or 1  # type: ignore[attr-defined]
            return sum(world.gather(world.traffic.sent - before)) / nbytes, nbytes

    beginning = sum(world.gather(_sent_by_an_empty_run(world)))
    plain, nbytes = sent("plain")
    assert plain - beginning / nbytes == expected
    # The state of momentum is a model, and a vector of which parameters have it.
    more = sent("momentum")[0] - plain
    assert more == pytest.approx(hops * round(more / max(hops, 1), 9))
    assert hops <= more <= 2 * hops


def _sent_by_an_empty_run(world: Any) -> int:
    before = world.traffic.sent
    with begin(world, Teleportation(1), "plain"):
        return int(world.traffic.sent - before)


@pytest.mark.mpi
def test_uneven_loaders_restart_until_the_end_of_the_longest(world: Any) -> None:
    with begin(world, Teleportation(1), "plain") as run:
        taken = train(run, None, [batch(world.rank, visit) for visit in range(3 + 2 * world.rank)])
        assert run.steps == 1 + 2 * world.size
        assert sum(world.gather(taken)) == run.steps


@pytest.mark.mpi(min_size=2)
def test_no_rank_waits_for_an_idle_peer(world: Any) -> None:
    last, pids = world.size - 1, world.gather((world.host, os.getpid()))
    if len({host for host, _ in pids}) > 1:
        pytest.skip("signals stay on one host")
    quiet = 6  # iterations in which the last rank is idle before it is active
    wanted = (seed for seed in range(10**5) if _is_idle(seed, world.size, quiet))
    times: dict[int, float] = {}
    with begin(world, Teleportation(1), seed=next(wanted)) as run:
        for x, y in run.batches(data(world.rank), steps=quiet + 1):
            now = run.steps
            if now == 0:
                time.sleep(0.3)  # all ranks have begun
                os.kill(pids[last][1], signal.SIGSTOP)
                threading.Timer(PAUSE, os.kill, (pids[last][1], signal.SIGCONT)).start()
                times[-1] = time.monotonic()
            run.zero_grad()
            nn.functional.mse_loss(run.model(x), y).backward()
            run.step()
            times[now] = time.monotonic()
    everything = {step: at for some in world.gather(times) for step, at in some.items()}
    stopped = everything.pop(-1)
    assert sorted(everything) == list(range(quiet + 1))
    assert everything[quiet - 1] - stopped < PAUSE < everything[quiet] - stopped + 0.1


def _is_idle(seed: int, size: int, quiet: int) -> bool:
    holders = [sample_holders(seed, step, size, 1)[0] for step in range(quiet + 1)]
    return holders[0] == 0 and size - 1 not in holders[:quiet] and holders[quiet] == size - 1


@pytest.mark.mpi
def test_a_loop_left_early_is_an_error(world: Any) -> None:
    with begin(world, Teleportation(1)) as run:
        for x, y in run.batches(data(world.rank), steps=2):
            run.zero_grad()
            nn.functional.mse_loss(run.model(x), y).backward()
            run.step()
            with pytest.raises(HpcsgdError, match=r"left early, after iteration 0"), run.averaged():
                pass
        train(run, 1)


@pytest.mark.mpi(min_size=2)
def test_a_step_of_an_idle_peer_is_an_error(world: Any) -> None:
    with begin(world, Teleportation(1)) as run:
        if world.rank not in sample_holders(3, 0, world.size, 1):
            with pytest.raises(HpcsgdError, match=r"iterate over run.batches"):
                run.step()


@pytest.mark.mpi
def test_impossible_numbers_of_active_peers(world: Any) -> None:
    with pytest.raises(BadOption, match=f"active={world.size} or fewer"):
        begin(world, Teleportation(world.size + 1))
    with begin(world, Teleportation()) as run:
        assert len(tokens(run)) == min(4, world.size)


@pytest.mark.mpi
def test_unsupported_optimizers_and_features_are_rejected(world: Any) -> None:
    model = Regression()
    with pytest.raises(BadOption, match="cannot transfer the optimizer state of LBFGS"):
        Run(model, torch.optim.LBFGS(model.parameters()), Teleportation(1), comm=world)
    with begin(world, Teleportation(), "slowing", 2 * world.size) as run:
        run.optimizer.grow = True  # type: ignore[attr-defined]
        for x, y in run.batches([data(peer) for peer in run.peers], steps=1):
            run.zero_grad()
            nn.functional.mse_loss(run.model(x), y).backward()
            with pytest.raises(BadOption, match="nothing, odd, more, at first count, nothing, odd"):
                run.step()
            break
