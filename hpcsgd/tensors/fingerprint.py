"""What programs that work together must have in common."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from torch import Tensor


def versions() -> dict[str, object]:
    """Of the packages that results depend on."""
    found: dict[str, object] = {}
    for name in ("hpcsgd", "torch", "numpy", "numba"):
        try:
            found[f"version of {name}"] = version(name)
        except PackageNotFoundError:
            found[f"version of {name}"] = "not installed"
    return found


def describe(name: str, tensor: Tensor) -> str:
    """A parameter or buffer in one line."""
    trained = "trained" if tensor.requires_grad else "fixed"
    return f"{name} {tuple(tensor.shape)} {tensor.dtype} {trained}"
