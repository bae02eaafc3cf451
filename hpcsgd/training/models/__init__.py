"""Models, by name or from a module of the user."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from hpcsgd import registry
from hpcsgd.errors import BadOption
from hpcsgd.training.data import Data
from hpcsgd.training.models.gpt import gpt
from hpcsgd.training.models.lenet import lenet
from hpcsgd.training.models.mlp import logistic, two_nn
from hpcsgd.training.models.resnet import resnet18, resnet20, resnet50
from hpcsgd.training.models.vgg import vgg11, vgg16

__all__ = ["MODELS", "build", "check"]

CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    "logistic": logistic,
    "2nn": two_nn,
    "lenet": lenet,
    "vgg11": vgg11,
    "vgg16": vgg16,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet50": resnet50,
}
LANGUAGE_MODELS: dict[str, Callable[..., nn.Module]] = {"gpt": gpt}
MODELS = CLASSIFIERS | LANGUAGE_MODELS

_USER_MODEL = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<attribute>[A-Za-z_]\w*)(?P<options>:.*)?")


def build(spec: str, data: Data) -> nn.Module:
    """Build a model for a data set, from a spec such as ``gpt:layers=6,width=192``.

    Parameters
    ----------
    spec
        ``NAME:key=value,key=value``, with a name of `MODELS`; or ``module:callable`` with the same
        kind of options after one more colon. Such a callable gets ``shape`` and ``classes`` if it has
        parameters of these names.
    data
        The data set, which gives the shape of an input and the number of classes.

    Raises
    ------
    BadOption
        Unknown name or option, a model for another kind of data, or inputs of an unsupported shape.

    Notes
    -----
    Weights are initialised from torch's global generator: seed it first.
    """
    context = {"shape": data.shape, "classes": data.classes}
    match = _USER_MODEL.fullmatch(spec.strip())
    if match and match["module"] not in MODELS:
        name = f"{match['module']}.{match['attribute']}"
        rows = {name: _import(match["module"], match["attribute"])}
        model: object = registry.build(rows, name + (match["options"] or ""), "model", **context)
    else:
        rows = LANGUAGE_MODELS if data.kind == "language" else CLASSIFIERS
        model = registry.build(rows, spec, f"{data.kind} model", **context)
    if not isinstance(model, nn.Module):
        raise BadOption(f"{spec} returned no model", expected="a torch.nn.Module", got=type(model))
    return model


def check(spec: str) -> None:
    """Check name and options of a spec, without building the model or importing the user's modules.

    Raises
    ------
    BadOption
        Unknown name or option, or a value out of range.
    """
    match = _USER_MODEL.fullmatch(spec.strip())
    if not match or match["module"] in MODELS:
        registry.bind(MODELS, spec, "model", shape=None, classes=None)


def _import(module: str, attribute: str) -> Callable[..., Any]:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script has not the user's folder on its path
    do = f"set --model to module:callable, or to one of: {', '.join(sorted(MODELS))}"
    try:
        found: object = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise BadOption(f"unknown model: there is no module {module!r}", do=do) from error
    if not callable(found):
        got = "no such attribute" if found is None else type(found)
        what = f"module {module!r} has no callable {attribute!r}"
        raise BadOption(what, expected="a callable that returns a model", got=got, do=do)
    return found
