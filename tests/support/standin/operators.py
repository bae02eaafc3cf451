"""Operators of the stand-in: each is queued on the current stream, and done there by the one of the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.support.standin import shapes, streams
from tests.support.standin.memory import memory
from tests.support.standin.shapes import NAME

aten = torch.ops.aten
_KEY = "PrivateUse1"
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_AUTOCAST_HERE = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
#: Their kernels of the CPU only make another tensor of the same storage.
_VIEWS = (
    "as_strided",
    "view",
    "view.dtype",
    "_reshape_alias",
    "alias",
    "unfold",
    "view_as_real",
    "view_as_complex",
    "set_.source_Storage_storage_offset",
    "set_.source_Tensor",
    "set_.source_Storage",
)
#: Autocast gives them its dtype.
_LOW_PRECISION = ("linear", "conv2d", "matmul", "bmm")
_libraries: list[Any] = []  # a registration ends with its library
_generator = torch.Generator()


def register() -> None:
    """Add the device to torch; once a process."""
    _setup_privateuseone_for_python_backend(NAME, _module())
    library = torch.library.Library("aten", "IMPL")
    for name in _VIEWS:
        library.impl(name, _view_operator(_overload(name)), _KEY)
    for name, function in {
        "empty.memory_format": _empty,
        "empty_strided": _empty_strided,
        "resize_": _resize,
        "_copy_from": _copy,
        "_copy_from_and_resize": _copy_and_resize,
        "_local_scalar_dense": _read,
        "native_dropout": _dropout,
        "convolution_overrideable": _convolution,
        "convolution_backward_overrideable": _convolution_backward,
    }.items():
        library.impl(name, function, _KEY)
    for name in ("Conjugate", "Negative"):  # torch would resolve such views by copies, without end
        library.impl("_copy_from", torch.library.fallthrough_kernel, name)
    fallback = torch.library.Library("_", "IMPL")
    fallback.fallback(_queue_operator, _KEY)
    fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in _LOW_PRECISION:
        library.impl(name, _in_low_precision(_overload(name)), "AutocastPrivateUse1")
    _libraries.extend([library, fallback])
    _replace_storage_methods()


def _module() -> Any:
    """What stands for `torch.cuda`."""
    return SimpleNamespace(
        Stream=streams.Stream,
        Event=streams.Event,
        stream=streams.stream,
        current_stream=streams.current_stream,
        synchronize=streams.synchronize,
        is_initialized=lambda: True,
        is_available=lambda: True,
        _is_in_bad_fork=lambda: False,
        current_device=lambda: 0,
        device_count=lambda: 1,
        manual_seed_all=_generator.manual_seed,
        get_rng_state=lambda device=None: _generator.get_state(),
        set_rng_state=lambda state, device=None: _generator.set_state(state),
        get_rng_state_all=lambda: [_generator.get_state()],
        set_rng_state_all=lambda states: [_generator.set_state(each) for each in states],
        device=lambda device: contextlib.nullcontext(),
        get_device_properties=lambda device: SimpleNamespace(multi_processor_count=3),
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
    )


def _in_low_precision(operator: Any) -> Any:
    def one(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(torch.get_autocast_dtype(NAME)) if floating else value

    def run(*arguments: Any, **options: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_HERE):
            return operator(*shapes.mapped(one, arguments), **shapes.mapped(one, options))

    return run


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _view_operator(operator: Any) -> Any:
    return lambda *arguments, **options: operator.redispatch(_CPU, *arguments, **options)


# Memory.


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    dtype = dtype or torch.get_default_dtype()
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    flat = memory.allocate(0 if 0 in size else (last + 1) * dtype.itemsize)
    if dtype != torch.uint8:
        flat = aten.view.dtype.redispatch(_CPU, flat, dtype)
    return aten.as_strided.default.redispatch(_CPU, flat, size, stride, 0)


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    like = torch.empty(size, device="meta", memory_format=memory_format or torch.contiguous_format)
    return _empty_strided(size, like.stride(), dtype=dtype)


def _resize(tensor: Tensor, size: Any, *, memory_format: Any = None) -> Tensor:
    if tuple(tensor.size()) != tuple(size):
        new = _empty(size, dtype=tensor.dtype, memory_format=memory_format)
        kept = min(tensor.numel(), new.numel())
        if kept:
            new.view(-1)[:kept].copy_(tensor.reshape(-1)[:kept])
        tensor.set_(new.untyped_storage(), 0, new.size(), new.stride())
    return tensor


def _replace_storage_methods() -> None:
    """Copy storages as tensors; torch would ask an allocator that a device in Python cannot have."""
    clone, to = torch.UntypedStorage.clone, torch.UntypedStorage.to

    def clone_anywhere(storage: Any) -> Any:
        return _copied(storage) if storage.device.type == NAME else clone(storage)

    def to_anywhere(storage: Any, *, device: Any, non_blocking: bool = False) -> Any:
        if torch.device(device).type == NAME:
            return storage if storage.device.type == NAME else _copied(storage)
        return to(storage, device=device, non_blocking=non_blocking)

    torch.UntypedStorage.clone, torch.UntypedStorage.to = clone_anywhere, to_anywhere


def _copied(storage: Any) -> Any:
    source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return memory.allocate(storage.nbytes()).copy_(source).untyped_storage()


# Copies.


def _copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Queue a copy between host and device, or within the device; a blocking one waits for its stream."""
    to, of = (memory.contents(each) if shapes.is_here(each) else each for each in (target, source))
    queue_kernel(lambda: to.copy_(of))
    if non_blocking or (shapes.is_here(source) and shapes.is_here(target)):
        return target
    if shapes.is_here(source):
        streams.current_stream().synchronize()
    else:
        streams.current_stream().drain()  # CUDA has read pageable memory when the call returns
    return target


