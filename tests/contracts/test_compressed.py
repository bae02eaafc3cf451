"""Compressed reductions on real ranks: every scheme, algorithm and layout against simulated ranks."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hpcsgd import BadOption, TensorGroup, World
from hpcsgd.collectives import allreduce, ring
from hpcsgd.collectives.reducer import make_reducer
from hpcsgd.compress import build
from tests.support import compressor_rows as c
from tests.support.collective_cases import LAYOUTS, NAMES, SUBCHUNK_BYTES, fits, same_bits
from tests.support.expected_reductions import SEED, Simulated, fill, inside

pytestmark = pytest.mark.mpi(min_size=2)
WorldOf = Callable[..., Any]
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
#: Matrices for PowerSGD, an empty one, a single element, and a vector longer than a ring's sub-chunk.
SHAPES = [(40, 30), (7,), (0,), (1,), (61, 50), (2000,)]
#: One of each kind, for tests that do not depend on options.
FEW = [
    c.half("bf16", 2.0**-8, 2.0**-134),
    c.with_feedback(c.multiscale()),
    c.with_feedback(c.powersgd()),
    c.with_feedback(c.topk()),
    c.with_feedback(c.rotated(c.maxnorm(3))),
]
PACKED = c.with_feedback(c.maxnorm(3))


@pytest.fixture(autouse=True)
def small_subchunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "_SUBCHUNK_BYTES", SUBCHUNK_BYTES)


def group_of(world: World, dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> TensorGroup:
    tensors = [(f"t{i}", torch.empty(shape, dtype=dtype)) for i, shape in enumerate(shapes)]
    return TensorGroup(world, tensors, bucket_mib=8 / 1024)


def by_node(group: TensorGroup, row: c.Row, algorithm: str) -> bool:
    if row.name == "powersgd" or (group.staged and not group.buckets[0].windowed):
        return False
    return algorithm == "two-level" or (algorithm == "auto" and group.shared and group.world.nodes > 1)


def start_all(reducer: Any, group: TensorGroup, scale: float) -> None:
    for bucket in group:
        reducer.start(bucket, scale)


@each_layout
@pytest.mark.parametrize("algorithm", NAMES)
def test_the_result_is_that_of_simulated_ranks(
    world_of: WorldOf, layout: tuple[int, bool], algorithm: str
) -> None:
    world = world_of(*layout)
    group = group_of(world)
    every = layout == (0, True) or (algorithm == "auto" and layout == (2, True))
    for number, row in enumerate(c.ROWS if every else FEW):
        compressor = build(row.spec)
        if not fits(group, algorithm) or (algorithm == "library" and row.name in ("fp16", "bf16")):
            with pytest.raises(BadOption, match="does not fit"):
                make_reducer(group, algorithm, compressor, SEED)
            continue
        expected = Simulated(group, row, by_node(group, row, algorithm))
        reducer = make_reducer(group, algorithm, compressor, SEED)
        for step in range(2 if remembers(row) else 1):
            world.activity.step = step
            fill(group, salt=number + step)
            start_all(reducer, group, 1 / world.size)
            assert reducer.finish()
            expected.check(expected.reduce(step, 1 / world.size, salt=number + step))


def remembers(row: c.Row) -> bool:
    return row.feedback or row.name == "powersgd"


@pytest.mark.parametrize("layout", [(0, True), (2, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_gradients_of_other_dtypes(world_of: WorldOf, layout: tuple[int, bool], dtype: torch.dtype) -> None:
    world = world_of(*layout)
    group = group_of(world, dtype)
    for row in [*FEW, c.randk(), c.signsgd()]:
        expected = Simulated(group, row, by_node(group, row, "auto"))
        reducer = make_reducer(group, "auto", build(row.spec), SEED)
        world.activity.step = 0
        fill(group)
        start_all(reducer, group, 1 / world.size)
        assert reducer.finish()
        assert same_bits(group), row
        # Of the result's own precision, where the sum depends on its order.
        for bucket, result in zip(group, expected.reduce(0, 1 / world.size), strict=True):
            mask = inside(bucket)
            rtol = 0 if row.words else 2 * torch.finfo(dtype).eps + 8 * row.precision
            atol = float(result.abs().max()) * (1e-4 if row.mixes and not row.words else rtol)
            torch.testing.assert_close(bucket.flat.cpu()[mask], result[mask], rtol=rtol, atol=atol)


@each_layout
def test_bytes_equal_the_formula(world_of: WorldOf, layout: tuple[int, bool]) -> None:
    world = world_of(*layout)
    tensor = [("t", torch.empty(120, 500))]
    for row in c.ROWS if layout in [(0, True), (2, True)] else FEW:
        group = TensorGroup(world, tensor)
        inside = by_node(group, row, "auto")
        expected = Simulated(group, row, inside)
        reducer = make_reducer(group, "auto" if inside else "ring", build(row.spec), SEED)
        fill(group)
        traffic, plain = world.traffic, group.nbytes
        before = traffic.sent, traffic.shared, traffic.saved
        start_all(reducer, group, 1.0)
        reducer.finish()
        sent, shared, saved = (
            now - then
            for now, then in zip((traffic.sent, traffic.shared, traffic.saved), before, strict=True)
        )
        # Buffers end at a cache line, and shares of a rank are rounded down.
        assert abs(sum(world.gather(sent)) - expected.bytes_sent()) <= 2 * 2 * world.size * 64, row
        if inside:
            parts = [group.buckets[0].part(rank, world.rings) for rank in range(world.rings)]
            own = parts[world.local_rank] if world.internode else slice(0, 0)
            assert shared == 2 * (world.local_size - 1) * 4 * (own.stop - own.start)
            plain, terms = 4 * (own.stop - own.start), world.nodes
            assert saved == (2 * (terms - 1) * plain // terms - sent if world.internode else 0)
        else:
            assert shared == 0
            assert saved == 2 * (world.size - 1) * plain // world.size - sent


@pytest.mark.parametrize("layout", [(0, True), (2, True), (0, False)], ids=str)
def test_many_buckets_in_flight_over_many_steps(world_of: WorldOf, layout: tuple[int, bool]) -> None:
    world = world_of(*layout)
    sizes = [(37 * i % 3000 + 1,) for i in range(25)]
    tensors = [(f"t{i}", torch.empty(size)) for i, size in enumerate(sizes)]
    group = TensorGroup(world, tensors, 1e-9)
    for algorithm in ("auto", "ring"):
        expected = Simulated(group, PACKED, by_node(group, PACKED, algorithm))
        reducer = make_reducer(group, algorithm, build(PACKED.spec), SEED)
        for step in range(3):
            world.activity.step = step
            fill(group, step)
            start_all(reducer, group, 0.5)
            assert reducer.finish()
            expected.check(expected.reduce(step, 0.5, step))


@pytest.mark.parametrize("layout", [(0, True), (2, True), (0, False)], ids=str)
@pytest.mark.parametrize("order", ["one after the other", "interleaved"])
def test_two_reductions_at_the_same_time(world_of: WorldOf, layout: tuple[int, bool], order: str) -> None:
    world = world_of(*layout)
    shapes = [(2000,), (3000,), (50, 60), (2500,), (61, 41)]
    groups = [group_of(world, shapes=shapes) for _ in range(2)]
    rows = [PACKED, c.with_feedback(c.multiscale())]
    for algorithm in ("auto", "ring"):
        expected = [Simulated(g, r, by_node(g, r, algorithm)) for g, r in zip(groups, rows, strict=True)]
        pair = [make_reducer(g, algorithm, build(r.spec), SEED) for g, r in zip(groups, rows, strict=True)]
        for step in range(3):
            world.activity.step = step
            for salt, group in enumerate(groups):
                fill(group, 10 * step + salt)
            starts = [(reducer, bucket) for reducer, g in zip(pair, groups, strict=True) for bucket in g]
            if order == "interleaved":
                starts.sort(key=lambda start: start[1].index)
            for reducer, bucket in starts:
                reducer.start(bucket, 0.5)
            for salt in (1, 0):
                assert pair[salt].finish()
                expected[salt].check(expected[salt].reduce(step, 0.5, 10 * step + salt))


def test_a_plain_reduction_at_the_same_time(world: Any) -> None:
    group, plain = group_of(world), group_of(world)
    reducer = make_reducer(group, "ring", build(PACKED.spec), SEED)
    expected = Simulated(group, PACKED, False)
    for step in range(3):
        world.activity.step = step
        fill(group, step)
        for bucket in plain:
            bucket.flat.fill_(world.rank)
        start_all(reducer, group, 0.5)
        allreduce(plain, 1.0, "ring")
        assert reducer.finish()
        expected.check(expected.reduce(step, 0.5, step))
        assert all(bool((b.flat == sum(range(world.size))).all()) for b in plain)


@pytest.mark.parametrize("layout", [(0, True), (2, True)], ids=str)
@pytest.mark.parametrize("row", [*FEW, c.signsgd()], ids=str)
def test_gaps_between_tensors_stay_zero(world_of: WorldOf, layout: tuple[int, bool], row: c.Row) -> None:
    """Nothing overwrites gaps, so a value left there would enter the next sum, and NaN every later one."""
    world = world_of(*layout)
    group = group_of(world)
    reducer = make_reducer(group, "auto", build(row.spec), SEED, nonfinite="skip")
    views, flats = group.views.values(), [bucket.flat for bucket in group]
    for step in range(3):
        world.activity.step = step
        for view in views:
            view.fill_(torch.nan if step == 1 else world.rank + 1)
        start_all(reducer, group, 0.5)
        assert reducer.finish() == (step != 1)
        world.gather("all have read")
        for view in views:
            view.zero_()
        assert not any(bool(flat.any()) for flat in flats), step
        world.gather("all have looked")


def residuals(reducer: Any) -> list[Any]:
    return [None if r is None else r.clone() for r in reducer.state_dict()["residuals"]]


@each_layout
@pytest.mark.parametrize("row", [PACKED, FEW[2], FEW[4]], ids=str)
def test_a_non_finite_bucket_is_skipped_on_all_ranks(
    world_of: WorldOf, layout: tuple[int, bool], row: c.Row
) -> None:
    world = world_of(*layout)
    group = group_of(world)
    expected = Simulated(group, row, by_node(group, row, "auto"))
    reducer = make_reducer(group, "auto", build(row.spec), SEED, nonfinite="skip")
    flagged, culprit = 1, world.size - 1
    for step in range(4):
        world.activity.step = step
        fill(group, step)
        bad = (flagged, culprit) if step in (1, 2) else (-1, -1)
        if bad[1] == world.rank:
            group.buckets[flagged].flat[0] = torch.nan
        before = residuals(reducer)
        start_all(reducer, group, 0.5)
        assert reducer.finish() == (step not in (1, 2))
        assert reducer.finish(), "reported once"
        results = list(expected.reduce(step, 0.5, step, bad))
        if bad[1] >= 0:
            # Other buckets go through; of the flagged one all ranks have NaN, where it was.
            assert bool(group.buckets[flagged].flat[0].isnan())
            kept = residuals(reducer)[flagged]
            size = 0 if kept is None or not expected.by_node else kept.numel()
            first = world.local_rank == 0 or not expected.by_node
            assert size == 0 or not first or torch.equal(kept, before[flagged])
        expected.check(iter(results))


@each_layout
def test_a_bucket_beyond_the_range_of_float16_is_skipped(world_of: WorldOf, layout: tuple[int, bool]) -> None:
    """A step of coarse codes is the euclidean norm of its block, beyond the largest number of float16."""
    world = world_of(*layout)
    for spec, fits_range in (("ef+maxnorm:bits=2,norm=euclidean", False), ("ef+maxnorm:bits=2", True)):
        group = group_of(world, torch.float16, [(4000,)])
        reducer = make_reducer(group, "auto", build(spec), SEED, nonfinite="skip")
        (view,) = group.views.values()
        view.fill_(3e4)
        before = residuals(reducer)
        start_all(reducer, group, 1 / world.size)
        assert reducer.finish() == fits_range
        assert bool(view.isfinite().all()) == fits_range
        if not fits_range:
            kept = zip(before, residuals(reducer), strict=True)
            assert all(old is None or torch.equal(old, new) for old, new in kept)


@pytest.mark.parametrize("layout", [(0, True), (2, True), (0, False)], ids=str)
def test_a_reduction_that_is_dropped_with_work_outstanding(
    world_of: WorldOf, layout: tuple[int, bool]
) -> None:
    world = world_of(*layout)
    for _ in range(3):
        group = group_of(world)
        reducer = make_reducer(group, "auto", build(PACKED.spec), SEED)
        fill(group)
        start_all(reducer, group, 1.0)
        del group, reducer
    gc.collect()
    world.progress.drain()
    world.activity.step = 0
    group = group_of(world)
    expected = Simulated(group, PACKED, by_node(group, PACKED, "auto"))
    reducer = make_reducer(group, "auto", build(PACKED.spec), SEED)
    fill(group)
    start_all(reducer, group, 1.0)
    assert reducer.finish()
    expected.check(expected.reduce(0, 1.0))


def test_options_that_do_not_fit_are_errors_on_all_ranks(world: Any) -> None:
    group = group_of(world)
    with pytest.raises(BadOption, match="'library' does not fit FP16") as error:
        make_reducer(group, "library", build("fp16"))
    assert "use 'auto' or 'ring'" in str(error.value)
    with pytest.raises(BadOption, match="unknown all-reduce algorithm 'rign'"):
        make_reducer(group, "rign", build("maxnorm"))
    allreduce(group)  # the ranks are still in step
