"""Errors for gradients that a training loop lacks, changes or computes in ways that cannot be averaged."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.world import World


def check_all_used(world: World, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Raise `HpcsgdError` where a trained parameter has no gradient."""
    missing = [name for name, p in parameters if p.requires_grad and p.grad is None]
    if missing:
        raise HpcsgdError(
            f"parameters without a gradient: {', '.join(missing)}",
            rank=world.global_rank,
            got="unused='error'",
            do="use them in the loss, freeze them, or let them contribute zeros (unused='zeros')",
        )


def not_finished(rank: int) -> HpcsgdError:
    """Return the error for a new backward pass before the last one is averaged."""
    return HpcsgdError(
        "a new backward pass, while gradients of the last one are being reduced",
        rank=rank,
        do="after an exception within backward() call run.skip(), which leaves the step out on all "
        "ranks; with wait='step' call run.synchronize() or run.step() after each backward()",
    )


def late_gradient(name: str, rank: int) -> HpcsgdError:
    """Return the error for a gradient that a pass adds to after its bucket was reduced."""
    return HpcsgdError(
        f"{name} got one more gradient in a backward pass after its bucket was reduced",
        rank=rank,
        do="use torch.utils.checkpoint with use_reentrant=False",
    )


def other_dtype(name: str, expected: torch.dtype, got: torch.dtype, rank: int) -> HpcsgdError:
    """Return the error for a gradient of another dtype than that of its bucket."""
    return HpcsgdError(
        f"the gradient of {name} has another dtype than at the start",
        rank=rank,
        expected=expected,
        got=got,
        do="convert the model before hpcsgd.Run is created",
    )


def removed_gradient(name: str, rank: int) -> HpcsgdError:
    """Return the error for a gradient that is gone before the end of backward."""
    return HpcsgdError(
        f"the gradient of {name} was removed within backward",
        rank=rank,
        do="call run.step() after backward(), and no optimizer in a hook of backward",
    )


def changed_gradient(name: str, rank: int) -> HpcsgdError:
    """Return the error for a gradient that was changed between backward and its average."""
    return HpcsgdError(
        f"the gradient of {name} was changed before it was averaged",
        rank=rank,
        do="call run.synchronize() (with weights: run.synchronize(weight=...)) after backward(), and "
        "change the gradients then",
    )


def warn_of_view(name: str, rank: int) -> None:
    """Warn of a gradient in memory of the loop."""
    warnings.warn(
        f"rank {rank}: the gradient of {name} is a view of other memory, as of a flat buffer of the loop. "
        "The run replaces it by memory of its own: what the loop does to the buffer has no effect. Use the "
        "gradients themselves, and run.zero_grad()",
        RuntimeWarning,
        stacklevel=2,
    )
