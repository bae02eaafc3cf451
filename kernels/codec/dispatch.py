"""Selection of host or GPU kernels by device."""

from __future__ import annotations

from typing import Any

import torch


def kernels_for(device: torch.device) -> Any:
    """Return the module of kernels for tensors on `device`: `host`, or `device` with the same functions."""
    if device.type == "cpu":
        from hpcsgd.kernels.codec import host

        return host
    from hpcsgd.kernels.codec import device as on_device

    return on_device
