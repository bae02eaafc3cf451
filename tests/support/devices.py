"""The device of the models in tests, chosen by `--device`."""

from __future__ import annotations

import torch

_chosen = "cpu"


def use_device(name: str) -> None:
    """Make a device torch's default one; called before any backward pass, at which torch counts devices."""
    global _chosen
    _chosen = name
    if name == "standin":
        from tests.support import standin

        standin.register()
    elif name == "cpu" and not torch.cuda.is_available():
        # torch's own takes 7 ms, for the stack that it formats for each kind of device.
        torch.manual_seed = torch.default_generator.manual_seed
    restore_default_device()


def restore_default_device() -> None:
    """Make the chosen device the default one again, after a test of another default."""
    torch.set_default_device(None if _chosen == "cpu" else _chosen)
