"""Strategies with compressed reductions: one rank, equal models, resuming, uneven batches, GradScaler."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpcsgd import AllReduce, BadOption, Disagreement, LocalSGD, Run, Strategy
from hpcsgd.compress import build
from hpcsgd.compress.error_feedback import ErrorFeedback
from hpcsgd.compress.float32 import Float32
from hpcsgd.compress.half import FP16
from hpcsgd.compress.maxnorm import QSGDMaxNorm
from hpcsgd.compress.topk import TopK
from hpcsgd.strategies import STRATEGIES
from tests.support import strategy_rows as s

#: Only reductions are compressed; methods that send whole models reject compression.
REDUCING = [row for row in s.ROWS if row.reductions(6)]
each_row = pytest.mark.parametrize("row", REDUCING, ids=str)
each_row_in_step = pytest.mark.parametrize(
    "row", [row for row in REDUCING if row.make().synchronous], ids=str
)
each_layout = pytest.mark.parametrize("layout", [(0, True), (2, True), (0, False)], ids=str)
each_use = pytest.mark.parametrize(
    ("layout", "make"),
    [
        pytest.param((0, True), AllReduce, id="allreduce"),
        pytest.param((2, True), AllReduce, id="allreduce-by-node"),
        pytest.param((2, True), lambda: LocalSGD(2), id="local-by-node"),
    ],
)
SPECS = [
    "bf16",
    "maxnorm",
    "ef+multiscale:bits=2x5",
    "ef+hadamard+maxnorm:bits=3",
    "ef+randk-maxnorm:ratio=0.3",
    "ef+powersgd:rank=1",
    "ef+topk:ratio=0.1",
    "ef+signsgd",
]


def net() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 1))


def begin(
    world: Any, strategy: Strategy, spec: str = "none", model: nn.Module | None = None, **options: Any
) -> Run:
    """A run with momentum, and several buckets."""
    model = model or net()
    optimizer = torch.optim.SGD(model.parameters(), s.LR, momentum=0.5)
    return Run(
        model, optimizer, strategy, comm=world, compress=build(spec), bucket_mib=512 / 2**20, **options
    )


def singles(batches: list[Any]) -> list[Any]:
    return [(x.float(), y.float() / 10) for x, y in batches]


def train(run: Run, steps: int, first: int = 0) -> int:
    return s.train(run, singles(s.batches_of(run.world.rank, steps, first)))


@each_row
@pytest.mark.parametrize("spec", ["maxnorm", "ef+powersgd", "ef+topk"])
def test_one_rank_is_plain_training_bit_for_bit(alone: Any, row: s.Row, spec: str) -> None:
    plain = net()
    optimizer = torch.optim.SGD(plain.parameters(), s.LR, momentum=0.5)
    for x, y in singles(s.batches_of(0, 5)):
        optimizer.zero_grad()
        nn.functional.mse_loss(plain(x), y).backward()
        optimizer.step()
    with begin(alone, row.make(), spec) as run:
        train(run, 5)
        assert all(map(torch.equal, run.model.parameters(), plain.parameters()))
        run.load_state_dict(copy.deepcopy(run.state_dict()))


@pytest.mark.mpi
@pytest.mark.parametrize("spec", SPECS)
@each_use
def test_models_stay_equal_on_all_ranks_and_learn(
    world_of: Callable[..., Any], layout: tuple[int, bool], make: Callable[[], Strategy], spec: str
) -> None:
    world = world_of(*layout)
    with begin(world, make(), spec) as run:
        losses = []
        x, y = singles(s.batches_of(world.rank, 1))[0]
        for step in range(6):
            run.zero_grad()
            loss = nn.functional.mse_loss(run.model(x), y)
            loss.backward()
            run.step()
            losses.append(float(loss.detach()))
            if isinstance(run.strategy, AllReduce) or step % 2:
                assert s.same_everywhere(world, run.model)
        every = np.array(world.gather(losses))
        assert every[:, -2:].sum() < every[:, :2].sum()


def state_of(run: Run) -> int:
    """Return a checksum of model, optimizer and residuals."""
    tensors: list[torch.Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                collect(value[key])
        elif isinstance(value, list | tuple):
            for each in value:
                collect(each)

    collect(run.state_dict())
    return zlib.crc32(b"".join(t.detach().contiguous().numpy(force=True).tobytes() for t in tensors))


@pytest.mark.mpi
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.startswith("ef+")])
@each_use
def test_save_resume_and_go_on_is_identical(
    world_of: Callable[..., Any], layout: tuple[int, bool], make: Callable[[], Strategy], spec: str
) -> None:
    world = world_of(*layout)
    with begin(world, make(), spec) as straight:
        train(straight, 7)
        expected = state_of(straight)
    with begin(world, make(), spec) as first:
        train(first, 3)
        state = copy.deepcopy(first.state_dict())
        train(first, 2, 50)
        assert state_of(first) != expected
    with begin(world, make(), spec) as second:
        train(second, 1, 70)
        second.load_state_dict(state)
        train(second, 4, 3)
        assert state_of(second) == expected


@pytest.mark.mpi
@each_layout
@each_row
def test_lossless_schemes_obey_the_recursion(
    world_of: Callable[..., Any], layout: tuple[int, bool], row: s.Row
) -> None:
    world = world_of(*layout)
    ranks = world.size
    for compressor in (Float32(), ErrorFeedback(Float32())):
        with s.start(row, world, compress=compressor) as run:
            s.train(run, s.batches_of(world.rank, 6))
            expected = s.simulate(row, ranks, 6, lambda _: [True] * ranks, lambda _: s.LR)
            np.testing.assert_allclose(s.models_of(run), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.mpi
@each_layout
def test_half_precision_of_small_whole_numbers_is_exact(
    world_of: Callable[..., Any], layout: tuple[int, bool]
) -> None:
    world = world_of(*layout)
    models = []
    for compressor in (None, FP16()):
        model = nn.Linear(30, 7)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        with Run(model, optimizer, comm=world, compress=compressor) as run:
            for step in range(3):
                run.zero_grad()
                model((torch.arange(30.0) + step + world.rank) % 5 - 2).sum().backward()
                run.step()
            models.append(s.vector(model))
    # A third of a whole number is not a binary fraction; nodes divide before they send.
    np.testing.assert_allclose(models[1], models[0], rtol=0 if world.size in (1, 2, 4) else 1e-3)


@pytest.mark.mpi(min_size=2)
def test_error_feedback_finds_what_top_k_alone_never_sends(world: Any) -> None:
    """Ranks differ in one coordinate, where their large gradients cancel; only the other one matters."""
    ranks, rank = world.size, world.rank
    pull = 2.0 if rank < ranks - 1 else -2.0 * (ranks - 1)

    def distance(compressor: Any) -> float:
        model = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(model.weight)
        with Run(model, torch.optim.SGD(model.parameters(), 0.1), comm=world, compress=compressor) as run:
            for _ in range(120):
                run.zero_grad()
                (pull * model.weight[0, 0] + (model.weight[0, 1] - 1).square() / 2).backward()
                run.step()
            return abs(float(model.weight.detach()[0, 1]) - 1)

    assert distance(TopK(k=1)) == 1
    assert distance(ErrorFeedback(TopK(k=1))) < 0.3


@pytest.mark.mpi
@each_row_in_step
@pytest.mark.parametrize("uneven", ["join", "stop"])
def test_uneven_batches(world: Any, row: s.Row, uneven: str) -> None:
    ranks = world.size
    steps = 3 if uneven == "stop" else 1 + 2 * ranks
    with s.start(row, world, uneven=uneven, compress=Float32()) as run:
        assert s.train(run, s.batches_of(world.rank, 3 + 2 * world.rank)) == steps
        expected = s.simulate(
            row, ranks, steps, lambda t: [t < 3 + 2 * r for r in range(ranks)], lambda _: s.LR
        )
        np.testing.assert_allclose(s.models_of(run), expected, rtol=1e-5, atol=1e-6)
    for spec in ("ef+maxnorm", "ef+topk:k=3"):
        with begin(world, row.make(), spec, uneven=uneven) as run:
            assert train(run, 3 + 2 * world.rank) == steps
            with run.averaged():
                assert s.same_everywhere(world, run.model)
                assert np.all(np.isfinite(s.vector(run.model)))


@pytest.mark.mpi(min_size=2)
@each_layout
@pytest.mark.parametrize("spec", ["ef+multiscale", "ef+powersgd:rank=1", "bf16"])
def test_grad_scaler_skips_the_same_steps_on_all_ranks(
    world_of: Callable[..., Any], layout: tuple[int, bool], spec: str
) -> None:
    world = world_of(*layout)
    with begin(world, AllReduce(), spec, nonfinite="skip") as run:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scales = []
        for step in range(6):
            x, y = singles(s.batches_of(world.rank, 1, step))[0]
            run.zero_grad()
            loss = nn.functional.mse_loss(run.model(x), y)
            bad = step in (2, 3) and world.rank == world.size - 1
            scaler.scale(loss * float("inf") if bad else loss).backward()
            own = s.vector(run.model)
            scaler.step(run)
            scaler.update()
            scales.append(scaler.get_scale())
            assert np.array_equal(s.vector(run.model), own) == (step in (2, 3))
        assert world.gather(scales) == [[1024, 1024, 512, 256, 256, 256]] * world.size
        assert np.all(np.isfinite(s.models_of(run)))
        assert s.same_everywhere(world, run.model)
        assert run.steps == 6


@pytest.mark.mpi
@pytest.mark.parametrize("name", STRATEGIES)
def test_what_a_method_does_not_compress_is_refused_but_on_one_rank(world: Any, name: str) -> None:
    if STRATEGIES[name].accepts_compression or world.size == 1:
        begin(world, STRATEGIES[name](), "bf16").close()
        return
    with pytest.raises(BadOption, match=r"cannot compress(.|\n)* use strategy allreduce, local, lasgd or ps"):
        begin(world, STRATEGIES[name](), "bf16")


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: {"compress": build("maxnorm:bits=5")}, "compress"),
        (lambda: {"compress": ErrorFeedback(QSGDMaxNorm())}, "compress"),
        (dict, "compress"),
        (lambda: {"compress": QSGDMaxNorm(), "seed": 3}, "seed"),
        (lambda: {"compress": QSGDMaxNorm(), "nonfinite": "skip"}, "nonfinite"),
    ],
)
def test_different_options_on_ranks_are_an_error(
    world: Any, make: Callable[[], dict[str, Any]], text: str
) -> None:
    options = make() if world.rank == 1 else {"compress": QSGDMaxNorm()}
    with pytest.raises(Disagreement, match=f"rank 1: {text}"):
        s.start(s.ROWS[0], world, **options)


@pytest.mark.mpi(min_size=2)
def test_the_seed_changes_the_rounding(world: Any) -> None:
    def final(seed: int) -> np.ndarray:
        with begin(world, AllReduce(), "maxnorm:bits=3", seed=seed) as run:
            train(run, 2)
            return s.vector(run.model)

    np.testing.assert_array_equal(final(1), final(1))
    assert not np.array_equal(final(1), final(2))
