"""Values of gradients, apart from their derivatives and from the zeros that `zero_grad` leaves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class WithValue(torch.autograd.Function):
    """A gradient with the value of another tensor, in all its bits, and the derivative of its own."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, value: Tensor) -> Tensor:
        return value.to(gradient.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *derivatives: Tensor) -> tuple[Tensor, None]:
        return derivatives[0], None


def is_not_plus_zero(tensor: Tensor) -> bool:
    """Return whether a tensor has any value but +0."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return bool(real.any() or torch.signbit(real).any())
