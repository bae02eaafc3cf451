"""Memory of the host that is pinned for a GPU, with a stand-in for CUDA's runtime."""

from __future__ import annotations

import gc
import mmap
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hpcsgd.tensors.memory import registered


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The calls of CUDA's runtime, of which none may register what is registered."""
    made: list[tuple[str, int]] = []
    pinned: set[int] = set()

    def register(address: int, nbytes: int, flags: int) -> int:
        made.append(("register", nbytes))
        if address in pinned:
            return 712
        pinned.add(address)
        return 0

    def unregister(address: int) -> int:
        made.append(("unregister", 0))
        pinned.remove(address)
        return 0

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return made


def memory() -> np.ndarray:
    return np.frombuffer(mmap.mmap(-1, 8192), np.uint8)


def test_memory_is_registered_until_the_last_tensor_is_dropped(calls: list[tuple[str, int]]) -> None:
    tensor = registered(memory())
    part = tensor[100:200].view(torch.float32)
    part.fill_(3)
    assert tensor[:100].sum() == 0 and calls == [("register", 8192)]
    del tensor
    gc.collect()
    assert len(calls) == 1 and part[0] == 3
    del part
    gc.collect()
    assert calls == [("register", 8192), ("unregister", 0)]


def test_an_address_that_comes_again_is_registered_again(calls: list[tuple[str, int]]) -> None:
    for _ in range(5):
        registered(memory())
    assert calls == [("register", 8192), ("unregister", 0)] * 5


def test_memory_that_cannot_be_pinned_is_used_as_it_is(calls: list[tuple[str, int]]) -> None:
    row = memory()
    kept = registered(row)
    with pytest.warns(RuntimeWarning, match="ulimit -l"):
        tensor = registered(row)
    tensor[0] = 7
    assert kept[0] == 7
    del tensor
    gc.collect()
    assert calls == [("register", 8192)] * 2
