"""The `.cu` sources compiled by g++ behind `cuda_on_cpu.h`, in place of
`hpcsgd.kernels.cuda_loader.launch`."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import torch

from hpcsgd.kernels import cuda_loader

HEADER = Path(__file__).with_suffix(".h")
FILES = {
    "codec/quantise": ("norms_{x}", "choose_scales_{x}", "encode_{x}_{w}", "decode_{x}_{w}"),
    "codec/hadamard": ("rotate_{x}", "unrotate_{x}"),
    "codec/sample": ("take_sample_{x}", "put_sample_{x}"),
    "sums/model_delta": ("take_snapshot_{y}", "accumulate_{y}", "apply_correction_{y}"),
}
FLAGS = ("-shared", "-fPIC", "-O1", "-std=c++20", "-ffp-contract=off", "-fno-strict-aliasing", "-w")


class Launcher:
    """Compiles each source once, into a folder."""

    def __init__(self, folder: Path) -> None:
        self._libraries = {file: _compile(file, folder) for file in FILES}

    def __call__(
        self,
        file: str,
        kernel: str,
        _: torch.device,
        blocks: int,
        threads: int,
        memory: int,
        arguments: list[Any],
    ) -> None:
        assert blocks > 0 and threads % 32 == 0 and memory <= 128 * 1024
        values = [argument.reshape(1) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*[value.ctypes.data for value in values])
        getattr(self._libraries[file], f"launch_{kernel}")(pointers, blocks, threads)


def _compile(file: str, folder: Path) -> ctypes.CDLL:
    names = {
        pattern.format(x=x, w=w, y=y)
        for pattern in FILES[file]
        for x in ("float32", "float16", "bfloat16")
        for y in (x, "float64")
        for w in ("int32", "int64")
    }
    code = folder / f"{Path(file).name}.cpp"
    library = code.with_suffix(".so")
    launchers = "".join(f"LAUNCHER({name})\n" for name in sorted(names))
    code.write_text(HEADER.read_text() + cuda_loader.source(file) + launchers)
    subprocess.run(["g++", *FLAGS, "-o", library, code], check=True)
    return ctypes.CDLL(str(library))
