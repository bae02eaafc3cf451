"""The copy of the optimizer state of rank 0: of a checkpoint, for example, that rank 0 alone has loaded."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpcsgd.errors import BadOption
from hpcsgd.mpi.world import World
from hpcsgd.strategies.base import Strategy
from hpcsgd.tensors.group import DEFAULT_BUCKET_MIB
from hpcsgd.training.drift import checksum
from hpcsgd.training.model_copy import copy_from_rank_0, is_plain
from hpcsgd.training.optimizers import single_optimizers
from hpcsgd.training.trained_parameters import Named


@dataclass(frozen=True)
class _Slot:
    """The place of a tensor in a state, of which the values follow."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    on_host: bool


def copy_optimizer_state(
    world: World,
    optimizer: Any,
    parameters: Sequence[Named],
    strategy: Strategy,
    bucket_mib: float = DEFAULT_BUCKET_MIB,
) -> None:
    """Copy the optimizer state of rank 0, and the numbers in its groups, to ranks that need them; collective.

    With a strategy that averages gradients all ranks get them, if any state differs; with another one only
    ranks that have no state, as the others may have momentum of their own. Optimizers without a `state` by
    parameter, as those of torch.optim have, are left alone.
    """
    if world.size == 1:
        return
    workers, must_be_equal = strategy.workers(world.size), strategy.averages_gradients
    optimizers = single_optimizers(optimizer)
    with_state = [each for each in optimizers if isinstance(getattr(each, "state", None), MutableMapping)]
    tensors: list[Tensor] = []
    outlines = [_outlines(each.state, parameters, tensors) for each in with_state]
    digest = _digest(outlines, tensors if must_be_equal else ()) if any(outlines) else 0
    digests = world.gather(digest, "the comparison of optimizer states")
    receivers: Sequence[int]
    if must_be_equal:
        receivers = range(world.size) if len({*digests}) > 1 else ()
    else:
        receivers = [rank for rank in range(workers) if not digests[rank]] if digests[0] else ()
    if receivers:
        receives = world.rank in receivers
        _copy(world, with_state, parameters, outlines, tensors, receives=receives, bucket_mib=bucket_mib)


@torch.no_grad()
def _copy(
    world: World,
    optimizers: Sequence[Any],
    parameters: Sequence[Named],
    outlines: list[dict[str, Any]],
    tensors: list[Tensor],
    *,
    receives: bool,
    bucket_mib: float,
) -> None:
    groups = [[_numbers(group) for group in each.param_groups] for each in optimizers]
    sent = _pickled((outlines, groups)) if world.rank == 0 else None
    received = world.gather(sent, "the optimizer state of rank 0")[0]
    if received is None:
        raise BadOption(
            "the optimizer state of rank 0 cannot be copied to the others, as a part of it cannot be pickled",
            expected="the same state on every rank, or one that can be pickled",
            do="load the state of the optimizer on every rank before Run",
            everywhere=True,
        )
    outlines, groups = pickle.loads(received)
    named, states = dict(parameters), []
    if world.rank > 0:
        tensors = []
        states = [
            {key: _filled(each, named.get(key), tensors) for key, each in table.items()} for table in outlines
        ]
    copy_from_rank_0(world, [(f"optimizer state {i}", t) for i, t in enumerate(tensors)], bucket_mib)
    if world.rank == 0 or not receives:
        return
    for each, state, of_rank_0 in zip(optimizers, states, groups, strict=True):
        for key, own in list(_keys(each.state, parameters)):
            if key not in state:
                del each.state[own]
        each.state.update({named.get(key, key): value for key, value in state.items()})
        for group, numbers in zip(each.param_groups, of_rank_0, strict=False):  # some may be local
            for key, value in numbers.items():
                if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = value


def _pickled(value: object) -> bytes | None:
    try:
        return pickle.dumps(value)
    except Exception:  # whatever the objects of a user raise
        return None


def _keys(state: MutableMapping[Any, Any], parameters: Sequence[Named]) -> Iterator[tuple[str, Any]]:
    """Yield the common keys of a state: (name, parameter) pairs, and texts twice."""
    yield from ((name, p) for name, p in parameters if p in state)
    yield from ((key, key) for key in state if isinstance(key, str))


def _outlines(
    state: MutableMapping[Any, Any], parameters: Sequence[Named], tensors: list[Tensor]
) -> dict[str, Any]:
    return {name: _outline(state[key], tensors) for name, key in list(_keys(state, parameters))}


def _outline(value: Any, tensors: list[Tensor]) -> Any:
    """Return a value with slots in place of its tensors, which are appended to a list."""
    if isinstance(value, Tensor) and is_plain(value):
        tensors.append(value)
        return _Slot(value.dtype, tuple(value.shape), value.device.type == "cpu")
    if isinstance(value, dict):
        return {key: _outline(each, tensors) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_outline(each, tensors) for each in value)
    return value


def _filled(outline: Any, parameter: Tensor | None, tensors: list[Tensor]) -> Any:
    """Return a value with new tensors in place of its slots, which are appended to a list."""
    if isinstance(outline, _Slot):
        tensors.append(_new_tensor(outline, parameter))
        return tensors[-1]
    if isinstance(outline, dict):
        return {key: _filled(each, parameter, tensors) for key, each in outline.items()}
    if type(outline) in (list, tuple):
        return type(outline)(_filled(each, parameter, tensors) for each in outline)
    return outline


def _new_tensor(slot: _Slot, parameter: Tensor | None) -> Tensor:
    device = "cpu" if slot.on_host or parameter is None else parameter.device
    if parameter is not None and slot.shape == tuple(parameter.shape):
        return torch.empty_like(parameter, dtype=slot.dtype, device=device, requires_grad=False)
    return torch.empty(slot.shape, dtype=slot.dtype, device=device)


def _digest(outlines: list[dict[str, Any]], tensors: Iterable[Tensor]) -> int:
    """Return a checksum of states, which is not 0."""
    values = "".join(f" {checksum(tensor):08x}" for tensor in tensors)
    return zlib.crc32(f"{[_text(each) for each in outlines]}{values}".encode()) or 1


def _text(outline: Any) -> str:
    if isinstance(outline, dict):
        return "{" + " ".join(f"{key}: {_text(each)}" for key, each in sorted(outline.items(), key=str)) + "}"
    if type(outline) in (list, tuple):
        return "[" + " ".join(map(_text, outline)) + "]"
    # Of other objects the text may hold an address.
    return repr(outline) if isinstance(outline, _Slot | int | float | str | None) else type(outline).__name__


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a parameter group that are numbers, also in tensors, texts, or lists of them."""
    kinds = (int, float, str, tuple, list, type(None))
    numbers = {key: each for key, each in group.items() if key != "params" and isinstance(each, kinds)}
    small = {key: each for key, each in group.items() if isinstance(each, Tensor) and each.numel() < 100}
    return numbers | {key: each.detach().cpu() for key, each in small.items()}


def group_sizes(optimizer: Any, parameters: Sequence[Named]) -> list[int]:
    """Return the numbers of the given parameters in the optimizer's groups, without groups of none."""
    common = {p for _, p in parameters}
    sizes = (sum(p in common for p in group["params"]) for group in optimizer.param_groups)
    return [size for size in sizes if size]
