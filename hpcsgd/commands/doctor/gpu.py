"""Which GPUs each rank sees, and whether kernels for them compile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from hpcsgd.commands.doctor.check import Check, Facts, Finding, Ranks, group, name_of, nodes_of, shown
from hpcsgd.commands.doctor.ranks import Job

_ELEMENTS, _DRAWN, _KEY = 1000, 100, (1, 2)


def gather(job: Job) -> Facts:
    count = torch.cuda.device_count()
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    facts: Facts = {
        "gpus": names,
        "driver": Path("/proc/driver/nvidia/version").exists(),
        "torch cuda": torch.version.cuda or "",
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "cupy": _cupy() if count else "",
        "mine": "",
        "kernel": "",
    }
    if count:
        index = job.members.index(job.rank) % count
        facts["mine"] = str(getattr(torch.cuda.get_device_properties(index), "uuid", index))
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
    """Compile a kernel, run it, and compare it with its twin on the host; "" or the problem."""
    from hpcsgd.kernels.codec.dispatch import ops

    values = torch.arange(_ELEMENTS, dtype=torch.float32)
    drawn = []
    try:
        for where in (torch.device("cpu"), device):
            out = torch.zeros(_DRAWN, device=where)
            for _ in ops(where).pick(values.to(where), _KEY, out):
                pass
            drawn.append(out.cpu())
    except Exception as error:  # CuPy's, the driver's and NVRTC's errors have no class in common
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "" if torch.equal(*drawn) else "gives other numbers than on the host"


def show(ranks: Ranks) -> Iterator[str]:
    yield from shown(group(ranks, _text), ranks)


def _text(facts: Facts) -> str:
    if not facts["gpus"]:
        return "none" + (": there is a driver, but torch sees no device" if facts["driver"] else "")
    names = ", ".join(f"{facts['gpus'].count(n)} x {n}" for n in dict.fromkeys(facts["gpus"]))
    kernel = f"; kernel: {facts['kernel'] or 'compiles (NVRTC) and agrees with the host'}"
    visible = "" if facts["visible"] is None else f"; CUDA_VISIBLE_DEVICES={facts['visible']}"
    return (
        f"{names}, CUDA {facts['torch cuda']}{visible}; {facts['cupy']}"
        f"{'' if facts['cupy'].startswith('no') else kernel}"
    )


def judge(ranks: Ranks) -> Iterator[Finding]:
    with_gpu = group(ranks, lambda facts: bool(facts["gpus"]))
    blind = [rank for rank, facts in enumerate(ranks) if facts["driver"] and not facts["gpus"]]
    if blind:
        built = ranks[blind[0]]["torch cuda"]
        why = f"this torch is built for CUDA {built}" if built else "this torch is built without CUDA"
        fix = "ask the batch system for GPUs (--gpus-per-task=1), look at CUDA_VISIBLE_DEVICES and the driver"
        yield Finding(
            "warning",
            f"a GPU driver is there, but torch sees no GPU on {name_of(blind, ranks)}; {why}",
            fix if built else "install torch with CUDA, from pytorch.org",
        )
    if len(with_gpu) > 1:
        yield Finding(
            "error",
            f"no GPU on {name_of(with_gpu[False], ranks)}, but on other ranks: models would be on both",
            "ask for as many GPUs on every node, or give --device cpu",
        )
    for members in nodes_of(ranks).values():
        mine = [ranks[rank]["mine"] for rank in members if ranks[rank]["mine"]]
        if len(set(mine)) < len(mine):
            yield Finding(
                "warning",
                f"{len(mine)} ranks share {len(set(mine))} GPU on {ranks[members[0]]['host']}",
                "start as many ranks on a node as it has GPUs, and let each see all of the node's "
                "(srun --gpus-per-node, --gpu-bind=none)",
            )
            break
    without = [rank for rank, facts in enumerate(ranks) if facts["cupy"].startswith("no")]
    if without:
        yield Finding(
            "warning",
            f"GPUs, but {ranks[without[0]]['cupy']} on {name_of(without, ranks)}: no compression and no "
            "LASGD on a GPU",
            "pip install '.[gpu]' (CUDA 13), or cupy-cuda12x",
        )
    broken = [rank for rank, facts in enumerate(ranks) if facts["kernel"]]
    if broken:
        yield Finding(
            "error",
            f"a GPU kernel does not work on {name_of(broken, ranks)}: {ranks[broken[0]]['kernel']}",
            "install the CuPy of the driver's CUDA, with headers: pip install 'cupy-cuda13x[ctk]'",
        )


CHECK = Check("GPUs", gather, show, judge)
