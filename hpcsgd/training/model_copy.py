"""The copy of the model of rank 0 to all ranks, with one bucket of additional memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from hpcsgd.collectives import broadcast
from hpcsgd.errors import BadOption
from hpcsgd.mpi.world import World
from hpcsgd.tensors.group import ALIGNMENT, DEFAULT_BUCKET_MIB, Bucket, TensorGroup
from hpcsgd.tensors.memory import overwrite, without_repetition

_MOST_MIB = 1024  # of memory that a copy takes beside the model

Named = Sequence[tuple[str, Tensor]]


def check_trainable(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], ranks: int) -> None:
    """Check that a model's tensors can be compared and copied, and that nothing else averages gradients.

    The tensors are those that all ranks have in common. One rank alone needs none of this but shapes.

    Raises
    ------
    BadOption
        A tensor waits for a first batch, as those of lazy modules do; is on the meta device; is a DTensor; or
        the model is wrapped in DistributedDataParallel.
    """
    for name, tensor in tensors:
        problem = _problem(tensor, ranks)
        if problem:
            raise BadOption(f"{name} {problem[0]}", do=problem[1].format(name=name), everywhere=True)
    if ranks > 1 and any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise BadOption(
            "the model is wrapped in DistributedDataParallel, which averages gradients by itself",
            do="pass the module inside, model.module, to Run, and use it in the loop; with Accelerate do not "
            "prepare the model",
            everywhere=True,
        )


def _problem(tensor: Tensor, ranks: int) -> tuple[str, str] | None:
    """Return why a tensor cannot be compared and copied, and what to do; None: it can be."""
    if is_lazy(tensor):
        return (
            "of a lazy module has no shape yet",
            "run one batch through the model before Run, and before the optimizer is created",
        )
    if ranks == 1:
        return None
    if tensor.is_meta:
        return (
            "is on the meta device, and has no values",
            "call model.to_empty(device='cpu') and give it values before Run, or leave it to each rank: "
            "Run(..., local=[{name!r}])",
        )
    if hasattr(tensor, "device_mesh"):
        return (
            "is a DTensor, which torch.distributed shards (FSDP, tensor parallelism)",
            "pass the model without fully_shard() or parallelize_module(): each rank has a whole model",
        )
    return None


def copy_from_rank_0(world: World, tensors: Named, bucket_mib: float = DEFAULT_BUCKET_MIB) -> None:
    """Overwrite (name, tensor) pairs with those of rank 0; collective.

    Tensors that are not plain memory (quantised, sparse, frozen ones of another class) are left alone, and
    must be equal already.

    Raises
    ------
    Disagreement
        A tensor that is left alone differs from that of rank 0.
    """
    RootCopy(world, bucket_mib).copy(tensors)


class RootCopy:
    """Copies tensors of rank 0 to all ranks, through a buffer of the size of a bucket."""

    def __init__(self, world: World, bucket_mib: float = DEFAULT_BUCKET_MIB) -> None:
        self._world = world
        self._limit = max(ALIGNMENT, int(min(bucket_mib, _MOST_MIB) * 2**20) // ALIGNMENT * ALIGNMENT)
        self._buffer: Bucket | None = None

    @torch.no_grad()
    def copy(self, tensors: Named) -> None:
        """Overwrite (name, tensor) pairs with those of rank 0; see `copy_from_rank_0`."""
        world = self._world
        if world.size == 1:
            return
        plain: dict[torch.dtype, list[Tensor]] = {}
        others = {}
        for name, tensor in tensors:
            if is_plain(tensor):
                plain.setdefault(tensor.dtype, []).append(without_repetition(tensor.detach()))
            else:
                others[f"value of {name}, which is not copied,"] = _digest(tensor)
        world.check_consistent(others)
        # A load is of one dtype, so that one call copies all of its pieces.
        loads = [load for each in plain.values() for load in _loads(each, self._limit)]
        if not loads:
            return
        bucket = self._buffer_of(_aligned(max(_nbytes(load) for load in loads)))
        for load in loads:
            flat = bucket.flat[: _nbytes(load)].view(load[0].dtype)
            parts = torch._utils._unflatten_dense_tensors(flat, load)  # type: ignore[no-untyped-call]
            if world.rank == 0:
                overwrite(parts, load)
            broadcast(bucket)
            if world.rank > 0:
                overwrite(load, parts)

    def _buffer_of(self, nbytes: int) -> Bucket:
        if self._buffer is None or self._buffer.nbytes < nbytes:
            self._buffer = None  # the old one is freed first
            template = torch.empty(nbytes, dtype=torch.uint8, device="meta")
            self._buffer = TensorGroup(self._world, [("model of rank 0", template)]).buckets[0]
        return self._buffer


def _loads(tensors: Iterable[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Divide tensors of one dtype into lists of pieces of at most `limit` bytes."""
    load: list[Tensor] = []
    nbytes = 0
    for tensor in tensors:
        for piece in _pieces(tensor, limit):
            size = piece.numel() * piece.element_size()
            if nbytes + size > limit:
                yield load
                load, nbytes = [], 0
            load.append(piece)
            nbytes += size
    if load:
        yield load


def _nbytes(load: Sequence[Tensor]) -> int:
    return sum(piece.numel() for piece in load) * load[0].element_size()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _pieces(tensor: Tensor, limit: int) -> Iterator[Tensor]:
    """Divide a tensor, by its shape alone, into views of at most `limit` bytes."""
    if tensor.numel() * tensor.element_size() <= limit:
        if tensor.numel():
            yield tensor
        return
    row = tensor[0].numel() * tensor.element_size()
    if row > limit:
        for part in tensor.unbind():
            yield from _pieces(part, limit)
    else:
        yield from torch.split(tensor, limit // row)


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is plain memory, or is trained."""
    if tensor.layout != torch.strided or tensor.is_quantized or hasattr(tensor, "__tensor_flatten__"):
        return False
    return tensor.requires_grad or type(tensor) in (Tensor, nn.Parameter)


def _digest(tensor: Tensor) -> str:
    """Return a checksum of a tensor that is not plain memory."""
    total = hashlib.blake2b(digest_size=16)
    for part in _plain_parts(tensor):
        total.update(f"{part.dtype} {tuple(part.shape)}".encode())
        for piece in _pieces(part.detach(), 2**24):
            total.update(piece.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors of which a tensor consists."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _plain_parts(getattr(tensor, name))
    elif tensor.is_quantized:
        yield tensor.int_repr()
    elif tensor.layout == torch.strided:
        yield tensor.detach().as_subclass(Tensor)
    elif tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
