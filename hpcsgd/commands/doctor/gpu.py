"""Checks the GPUs that each rank sees, and whether GPU kernels compile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from hpcsgd.commands.doctor.check import (
    Check,
    Facts,
    FactsByRank,
    Finding,
    lines_by_value,
    name_ranks,
    ranks_by_node,
    ranks_by_value,
)
from hpcsgd.commands.doctor.ranks import ExaminedJob

_ELEMENTS, _PICKED, _KEY = 1000, 100, (1, 2)


def collect(job: ExaminedJob) -> Facts:
    count = torch.cuda.device_count()
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    facts: Facts = {
        "gpus": names,
        "driver": Path("/proc/driver/nvidia/version").exists(),
        "torch cuda": torch.version.cuda or "",
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "cupy": _cupy() if count else "",
        "gpu": "",
        "kernel": "",
    }
    if count:
        index = job.members.index(job.rank) % count
        facts["gpu"] = str(getattr(torch.cuda.get_device_properties(index), "uuid", index))
        if not facts["cupy"].startswith("no"):
            facts["kernel"] = _compile(torch.device("cuda", index))
    return facts


def _cupy() -> str:
    try:
        import cupy
    except ImportError as error:
        return f"no CuPy ({error})"
    return f"CuPy {cupy.__version__}"


def _compile(device: torch.device) -> str:
    """Compile and run a kernel, and compare its result with the host kernel; returns "" or the problem."""
    from hpcsgd.kernels.codec.dispatch import kernels_for

    values = torch.arange(_ELEMENTS, dtype=torch.float32, device="cpu")
    picked = []
    try:
        for where in (torch.device("cpu"), device):
            out = torch.zeros(_PICKED, device=where)
            for _ in kernels_for(where).take_sample(values.to(where), _KEY, out):
                pass
            picked.append(out.cpu())
    except Exception as error:  # errors of CuPy, the driver and NVRTC have no common class
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "" if torch.equal(*picked) else "its results differ from the host kernel's"


def describe(ranks: FactsByRank) -> Iterator[str]:
    yield from lines_by_value(ranks, _text)


def _text(facts: Facts) -> str:
    if not facts["gpus"]:
        return "none" + (": a driver is installed, but torch sees no device" if facts["driver"] else "")
    names = ", ".join(f"{facts['gpus'].count(n)} x {n}" for n in dict.fromkeys(facts["gpus"]))
    kernel = f"; kernel: {facts['kernel'] or 'compiles (NVRTC) and agrees with the host'}"
    visible = "" if facts["visible"] is None else f"; CUDA_VISIBLE_DEVICES={facts['visible']}"
    return (
        f"{names}, CUDA {facts['torch cuda']}{visible}; {facts['cupy']}"
        f"{'' if facts['cupy'].startswith('no') else kernel}"
    )


def diagnose(ranks: FactsByRank) -> Iterator[Finding]:
    with_gpu = ranks_by_value(ranks, lambda facts: bool(facts["gpus"]))
    unseen = [rank for rank, facts in enumerate(ranks) if facts["driver"] and not facts["gpus"]]
    if unseen:
        built = ranks[unseen[0]]["torch cuda"]
        why = f"this torch is built for CUDA {built}" if built else "this torch is built without CUDA"
        fix = (
            "request GPUs (srun --gpus-per-task=1); check CUDA_VISIBLE_DEVICES and the version of the driver"
        )
        yield Finding(
            "warning",
            f"a GPU driver is installed, but torch finds no GPU on {name_ranks(unseen, ranks)}; {why}",
            fix if built else "install a torch with CUDA from pytorch.org",
        )
    if len(with_gpu) > 1:
        yield Finding(
            "error",
            f"no GPU on {name_ranks(with_gpu[False], ranks)}, but on other ranks: models would be on "
            "different devices",
            "request equally many GPUs on every node, or give hpcsgd train --device cpu",
        )
    for members in ranks_by_node(ranks).values():
        devices = [ranks[rank]["gpu"] for rank in members if ranks[rank]["gpu"]]
        if len(set(devices)) < len(devices):
            yield Finding(
                "warning",
                f"{len(devices)} ranks share {len(set(devices))} GPU on {ranks[members[0]]['host']}",
                "start as many ranks on a node as it has GPUs, and make all GPUs of the node visible to each "
                "rank (srun --gpus-per-node, --gpu-bind=none)",
            )
            break
    without = [rank for rank, facts in enumerate(ranks) if facts["cupy"].startswith("no")]
    if without:
        yield Finding(
            "warning",
            f"GPUs are present, but {ranks[without[0]]['cupy']} on {name_ranks(without, ranks)}: "
            "compression and LASGD do not run on a GPU, and the ranks of a node share no device memory",
            "pip install '.[gpu]' (CUDA 13), or cupy-cuda12x",
        )
    broken = [rank for rank, facts in enumerate(ranks) if facts["kernel"]]
    if broken:
        yield Finding(
            "error",
            f"a GPU kernel does not work on {name_ranks(broken, ranks)}: {ranks[broken[0]]['kernel']}",
            "install CuPy for the CUDA version of the driver, with headers: pip install 'cupy-cuda13x[ctk]'",
        )


CHECK = Check("GPUs", collect, describe, diagnose)
