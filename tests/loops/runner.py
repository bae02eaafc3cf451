"""Runs a plain user's script in this process, with a strategy on a world, or without hpcsgd."""

from __future__ import annotations

import contextlib
import functools
import itertools
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import data

import hpcsgd

SCRIPTS = Path(__file__).parent / "scripts"


class Plain:
    """The loop without hpcsgd: one process that has all data."""

    worker, workers, weight = 0, 1, 1

    def __init__(self, model: nn.Module, optimizer: Any, *_: Any, **options: Any) -> None:
        self.model = model
        self.optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
        self.steps = 0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def batches(self, loader: Any, steps: int | None = None) -> Any:
        return loader if steps is None else itertools.islice(loader, steps)

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None, weight: float | None = None) -> None:
        self.steps += 1
        for optimizer in self.optimizers:
            optimizer.step(*[closure] if closure else [])

    def skip(self) -> None:
        self.steps += 1

    def mean(self, value: Any) -> float:
        return float(value)

    def any(self, flag: Any) -> bool:
        return bool(flag)

    def accumulate(self, *_: Any) -> Any:
        return contextlib.nullcontext()

    averaged = busy = accumulate

    def close(self) -> None:
        pass

    check = synchronize = close

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def without_hpcsgd(script: str, ranks: int) -> dict[str, torch.Tensor]:
    """Return what the script trains in one process, with batches as large as those of all ranks together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hpcsgd, "Run", Plain)
        for name in ("step", "unscale_"):
            patch.setattr(torch.amp.GradScaler, name, _of_one(getattr(torch.amp.GradScaler, name)))
        patch.setattr(data, "DataLoader", functools.partial(_whole_batches, data.DataLoader, ranks))
        return _execute(script, patch)


def with_hpcsgd(script: str, strategy: Callable[[], Any], world: Any) -> dict[str, torch.Tensor]:
    """Return what this rank's script trains with the strategy."""

    def run(model: nn.Module, optimizer: Any, **options: Any) -> Any:
        return right(model, optimizer, strategy(), **{"comm": world, **options})

    with pytest.MonkeyPatch.context() as patch:
        right = hpcsgd.Run
        patch.setattr(hpcsgd, "Run", run)
        return _execute(script, patch)


def at_the_start(script: str) -> dict[str, torch.Tensor]:
    """Return what the script would train, before its first step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hpcsgd, "Run", Untrained)
        return _execute(script, patch)


class Untrained(Plain):
    """A run whose loops are over before they begin."""

    def batches(self, loader: Any, steps: int | None = None) -> Iterator[Any]:
        return iter(())


def _of_one(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of a GradScaler that takes a plain run as its only optimizer."""
    return lambda scaler, each: method(scaler, each.optimizers[0] if isinstance(each, Plain) else each)


def _whole_batches(loader: Any, ranks: int, dataset: Any, batch_size: int, **options: Any) -> Any:
    return loader(dataset, batch_size * ranks, **options)


def _execute(script: str, patch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    patch.syspath_prepend(str(SCRIPTS))
    names = runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    modules = {name: value for name, value in names.items() if isinstance(value, nn.Module)}
    found = {
        f"{m}.{n}": p.detach().clone() for m, module in modules.items() for n, p in module.named_parameters()
    }
    if "log" in names:
        found["log"] = torch.tensor(names["log"])
    return found
