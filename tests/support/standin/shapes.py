"""Shapes of the results of operators of the stand-in, as torch's meta device has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAME = "standin"
_NUMBERS = (torch.NumberType, torch.IntType, torch.FloatType, torch.BoolType)


def is_here(value: Any) -> bool:
    """Return whether a value is a tensor of the device."""
    return isinstance(value, Tensor) and value.device.type == NAME


@dataclass(frozen=True)
class New:
    """A result that is a new tensor."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Given:
    """A result that is an argument, by the index among its tensors, with its size after the operator."""

    index: int
    size: torch.Size


#: Results by operator and arguments: torch's look at shapes takes longer than all else.
_known: dict[Any, Any] = {}


def results(operator: Any, given: Any, tensors: list[Tensor]) -> Any:
    """Return the results, with `New` and `Given` for tensors, as torch's meta device has them.

    Parameters
    ----------
    operator, given
        The operator and its arguments, (positional ones, those by name).
    tensors
        The tensors among the arguments.

    Raises
    ------
    NotImplementedError or RuntimeError
        The result, or its shape, depends on values.
    """
    key = operator, _signature(given, {id(each): n for n, each in enumerate(tensors)})
    try:
        found = _known.get(key)
        if found is None:
            found = _known[key] = _results(operator, given, tensors)
    except TypeError:  # a storage, or another argument without a hash
        found = _results(operator, given, tensors)
    if isinstance(found, Exception):
        raise found
    return found


def _signature(value: Any, indices: dict[int, int]) -> Any:
    """Return all of an argument that shapes depend on."""
    if isinstance(value, Tensor):
        return indices[id(value)], value.size(), value.stride(), value.dtype, is_here(value)
    if isinstance(value, list | tuple):
        return tuple([_signature(each, indices) for each in value])
    if isinstance(value, dict):
        return tuple([(key, _signature(each, indices)) for key, each in value.items()])
    return type(value), value


def _results(operator: Any, given: Any, tensors: list[Tensor]) -> Any:
    """Return the results, with `New` and `Given` for tensors, or the error of torch's meta device."""
    if any(isinstance(each.type, _NUMBERS) for each in operator._schema.returns):
        return NotImplementedError("a number is returned")
    meta, origins = converted(given, _like_meta, "meta")
    try:
        found = operator(*meta[0], **meta[1])
    except (NotImplementedError, RuntimeError) as error:
        return error.with_traceback(None)
    indices = {id(each): n for n, each in enumerate(tensors)}

    def result(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in origins:
            return Given(indices[id(origins[id(value)])], value.size())
        return New(value.size(), value.stride(), value.dtype)

    return mapped(result, found)


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to all that lists, tuples and dictionaries hold."""
    if isinstance(value, list | tuple):
        return type(value)([mapped(function, each) for each in value])
    if isinstance(value, dict):
        return {key: mapped(function, each) for key, each in value.items()}
    return function(value)


def converted(given: Any, convert: Any, device: str) -> tuple[Any, dict[int, Tensor]]:
    """Return arguments for another device, and the tensor of the stand-in for each converted one."""
    converted: dict[int, Tensor] = {}
    origins: dict[int, Tensor] = {}

    def one(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device(device)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in converted:
            # A GPU reads a tensor of the host when the kernel is queued.
            converted[id(value)] = new = convert(value) if is_here(value) else value.clone().to(device)
            origins[id(new)] = value
        return converted[id(value)]

    return mapped(one, given), origins


def _like_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def flat(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [each for value in values for each in flat(value)]
