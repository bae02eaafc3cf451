"""Descriptions of packages and tensors, which must be equal in all programs of a training."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

from torch import Tensor


def package_versions() -> dict[str, object]:
    """Return the versions of the packages that affect results."""
    return {f"version of {name}": package_version(name) for name in ("hpcsgd", "torch", "numpy", "numba")}


@cache  # parses a file of a hundred lines
def package_version(name: str) -> str:
    """Return the version of a package that may be installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def describe_tensor(name: str, tensor: Tensor) -> str:
    """Describe a parameter or buffer in one line: name, shape, dtype, and whether it is trained."""
    trained = "trained" if tensor.requires_grad else "fixed"
    return f"{name} {tuple(tensor.shape)} {tensor.dtype} {trained}"
