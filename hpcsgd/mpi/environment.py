"""The environment of a rank: launcher, cores, device, and the variables `HPCSGD_*` that a World reads."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from hpcsgd import registry
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi import launcher
from hpcsgd.registry.limits import Natural, Timeout

if TYPE_CHECKING:
    import torch

#: The variables that a World reads: the kind of the value, and the default.
VARIABLES: dict[str, tuple[Any, object]] = {
    "HPCSGD_TIMEOUT": (Timeout, 300.0),
    "HPCSGD_RANKS_PER_NODE": (Natural, 0),  # 0: all ranks of a machine
    "HPCSGD_SHARED_MEMORY": (bool, True),
    "HPCSGD_DEVICE_WINDOWS": (bool, True),
    # Never guessed, for an MPI without support reads a device pointer as host memory and crashes.
    "HPCSGD_CUDA_AWARE": (bool, False),
    "HPCSGD_TRACE": (Path, None),
}
_SPINS_ON_OWN_CORES = 20_000
_SPINS_ON_SHARED_CORES = 200


def check_launcher(MPI: Any) -> None:
    """Raise where the launcher has started more ranks than MPI sees."""
    other, processes = launcher.other_launcher()
    if MPI.COMM_WORLD.size == 1 < processes:
        raise HpcsgdError(
            f"{other} has started {processes} processes, each of which is rank 0 of 1 to MPI",
            expected="ranks that MPI sees",
            got=f"WORLD_SIZE={processes}",
            do=f"start with `mpiexec -n {processes} python SCRIPT` or srun instead; or, for one rank, unset "
            "WORLD_SIZE, RANK and LOCAL_RANK",
        )
    variable, count = launcher.size()
    if MPI.COMM_WORLD.size == 1 < count:
        raise HpcsgdError(
            "each process is rank 0 of 1 to MPI, but more ranks were started",
            expected=f"{count} ranks ({variable}={count})",
            got=f"size 1, from {MPI.Get_library_version().splitlines()[0].strip()}",
            do="start with the mpiexec of the MPI that mpi4py was built for; under Slurm with "
            "`srun --mpi=pmi2` (MPICH) or `srun --mpi=pmix` (Open MPI)",
        )


def read(variable: str) -> Any:
    """Return the value of one of `VARIABLES`; its default if it is not set, or empty.

    Raises
    ------
    BadOption
        It has another type, or is beyond its limits.
    """
    kind, default = VARIABLES[variable]
    text = os.environ.get(variable, "")
    return registry.read(variable, text, kind) if text else default


def check_variables() -> None:
    """Raise `BadOption` for the first variable with a wrong value."""
    for variable in VARIABLES:
        read(variable)


def device(name: str, local_rank: int) -> torch.device:
    """Return the device of a rank; `name` is "cpu", "cuda", "cuda:1" or "auto"."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.device(name)
    if found.type == "cpu" or ":" in name:
        return found
    return torch.device(found.type, local_rank % max(1, torch.get_device_module(found).device_count()))


def _check_device(name: str) -> None:
    import torch

    try:
        torch.device("cpu" if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(name) from error


#: Name of a device, as annotation of an option.
DeviceName = Annotated[str, registry.Accepted(_check_device, "auto, cpu, cuda or cuda:1")]


def share_of_cores(cores: set[int], bindings: list[set[int]], quota: float = math.inf) -> tuple[int, int]:
    """Return the number of compute threads of a rank, and the spins of its waits in native code.

    Parameters
    ----------
    cores
        The cores that this rank may run on.
    bindings
        Those of each rank of the node.
    quota
        Cores' worth of time that the container of these ranks has, see `cpu_quota`. Default: no limit.
    """
    sharing = sum(bool(cores & other) for other in bindings)
    count = max(1, int(min(len(cores), quota)))
    spins = _SPINS_ON_SHARED_CORES if sharing > count else _SPINS_ON_OWN_CORES
    return max(1, count // sharing), spins


def cpu_quota(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the cores' worth of time that this process's control group and its parents allow; else infinity.

    Parameters
    ----------
    groups
        File with the control groups of the process.
    root
        Where control groups are mounted, of version 1 or 2.
    """
    found = [math.inf]
    with contextlib.suppress(OSError):
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            mounts = [root / name for name in (controllers, "cpu") if name] if controllers else [root]
            for mount in mounts:
                folder = mount / path.lstrip("/")
                # In a container the path may be that of the host, which is not mounted.
                found += [_quota(each) for each in (folder, *folder.parents) if each.is_relative_to(mount)]
    return min(found)


def _quota(folder: Path) -> float:
    with contextlib.suppress(OSError, ValueError):
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        if quota != "max" and int(quota) > 0:
            return int(quota) / int(period)
    return math.inf


def warn_of_narrow_binding(cores: set[int], bindings: list[set[int]]) -> None:
    """Warn where the launcher has bound a rank to one core of several."""
    if len(cores) == 1 < len(set().union(*bindings)):
        warnings.warn(
            "each rank is bound to one core, which its two threads share; start with "
            "`mpiexec -bind-to none` (MPICH: default), `mpiexec --bind-to none` (Open MPI) or "
            "`srun --cpu-bind=none`, or give each rank more cores",
            RuntimeWarning,
            stacklevel=2,
        )
