"""The copy of the model of rank 0: every kind of tensor, and one bucket of additional memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from hpcsgd import BadOption, Disagreement, LocalSGD, Run
from hpcsgd.training.model_copy import RootCopy, copy_from_rank_0
from tests.support.devices import Random

_MIB = 1 / 1024


def tensors(rank: int) -> list[tuple[str, torch.Tensor]]:
    """Tensors with values of their own on each rank, and strides that depend on the rank."""
    random = Random(rank)
    numbers = random.normal(40, 30)
    image = numbers[:24, :20].reshape(2, 3, 8, 10)
    return [
        ("matrix", numbers),
        ("transposed", numbers.t() if rank else numbers.t().contiguous()),
        ("steps", numbers[::2, ::3]),
        ("image", image.to(memory_format=torch.channels_last) if rank % 2 else image),
        ("long", random.normal(5000)),
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


@pytest.mark.not_on_standin("it has no sparse tensors")
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


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of torch.distributed that this rank has for itself."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def step(run: Run, model: nn.Module) -> None:
    model(torch.ones(1, 2)).sum().backward()
    run.step()


@pytest.mark.not_on_standin("it has no process group")
@pytest.mark.mpi
@pytest.mark.parametrize("strategy", [None, LocalSGD(2)])
def test_a_model_in_distributed_data_parallel_is_refused(
    world: Any, process_group: None, strategy: Any
) -> None:
    model = DistributedDataParallel(nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if world.size == 1:
        with Run(model, optimizer, strategy, comm=world) as run:
            step(run, model)
        return
    with pytest.raises(BadOption, match=r"(?s)wrapped in DistributedDataParallel.*pass the module inside"):
        Run(model, optimizer, strategy, comm=world)
    with Run(model.module, optimizer, strategy, comm=world) as run:
        step(run, model.module)


@pytest.mark.not_on_standin("it has no process group")
@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("before", [True, False])
def test_gradients_that_two_average_are_an_error(world: Any, process_group: None, before: bool) -> None:
    model = nn.Linear(2, 1)
    wrapped = DistributedDataParallel(model) if before else None
    run = Run(model, torch.optim.SGD(model.parameters(), 0.1), comm=world)
    wrapped = wrapped or DistributedDataParallel(model)
    with pytest.raises(BadOption, match="called inside DistributedDataParallel"):
        step(run, wrapped)
    step(run, model)
    run.close()


@pytest.mark.mpi
def test_tensors_without_values_are_refused_unless_local(world: Any) -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 1), "head": nn.Linear(2, 1, device="meta")})
    optimizer = torch.optim.SGD(model.body.parameters(), 0.1)
    if world.size > 1:
        with pytest.raises(
            BadOption, match=r"(?s)head\.weight is on the meta device.*local=\['head\.weight'\]"
        ):
            Run(model, optimizer, comm=world)
    with Run(model, optimizer, comm=world, local=["head.*"] if world.size > 1 else []) as run:
        step(run, model["body"])


@pytest.mark.mpi(min_size=2)
def test_sharded_tensors_are_refused(world: Any, process_group: None) -> None:
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    model = nn.Linear(2, 1)
    model.weight = nn.Parameter(distribute_tensor(model.weight.data, init_device_mesh("cpu", (1,))))
    with pytest.raises(BadOption, match=r"(?s)weight is a DTensor.*without fully_shard"):
        Run(model, torch.optim.SGD(model.parameters(), 0.1), comm=world)
