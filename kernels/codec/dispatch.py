"""Which kernels work on a tensor: those of the host, or those of its GPU."""

from __future__ import annotations

from typing import Any

import torch


def ops(device: torch.device) -> Any:
    """The module of kernels for tensors on `device`: `host`, or `device` with the same functions."""
    if device.type == "cpu":
        from hpcsgd.kernels.codec import host

        return host
    from hpcsgd.kernels.codec import device as on_device

    return on_device
