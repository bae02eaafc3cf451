"""Data sets, their partition over ranks, and the training loader of a rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcsgd import registry

if TYPE_CHECKING:
    from hpcsgd.training.data.base import Data

#: The data sets of `--data`.
DATASETS: registry.Rows[Data] = registry.Rows(
    "data set",
    __name__,
    {
        "digits": "digits.digits",
        "text": "text.text",
        "mnist": "mnist.mnist",
        "fashion-mnist": "mnist.fashion_mnist",
        "cifar10": "cifar.cifar10",
        "cifar100": "cifar.cifar100",
        "imagenet": "imagenet.imagenet",
        "synthetic": "synthetic.synthetic",
    },
)
#: Those for language models; the others are for classifiers.
LANGUAGE_DATASETS = ("text",)


def load(spec: str) -> Data:
    """Load a data set from a spec such as ``text:context=128,limit=8``.

    Parameters
    ----------
    spec
        ``NAME:key=value,key=value``, with a name of `DATASETS` and options of its function.

    Raises
    ------
    BadOption
        Unknown name or option, or a value out of range.
    HpcsgdError
        Files are missing, truncated or of another format.
    """
    return registry.build(DATASETS, spec, "data set")


def check(spec: str) -> None:
    """Check name and options of a spec, without loading the data set.

    Raises
    ------
    BadOption
        Unknown name or option, or a value out of range.
    """
    registry.bind(DATASETS, spec, "data set")