def _copy_and_resize(source: Tensor, target: Tensor) -> Tensor:
    target.resize_(source.size())
    return _copy(source, target)


def _read(tensor: Tensor) -> Any:
    streams.current_stream().synchronize()
    return memory.contents(tensor).item()


# Kernels.


def queue_kernel(run: Any) -> None:
    """Queue work on the current stream."""
    memory.queue_frees()

    def do() -> None:
        with (
            torch.no_grad(),
            torch._C._AutoDispatchBelowAutograd(),
            torch._C._ExcludeDispatchKeyGuard(_AUTOCAST),
        ):
            run()

    streams.current_stream().queue(do)


def _queue_operator(operator: Any, *arguments: Any, **options: Any) -> Any:
    """Queue an operator that torch has no kernel of the device for: all but those above."""
    _check_no_view(operator)
    _check_generator(options.get("generator"))
    _check_devices(operator, [*shapes.flat(arguments), *shapes.flat(options)])
    given = _with_tensors(operator, arguments), options
    try:
        outputs = _outputs(operator, given)
    except (NotImplementedError, RuntimeError):
        # Its result, or the shape of it, depends on values: as on a GPU, the caller waits.
        return _do_now(operator, given)
    real, seed = _real(given), _draw(operator)
    targets = shapes.mapped(lambda each: memory.contents(each) if shapes.is_here(each) else each, outputs)

    def run() -> None:
        for target, value in _pairs(targets, _call(operator, real, seed)):
            if target.data_ptr() != value.data_ptr():
                target.copy_(value)

    queue_kernel(run)
    return outputs


def _pairs(targets: Any, values: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Generate pairs of tensors, but for values that the CPU does not compute: a batch norm has such ones."""
    if isinstance(targets, list | tuple):
        for target, value in zip(targets, values, strict=True):
            yield from _pairs(target, value)
    elif isinstance(values, Tensor) and values.numel():
        yield targets, values


def _check_no_view(operator: Any) -> None:
    views = [each for each in operator._schema.returns if each.alias_info and not each.alias_info.is_write]
    assert not views, f"{operator} returns a view: add it to _VIEWS"


def _check_generator(generator: torch.Generator | None) -> None:
    if generator is not None:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device}'")


def _check_devices(operator: Any, tensors: list[Tensor]) -> None:
    on_host = any(each.dim() and each.device.type == "cpu" for each in tensors)
    if on_host and not operator.name().startswith("aten::index"):  # indices may lie in host memory
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME} and cpu")


def _with_tensors(operator: Any, arguments: Any) -> list[Any]:
    """Return the arguments with tensors for the numbers that torch makes of its own tensors of numbers."""
    rows = zip(arguments, operator._schema.arguments, strict=False)
    return [
        torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None, device="cpu")
        if isinstance(each.type, torch.TensorType) and isinstance(value, bool | int | float)
        else value
        for value, each in rows
    ]


def _outputs(operator: Any, given: Any) -> Any:
    """Return the tensors for the results."""
    tensors = shapes.flat(given)

    def output(value: Any) -> Any:
        if isinstance(value, shapes.New):
            return _empty_strided(value.size, value.stride, dtype=value.dtype)
        if not isinstance(value, shapes.Given):
            return value
        tensor = tensors[value.index]
        return tensor if tensor.size() == value.size else _resize(tensor, value.size)

    return shapes.mapped(output, shapes.results(operator, given, tensors))


def _do_now(operator: Any, given: Any) -> Any:
    streams.current_stream().synchronize()
    real, origins = shapes.converted(given, memory.contents, "cpu")

    def output(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in origins:
            return origins[id(value)]
        result = outs.pop(0) if outs else _empty_strided(value.size(), value.stride(), dtype=value.dtype)
        if result.size() != value.size():
            _resize(result, value.size())
        to = memory.contents(result)
        queue_kernel(lambda: to.copy_(value))
        return result

    outs = [given[1][each.name] for each in operator._schema.arguments if each.is_out]
    return shapes.mapped(output, _call(operator, real, _draw(operator)))


def _real(given: Any) -> Any:
    return shapes.converted(given, memory.contents, "cpu")[0]


def _draw(operator: Any) -> int | None:
    """Draw the seed of a random operator when it is queued, as a GPU's generator moves on then."""
    if torch.Tag.nondeterministic_seeded not in operator.tags:
        return None
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_(generator=_generator))


def _call(operator: Any, given: Any, seed: int | None) -> Any:
    arguments, options = given
    for each in operator._schema.arguments:
        if each.is_out and isinstance(value := options.get(each.name), Tensor):
            # Some operators resize their output for a while, as memory that others see cannot be.
            options = {**options, each.name: torch.empty(0, dtype=value.dtype, device="cpu")}
    if seed is not None:
        # A generator of its own: others may set the state of the CPU's meanwhile.
        options = {**options, "generator": torch.Generator("cpu").manual_seed(seed)}
    return operator(*arguments, **options)


def _dropout(values: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """The dropout that torch has for GPUs, of operators that accept a generator."""
    mask = torch.empty_like(values, dtype=torch.bool)
    if train is False:
        return values.clone(), mask.fill_(True)
    mask.bernoulli_(1 - p)
    return values * mask * (0.0 if p == 1 else 1 / (1 - p)), mask


def _convolution(*arguments: Any) -> Any:
    return _queue_operator(aten.convolution.default, *arguments)


def _convolution_backward(gradient: Any, value: Any, weight: Any, *arguments: Any) -> Any:
    *options, mask = arguments
    sizes = [weight.size(0)] if mask[2] else None
    return _queue_operator(aten.convolution_backward.default, gradient, value, weight, sizes, *options, mask)
