"""Data sets, their partition over ranks, and the training loader of a rank."""

from __future__ import annotations

from collections.abc import Callable

from hpcsgd.registry import bind, build
from hpcsgd.training.data.base import Augment, Data, Source
from hpcsgd.training.data.cifar import cifar10, cifar100
from hpcsgd.training.data.digits import digits
from hpcsgd.training.data.imagenet import imagenet
from hpcsgd.training.data.in_memory import TensorSource
from hpcsgd.training.data.loader import Loader
from hpcsgd.training.data.mnist import fashion_mnist, mnist
from hpcsgd.training.data.partition import evaluation_shard, partition
from hpcsgd.training.data.synthetic import synthetic
from hpcsgd.training.data.text import text

__all__ = [
    "DATASETS",
    "Augment",
    "Data",
    "Loader",
    "Source",
    "TensorSource",
    "check",
    "evaluation_shard",
    "load",
    "partition",
]

DATASETS: dict[str, Callable[..., Data]] = {
    "digits": digits,
    "text": text,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "imagenet": imagenet,
    "synthetic": synthetic,
}


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
    return build(DATASETS, spec, "data set")


def check(spec: str) -> None:
    """Check name and options of a spec, without loading the data set.

    Raises
    ------
    BadOption
        Unknown name or option, or a value out of range.
    """
    bind(DATASETS, spec, "data set")
