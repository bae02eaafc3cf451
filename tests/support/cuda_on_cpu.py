"""The `.cu` sources compiled by g++ behind `cuda_on_cpu.h`, in place of
`hpcsgd.kernels.cuda_loader.launch`."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from hpcsgd.kernels import cuda_loader

HEADER = Path(__file__).with_suffix(".h")
FILES = {
    "codec/quantise": ("norms_{x}", "choose_scales_{x}", "encode_{x}_{w}", "decode_{x}_{w}"),
    "codec/hadamard": ("rotate_{x}", "unrotate_{x}"),
    "codec/sample": ("take_sample_{x}", "put_sample_{x}"),
    "sums/device_sums": ("reduce_rows_{y}", "reduce_rows_{w}", "weighted_sum_{y}"),
    "sums/model_delta": ("take_snapshot_{y}", "accumulate_{y}", "apply_correction_{y}"),
}
FLAGS = ("-shared", "-fPIC", "-O1", "-std=c++20", "-ffp-contract=off", "-fno-strict-aliasing", "-w")


class Launcher:
    """Compiles the sources to a folder of this machine, unless it has them."""

    def __init__(self) -> None:
        self._libraries = {file: _compiled(file) for file in FILES}

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


def _compiled(file: str) -> ctypes.CDLL:
    names = {
        pattern.format(x=x, w=w, y=y)
        for pattern in FILES[file]
        for x in ("float32", "float16", "bfloat16")
        for y in (x, "float64")
        for w in ("int32", "int64")
    }
    launchers = "".join(f"LAUNCHER({name})\n" for name in sorted(names))
    code = HEADER.read_text() + cuda_loader.source(file) + launchers
    digest = hashlib.sha256(f"{FLAGS} {code}".encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"hpcsgd_{Path(file).name}_{os.getuid()}_{digest}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / library.name
            subprocess.run(["g++", *FLAGS, "-o", built, "-x", "c++", "-"], input=code, text=True, check=True)
            shutil.move(built, library.with_suffix(f".{os.getpid()}"))
        library.with_suffix(f".{os.getpid()}").replace(library)  # complete, whichever rank is first
    return ctypes.CDLL(str(library))
