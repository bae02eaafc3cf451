"""NVIDIA's compiler NVRTC, which CuPy uses: compiles the `.cu` sources to machine code, without a GPU."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

from hpcsgd.kernels import cuda_loader


def library() -> Path | None:
    """The library of the package nvidia-cuda-nvrtc, where that is installed."""
    for name in ("nvidia.cu13", "nvidia.cuda_nvrtc"):
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            continue
        for folder in (found.submodule_search_locations or ()) if found else ():
            for path in sorted(Path(folder, "lib").glob("libnvrtc.so*")):
                return path
    return None


def compile_source(file: str, architecture: str) -> tuple[int, str]:
    """Compile `file`.cu to machine code; return its size in bytes, and the compiler's log."""
    nvrtc = ctypes.CDLL(str(library()))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    code = cuda_loader.source(file).encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), code, b"source.cu", 0, None, None) == 0
    options = [option.encode() for option in (*cuda_loader.OPTIONS, f"-arch={architecture}")]
    result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    size.value = 0
    if result == 0:
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return size.value, log.value.decode()
