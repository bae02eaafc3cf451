"""The first step of `jobs/gpu_check.sh`: the device, and the versions of packages."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version


def print_facts(device: str) -> int:
    """Print the device and the versions of packages as one line of JSON; returns 1 without a usable GPU."""
    facts: dict[str, object] = {}
    problem = _gpu_facts(facts) if device == "cuda" else ""
    facts |= {"cores": os.cpu_count(), "python": sys.version.split()[0]}
    for name in ("torch", "numpy", "numba", "mpi4py", "mpich", "openmpi", "pytest", "pytest-mpi"):
        with suppress(PackageNotFoundError):
            facts[name] = version(name)
    print(json.dumps({"problem": problem, **facts} if problem else facts))
    return int(bool(problem))


def _gpu_facts(facts: dict[str, object]) -> str:
    """Add those of the GPU; returns the problem if torch or CuPy cannot use it."""
    try:
        import torch

        if not torch.cuda.is_available():
            return "torch finds no GPU"
        properties = torch.cuda.get_device_properties(0)
        facts["GPU"], facts["architecture"] = properties.name, f"sm_{properties.major}{properties.minor}"
        facts["GPUs"], facts["MiB"] = torch.cuda.device_count(), properties.total_memory >> 20
        facts["CUDA of torch"] = torch.version.cuda
        import cupy

        facts["CuPy"], facts["CUDA of driver"] = cupy.__version__, cupy.cuda.runtime.driverGetVersion()
        return "" if int(cupy.arange(3).sum()) == 3 else "CuPy adds up wrongly"
    except Exception as error:  # of whatever kind: the report has to name it
        return f"{type(error).__name__}: {error}"[:400]


if __name__ == "__main__":
    sys.exit(print_facts(sys.argv[1]))
