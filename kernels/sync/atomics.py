"""Atomic 32-bit words in shared memory, and waiting on one of them (Linux futex).

numba has no host atomics; these intrinsics emit LLVM's, so memory ordering holds on every architecture
and does not depend on the compiler version.
"""

from __future__ import annotations

import platform
import sys
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, types

from hpcsgd.kernels.jit import jit

_FUTEX_WAIT, _FUTEX_WAKE, _ALL_WAITERS = 0, 1, 2**31 - 1
_SYSCALL_NUMBERS = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}
_FUTEX = _SYSCALL_NUMBERS.get(platform.machine(), 0) if sys.platform == "linux" else 0
_POLL_MICROSECONDS = 50

intrinsic: Any = extending.intrinsic

# numba types these objects as if Python called them; compiled code does.
_syscall: Any = types.ExternalFunction("syscall", types.int64(*[types.int64] * 7))
_sched_yield: Any = types.ExternalFunction("sched_yield", types.int32())
_usleep: Any = types.ExternalFunction("usleep", types.int32(types.uint32))


def _pointer(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.gep(array.data, [arguments[1]])


@intrinsic  # type: ignore[untyped-decorator]
def load(_: Any, words: Any, index: Any) -> Any:
    """Load `words[index]` (int32), sequentially consistent: earlier writes of its writer are visible."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_pointer(context, builder, signature, arguments), "seq_cst", 4)

    return types.int32(words, types.int64), emit


@intrinsic  # type: ignore[untyped-decorator]
def store(_: Any, words: Any, index: Any, value: Any) -> Any:
    """Store `words[index] = value` (int32), sequentially consistent: publishes all earlier writes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature, arguments)
        builder.store_atomic(arguments[2], pointer, "seq_cst", 4)
        return context.get_dummy_value()

    return types.void(words, types.int64, types.int32), emit


@intrinsic  # type: ignore[untyped-decorator]
def add(_: Any, words: Any, index: Any, value: Any) -> Any:
    """Add to `words[index]` (int32) and return the previous value."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature, arguments)
        return builder.atomic_rmw("add", pointer, arguments[2], "seq_cst")

    return types.int32(words, types.int64, types.int32), emit


@intrinsic  # type: ignore[untyped-decorator]
def _address(_: Any, words: Any, index: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature, arguments)
        return builder.ptrtoint(pointer, ir.IntType(64))

    return types.int64(words, types.int64), emit


@jit
def futex_wait(words, index, value, microseconds):  # type: ignore[no-untyped-def]
    """Sleep while `words[index] == value`, at most `microseconds`; spurious wake-ups are possible."""
    if _FUTEX == 0:
        _usleep(np.uint32(_POLL_MICROSECONDS))
        return
    timeout = np.empty(2, np.int64)
    timeout[0] = microseconds // 1_000_000
    timeout[1] = microseconds % 1_000_000 * 1000
    word = _address(words, index)
    _syscall(_FUTEX, word, _FUTEX_WAIT, np.int64(value), _address(timeout, 0), 0, 0)


@jit
def yield_core():  # type: ignore[no-untyped-def]
    """Yield this core to another runnable thread."""
    _sched_yield()


@jit
def futex_wake(words, index):  # type: ignore[no-untyped-def]
    """Wake all processes that sleep on `words[index]`."""
    if _FUTEX != 0:
        _syscall(_FUTEX, _address(words, index), _FUTEX_WAKE, _ALL_WAITERS, 0, 0, 0)
