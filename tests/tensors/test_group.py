"""A tensor group is one buffer that torch, NumPy and the node's other ranks see in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpcsgd import TensorGroup, collectives
from hpcsgd.tensors.group import ALIGNMENT, aligned_part

pytestmark = pytest.mark.mpi


def tensors() -> list[tuple[str, torch.Tensor]]:
    return [
        ("matrix", torch.zeros(3, 5)),
        ("scalar", torch.zeros(())),
        ("nothing", torch.zeros(0, 7)),
        ("image", torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)),
        ("transposed", torch.zeros(4, 6).t()),
        ("sparse strides", torch.zeros(8, 8)[::2, ::2]),
        ("half", torch.zeros(5, dtype=torch.float16)),
        ("brain", torch.zeros(5, dtype=torch.bfloat16)),
        ("double", torch.zeros(9, dtype=torch.float64)),
        ("again", torch.zeros(33)),
    ]


def test_views_have_the_shape_dtype_and_strides_of_the_model(world: Any) -> None:
    group = TensorGroup(world, tensors())
    assert list(group.views) == [name for name, _ in tensors()]
    for name, tensor in tensors():
        view = group.views[name]
        assert view.shape == tensor.shape and view.dtype == tensor.dtype
        assert view.data_ptr() % ALIGNMENT == 0 or not view.numel()
        assert not view.any()
        if name != "sparse strides":
            assert view.stride() == tensor.stride()


def test_a_bucket_holds_one_dtype_and_buckets_end_in_the_given_order(world: Any) -> None:
    group, order = TensorGroup(world, tensors()), [name for name, _ in tensors()]
    for bucket in group:
        dtypes = {group.views[name].dtype for name in bucket.names}
        assert dtypes == {bucket.flat.dtype}
        assert bucket.names == sorted(bucket.names, key=order.index)
    assert [bucket.names[-1] for bucket in group] == ["half", "brain", "double", "again"]
    assert [bucket.index for bucket in group] == list(range(4)) and len(group) == 4
    assert sum(bucket.nbytes for bucket in group) == group.nbytes


@pytest.mark.parametrize("mib", [1e-9, 1 / 1024, 4])
def test_buckets_keep_to_their_size(world: Any, mib: float) -> None:
    sizes = [10, 100, 100, 300, 20, 20]
    group = TensorGroup(world, [(str(i), torch.zeros(n)) for i, n in enumerate(sizes)], mib)
    for bucket in group:
        assert bucket.nbytes <= mib * 2**20 or len(bucket.names) == 1
    pairs = zip(group.buckets, group.buckets[1:], strict=False)
    assert all(a.nbytes + aligned(b.views[0]) > mib * 2**20 for a, b in pairs)


def aligned(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


@pytest.mark.host("rows of the node's ranks in shared memory")
def test_views_share_memory_with_buffer_and_numpy(world: Any) -> None:
    group = TensorGroup(world, tensors())
    for bucket in group:
        assert bucket.host is bucket.flat or bucket.host.data_ptr() == bucket.flat.data_ptr()
        for view in bucket.views:
            view.fill_(2)
        assert float(bucket.flat.sum()) == 2 * sum(view.numel() for view in bucket.views)
        if bucket.matrix is not None:
            bucket.matrix[world.local_rank, bucket.start] = 7
            assert float(bucket.views[0].flatten()[0]) == 7
    group.views["double"].numpy(force=True)[3] = 5
    assert group.views["double"][3] == 5


@pytest.mark.host("rows of the node's ranks in shared memory")
def test_the_node_sees_each_others_memory(world: Any) -> None:
    group = TensorGroup(world, tensors())
    if not group.shared:
        pytest.skip("one rank a node")
    for view in group.views.values():
        view.fill_(world.local_rank + 1)
    world.gather("all have written")
    for bucket in group:
        assert [float(row.max()) for row in bucket.rows] == list(range(1, world.local_size + 1))
    world.gather("all have read")


def test_a_group_of_mixed_dtypes_is_averaged(world: Any) -> None:
    group = TensorGroup(world, tensors())
    for index, view in enumerate(group.views.values()):
        view.fill_(world.rank + index)
    collectives.allreduce(group, 1.0)
    total = sum(range(world.size))
    for index, view in enumerate(group.views.values()):
        assert torch.all(view == total + index * world.size)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("numel", [0, 1, 15, 16, 17, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_cuts_cover_and_stay_on_lines(parts: int, numel: int, dtype: torch.dtype) -> None:
    flat = torch.arange(numel).to(dtype)
    pieces = [aligned_part(flat, index, parts) for index in range(parts)]
    assert torch.equal(torch.cat([flat[piece] for piece in pieces]), flat)
    line = ALIGNMENT // dtype.itemsize
    assert all(piece.start % line == 0 or piece.start == numel for piece in pieces)
    sizes = [piece.stop - piece.start for piece in pieces]
    assert max(sizes) - min(sizes) < 2 * line


def test_alternating_dtypes_need_one_bucket_each(world: Any) -> None:
    layers = [
        (f"{layer}.{name}", torch.zeros(30, dtype=dtype))
        for layer in range(24)
        for name, dtype in (("linear", torch.bfloat16), ("norm", torch.float32))
    ]
    assert [len(bucket.names) for bucket in TensorGroup(world, layers)] == [24, 24]


def test_every_view_has_a_storage_of_its_own_in_the_buffer(world: Any) -> None:
    group = TensorGroup(world, tensors())
    for name, tensor in tensors():
        view = group.views[name]
        assert view.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    for bucket in group:
        bucket.flat.fill_(3)
    assert all(bool((view == 3).all()) for view in group.views.values())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_tensors_are_averaged(world: Any, dtype: torch.dtype) -> None:
    values = torch.complex(torch.arange(6.0), torch.arange(6.0) - 3).to(dtype).view(2, 3).t()
    group = TensorGroup(world, [("real", torch.zeros(5)), ("complex", values), ("scalar", values[0, 0])])
    view = group.views["complex"]
    assert view.dtype == dtype and view.stride() == values.stride()
    view.copy_(values * (1 + world.rank))
    collectives.allreduce(group, 1.0)
    assert torch.equal(view, values * sum(range(1, world.size + 1)))
