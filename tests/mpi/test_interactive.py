"""Uncaught exceptions in IPython, which a stand-in for its shell reports; no IPython is needed."""

from __future__ import annotations

import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from hpcsgd.mpi import interactive


class Shell:
    def __init__(self, kernel: Any = None) -> None:
        self.shown: list[Any] = []
        self.callbacks: dict[str, Any] = {}
        self.events = SimpleNamespace(register=self.callbacks.__setitem__)
        if kernel is not None:
            self.kernel = kernel

    def showtraceback(self, exc_tuple: Any = None) -> None:
        self.shown.append(exc_tuple)

    def fail(self) -> None:
        try:
            raise ValueError("bad value")
        except ValueError:
            self.showtraceback()


class Runtime:
    def __init__(self) -> None:
        self.is_open, self.reasons = True, list[str]()
        self.departure = SimpleNamespace(interrupt=self.reasons.append)


def watched(monkeypatch: pytest.MonkeyPatch, shell: Shell) -> Runtime:
    monkeypatch.setattr(interactive, "_runtimes", weakref.WeakSet())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[misc]
    runtime: Any = Runtime()
    for _ in range(2):
        interactive.watch(runtime)
    return runtime  # type: ignore[no-any-return]


def test_in_a_terminal_an_exception_is_that_of_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    shell, hooked = Shell(), list[Any]()
    monkeypatch.setattr(sys, "excepthook", lambda *error: hooked.append(error))
    runtime = watched(monkeypatch, shell)
    shell.fail()
    assert [kind for kind, *_ in hooked] == [ValueError] and len(shell.shown) == 1
    runtime.is_open = False
    shell.fail()
    assert len(hooked) == 1 and len(shell.shown) == 2


def test_in_a_kernel_a_rank_is_interrupted_until_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = Shell(SimpleNamespace(do_apply=lambda number: number + 1))
    runtime = watched(monkeypatch, shell)
    shell.fail()
    assert runtime.reasons == ["is interrupted by ValueError: bad value"] and len(shell.shown) == 1
    shell.callbacks["pre_execute"]()
    assert runtime.reasons[1:] == [""]
    assert shell.kernel.do_apply(3) == 4 and runtime.reasons[2:] == [""]
