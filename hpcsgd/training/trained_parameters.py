"""The parameters that a run trains: those of the model, and those that only its optimizer holds."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hpcsgd.errors import BadOption, HpcsgdError
from hpcsgd.tensors.memory import with_other_views
from hpcsgd.training.model_copy import is_plain

Named = tuple[str, nn.Parameter]


def plain_module(model: nn.Module) -> nn.Module:
    """Return the module inside of a compiled one."""
    # Not by getattr, which a wrapper may pass on to a compiled module inside of it.
    inside = model._modules.get("_orig_mod", model)
    assert inside is not None
    return inside


class TrainedParameters:
    """Names the parameters of a run, and finds those that are trained later only.

    Parameters
    ----------
    model
        The module.
    optimizer
        Its optimizer; parameters that the module does not have are named by their place in it.
    local
        Patterns, as of `fnmatch`, of the names of parameters that every rank trains by itself.

    Attributes
    ----------
    named
        (name, parameter) pairs, trained or frozen, without the local ones and without duplicates.
    outside
        Those of `named` that are not the module's.
    patterns
        `local`.

    Raises
    ------
    BadOption
        A pattern matches no parameter and no buffer.
    """

    def __init__(self, model: nn.Module, optimizer: Any, local: Sequence[str] = ()) -> None:
        self._model, self._optimizer, self.patterns = model, optimizer, local
        of_model = [(name.replace("_orig_mod.", ""), p) for name, p in model.named_parameters()]
        buffers = [name.replace("_orig_mod.", "") for name, _ in model.named_buffers()]
        for pattern in local:
            if not any(fnmatchcase(name, pattern) for name in [*(name for name, _ in of_model), *buffers]):
                raise BadOption(
                    f"local={pattern!r} matches no parameter or buffer of the model",
                    expected="names such as " + ", ".join(name for name, _ in of_model[:3]),
                )
        self._local = {p for name, p in of_model if any(fnmatchcase(name, each) for each in local)}
        known = {p for _, p in of_model}
        self.outside = [(name, p) for name, p in self._of_optimizer() if p not in known]
        self.named = [(name, p) for name, p in of_model if p not in self._local] + self.outside
        self._known = known | {p for _, p in self.outside}
        self._trained = [p.requires_grad for _, p in self.named]
        self._groups = self._ids()
        self.structure = self._checksum()

    def _of_optimizer(self) -> list[Named]:
        return [
            (f"optimizer.param_groups.{number}.{index}", cast(nn.Parameter, p))
            for number, group in enumerate(self._optimizer.param_groups)
            for index, p in enumerate(group["params"])
            if isinstance(p, Tensor)
        ]

    def _ids(self) -> list[int]:
        return [id(p) for group in self._optimizer.param_groups for p in group["params"]]

    def _checksum(self) -> int:
        trained = [(name, p) for name, p in self.named if p.requires_grad]
        forms = [f"{name} {p.dtype} {None if is_lazy(p) else tuple(p.shape)}" for name, p in trained]
        return zlib.crc32("\n".join(forms).encode())

    def new(self) -> list[str]:
        """Return the names of parameters that are trained now and were not at the last call.

        They are part of `named` from now on.
        """
        names: list[str] = []
        if self._groups != (groups := self._ids()):
            self._groups = groups
            added = [(name, p) for name, p in self._of_optimizer() if p not in self._known]
            self.named, self.outside = [*self.named, *added], [*self.outside, *added]
            self._known |= {p for _, p in added}
            self._trained += [False] * len(added)
        trained = [p.requires_grad for _, p in self.named]
        if trained != self._trained:
            rows = zip(self.named, trained, self._trained, strict=True)
            names = [name for (name, _), now, before in rows if now and not before]
            # A parameter that is frozen later stays where it is: it has no gradient any more.
            self._trained = [now or before for now, before in zip(trained, self._trained, strict=True)]
            if names:
                self.structure = self._checksum()
        return names

    def trained(self) -> list[Named]:
        """Return the parameters that are trained, or have been."""
        return [pair for pair, trained in zip(self.named, self._trained, strict=True) if trained]

    @contextmanager
    def unfrozen(self) -> Iterator[None]:
        """Context in which those that have been trained are so again: they may be unfrozen later."""
        frozen = [p for _, p in self.trained() if not p.requires_grad]
        for p in frozen:
            p.requires_grad_(True)
        try:
            yield
        finally:
            for p in frozen:
                p.requires_grad_(False)

    def frozen(self) -> list[Named]:
        """Return those of plain memory that have been frozen since the run started."""
        pairs = zip(self.named, self._trained, strict=True)
        return [(name, p) for (name, p), trained in pairs if not trained and is_plain(p)]

    def with_sparse_gradients(self) -> set[str]:
        """Return the names of parameters with sparse gradients: of such embeddings, or in a SparseAdam."""
        # Also those inside of an optimizer of the user's own.
        optimizers = getattr(self._optimizer, "optimizers", [self._optimizer])
        sparse = [each for each in optimizers if isinstance(each, torch.optim.SparseAdam)]
        found = {p for each in sparse for group in each.param_groups for p in group["params"]}
        for module in self._model.modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
                found.add(module.weight)
        return {name for name, p in self.named if p in found}

    def replaced(self) -> list[Named]:
        """Return the model's parameters that are other objects than those that are trained."""
        return [
            (name, p)
            for name, p in self._model.named_parameters()
            if p.requires_grad and p not in self._known
        ]


def warn_of_other_views(model: nn.Module, named: Sequence[Named]) -> None:
    """Warn of tensors that share the memory of parameters, which a strategy is to move."""
    # Some of torch's own modules keep a view beside the parameter.
    kept = [
        (name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    ]
    plain = [(name, each) for name, each in (*named, *model.named_buffers(), *kept) if is_plain(each)]
    if (name := with_other_views(plain)) is not None:
        warnings.warn(
            f"a tensor made before Run shares the memory of {name}, as those of model.state_dict() do: it "
            "keeps the values of now, for the run moves the parameters. Make it after Run",
            RuntimeWarning,
            stacklevel=5,
        )


def replaced_text(names: list[str]) -> str:
    """Return the text about parameters of the model that nobody trains."""
    return (
        f"{names[0]} of the model is another parameter than the one that is trained: the models of the ranks "
        "differ in it"
    )


def untrained_error(names: list[str], rank: int) -> HpcsgdError:
    """Return the error for parameters that a run does not train, as they were added too late."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return HpcsgdError(
        f"{names[0]} is trained now, and was not when the run started",
        rank=rank,
        got=", ".join(names[:5]) + more,
        do="unfreeze parameters and add them to the optimizer before hpcsgd.Run is created, or close the run "
        "then and create another one; strategy AllReduce takes them in",
    )
