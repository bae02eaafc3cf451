"""The device of the models in tests, chosen by `--device`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

#: Folders of tests with models in this process, which run on every device.
_WITH_MODELS = {
    "commands/train",
    "compress",
    "contracts",
    "devices",
    "kernels",
    "strategies",
    "tensors",
    "training",
    "training/checkpoint",
    "training/models",
}
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


def fewer(number: int) -> int:
    """Return a number of cases; fewer on the stand-in, whose operators take 0.1 ms each."""
    return number // 6 if _chosen == "standin" else number


def on_device(values: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the device of the models."""
    return values.to(torch.get_default_device())


class Random:
    """Draws numbers for the device of the models, the same ones on every device."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def normal(self, *size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Draw normal numbers."""
        return on_device(torch.randn(size, generator=self._generator, dtype=dtype, device="cpu"))

    def integers(self, end: int, *size: int) -> torch.Tensor:
        """Draw integers from 0 to `end` - 1."""
        return on_device(torch.randint(end, size, generator=self._generator, device="cpu"))


def normal(*size: int, seed: int) -> torch.Tensor:
    """Return normal numbers on the device of the models, the same ones on every device."""
    return Random(seed).normal(*size)


def assert_bits(found: np.ndarray, expected: np.ndarray) -> None:
    """Check that arrays are equal; approximately on a real GPU, where one of them has other roundings."""
    tolerance = 1e-5 if _chosen.startswith("cuda") else 0.0
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def prelude() -> str:
    """Return code for a process of its own, in which `--device auto` is the device of the models."""
    if _chosen != "standin":
        return ""
    root = str(Path(__file__).parents[2])
    return (
        f"import sys; sys.path.append({root!r})\n"
        "import torch\n"
        "from hpcsgd.mpi import environment\n"
        "from tests.support import standin\n"
        "standin.register()\n"
        "environment.device = lambda name, local_rank: torch.device('standin', 0)\n"
    )


def reason_to_skip(item: pytest.Item, device: str) -> str:
    """Return why a test does not run with `--device device`; empty: it does."""
    if item.get_closest_marker("standin") and device != "standin":
        return "needs --device standin"
    if device == "cpu":
        return ""
    missing = item.get_closest_marker("not_on_standin")
    if missing and device == "standin":
        return f"not on the stand-in: {missing.args[0]}"
    host = item.get_closest_marker("host")
    if host:
        return f"only on the CPU: {host.args[0]}"
    folder = item.path.parent.relative_to(Path(__file__).parents[1])
    if str(folder) not in _WITH_MODELS:
        return "only on the CPU: it trains no model in this process"
    return ""
