"""Parameters that have no gradient where each must have one."""

from __future__ import annotations

from collections.abc import Iterable

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
