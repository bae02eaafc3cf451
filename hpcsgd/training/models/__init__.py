"""Models, by name or from a module of the user.

Each is made for the `shape` of one input and the number of `classes`: labels, or size of the vocabulary.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hpcsgd import registry
from hpcsgd.errors import BadOption
from hpcsgd.mpi import shutdown
from hpcsgd.training.data import DATASETS, LANGUAGE_DATASETS

if TYPE_CHECKING:
    from torch import nn

    from hpcsgd.training.data.base import Data

#: The models of `--model`.
MODELS: registry.Rows[nn.Module] = registry.Rows(
    "model",
    __name__,
    {
        "logistic": "mlp.logistic",
        "2nn": "mlp.two_nn",
        "lenet": "lenet.lenet",
        "vgg11": "vgg.vgg11",
        "vgg16": "vgg.vgg16",
        "resnet18": "resnet.resnet18",
        "resnet20": "resnet.resnet20",
        "resnet50": "resnet.resnet50",
        "gpt": "gpt.gpt",
    },
)
#: Language models; the others are classifiers.
LANGUAGE_MODELS = ("gpt",)

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
    from torch import nn

    context = {"shape": data.shape, "classes": data.classes}
    if match := _match_own(spec):
        name = f"{match['module']}.{match['attribute']}"
        rows = {name: _import(match["module"], match["attribute"])}
        model: object = registry.build(rows, name + (match["options"] or ""), "model", **context)
    else:
        check_fits(spec, data.kind)
        model = registry.build(MODELS, spec, "model", **context)
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
    if not _match_own(spec):
        registry.bind(MODELS, spec, "model", shape=None, classes=None)


def check_name(spec: str) -> None:
    """Check the name in a spec, without importing the model.

    Raises
    ------
    BadOption
        It is unknown.
    """
    if not _match_own(spec):
        MODELS.check_name(spec)


def check_fits(spec: str, kind: str) -> None:
    """Check that a model is one for a kind of data, "language" or "classification", as far as its name shows.

    Raises
    ------
    BadOption
        It is a model for another kind.
    """
    if _match_own(spec):
        return
    name = MODELS.check_name(spec)
    if (name in LANGUAGE_MODELS) == (kind == "language"):
        return
    fitting = [each for each in MODELS if (each in LANGUAGE_MODELS) == (kind == "language")]
    data = [each for each in DATASETS if (each in LANGUAGE_DATASETS) == (name in LANGUAGE_MODELS)]
    raise BadOption(
        f"model {name!r} does not fit the data",
        expected=f"a {kind} model: {', '.join(fitting)}; or data for this one: {', '.join(data)}",
        do="set --model or --data to one of these",
    )


def _match_own(spec: str) -> re.Match[str] | None:
    """The parts of a spec of the user's own model; None for one of ours."""
    match = _USER_MODEL.fullmatch(spec.strip())
    return match if match and match["module"] not in MODELS else None


def _import(module: str, attribute: str) -> Callable[..., Any]:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script has not the user's folder on its path
    do = f"set --model to module:callable, or to one of: {', '.join(sorted(MODELS))}"
    shutdown.note_foreign_code()
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
