"""The copy of the model of rank 0: every kind of tensor, and one bucket of additional memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hpcsgd import BadOption, Disagreement, Run
from hpcsgd.training.model_copy import RootCopy, copy_from_rank_0

_MIB = 1 / 1024


def tensors(rank: int) -> list[tuple[str, torch.Tensor]]:
    """Tensors with values of their own on each rank, and strides that depend on the rank."""
    generator = torch.Generator().manual_seed(rank)
    numbers = torch.randn(40, 30, generator=generator)
    image = numbers[:24, :20].reshape(2, 3, 8, 10)
    return [
        ("matrix", numbers),
        ("transposed", numbers.t() if rank else numbers.t().contiguous()),
        ("steps", numbers[::2, ::3]),
        ("image", image.to(memory_format=torch.channels_last) if rank % 2 else image),
        ("long", torch.randn(5000, generator=generator)),
        ("expanded", torch.full((1, 3), float(rank)).expand(700, 3)),
        ("scalar", numbers[0, 0].clone()),
        ("nothing", torch.zeros(0, 4)),
        ("complex", torch.complex(numbers[0], numbers[1])),
        ("bool", numbers[:3] > 0),
        ("count", torch.tensor(rank)),
        *(
            (str(dtype), numbers[:2].to(dtype))
            for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float64)
        ),
    ]


@pytest.mark.mpi
@pytest.mark.parametrize("mib", [_MIB, 4])
def test_all_ranks_get_the_bits_of_rank_0(world: Any, mib: float) -> None:
    found, expected = tensors(world.rank), tensors(0)
    copy_from_rank_0(world, found, mib)
    for (name, tensor), (_, right) in zip(found, expected, strict=True):
        assert torch.equal(
            tensor.double() if tensor.is_floating_point() else tensor,
            right.double() if right.is_floating_point() else right,
        ), name


@pytest.mark.mpi(min_size=2)
def test_the_copy_needs_one_bucket(world: Any) -> None:
    copied = RootCopy(world, _MIB)
    copied.copy(tensors(world.rank))
    assert copied._buffer is not None and copied._buffer.nbytes <= 1024
    small = RootCopy(world)
    small.copy([("a", torch.zeros(8))])
    assert small._buffer is not None and small._buffer.nbytes == 64


@pytest.mark.mpi(min_size=2)
def test_other_kinds_of_tensors_are_left_alone_and_must_be_equal(world: Any) -> None:
    class Packed(nn.Parameter):
        pass

    def packed(value: float) -> Any:
        frozen = Packed(torch.full((3,), value), requires_grad=False)
        return [("packed", frozen), ("sparse", torch.eye(3).mul(2).to_sparse())]

    copy_from_rank_0(world, packed(1.0))
    with pytest.raises(Disagreement, match="value of packed"):
        copy_from_rank_0(world, packed(float(world.rank)))


def test_lazy_modules_need_a_batch_first(alone: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with pytest.raises(BadOption, match=r"1\.weight of a lazy module(.|\n)*run one batch"):
        Run(model, torch.optim.SGD(model[0].parameters(), 0.1), comm=alone)
