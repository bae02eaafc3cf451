"""Options in words, for labels and figures: `local:period=8` is local SGD, period 8."""

from __future__ import annotations

import re
from contextlib import suppress

from hpcsgd import registry
from hpcsgd.errors import BadOption

#: Names that the field writes otherwise than the option does; all other names are words already.
_NAMES = {
    "2nn": "2NN",
    "adam": "Adam",
    "adamw": "AdamW",
    "adpsgd": "AD-PSGD",
    "allreduce": "all-reduce",
    "backup": "backup workers",
    "bf16": "BF16",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "dsgd": "D-SGD",
    "fashion-mnist": "Fashion-MNIST",
    "fp16": "FP16",
    "gpt": "GPT",
    "imagenet": "ImageNet",
    "lasgd": "LASGD",
    "lenet": "LeNet-5",
    "local": "local SGD",
    "logistic": "logistic regression",
    "maxnorm": "MaxNorm",
    "mnist": "MNIST",
    "multiscale": "multi-scale",
    "powersgd": "PowerSGD",
    "ps": "parameter server",
    "randk": "random k",
    "randk-maxnorm": "random k, MaxNorm",
    "randk-multiscale": "random k, multi-scale",
    "resnet18": "ResNet-18",
    "resnet20": "ResNet-20",
    "resnet50": "ResNet-50",
    "sgd": "SGD",
    "sgp": "SGP",
    "signsgd": "signSGD",
    "teleport": "TELEPORTATION",
    "topk": "top-k",
    "vgg11": "VGG-11",
    "vgg16": "VGG-16",
}
_WRAPPERS = {"ef": "error feedback", "hadamard": "rotation"}


def in_words(spec: str) -> str:
    """Return an option's spec in words: "MaxNorm, 4 bits, error feedback" for `ef+maxnorm:bits=4`.

    Text that is no spec is returned as it is.
    """
    with suppress(BadOption):
        name, options = registry.parse(spec)
        wrappers = []
        while (outer := name.partition("+"))[0] in _WRAPPERS:
            wrappers.append(_WRAPPERS[outer[0]])
            name = outer[2]
        settings = [setting_in_words(key, value) for key, value in options.items()]
        return ", ".join([_NAMES.get(name, name), *settings, *wrappers])
    return spec


def setting_in_words(key: str, value: str) -> str:
    """Return a setting in words: "period 8", "4 bits", "no overlap"."""
    name, value = key.rpartition(".")[2].replace("_", " "), value.removesuffix(".0")
    if value in ("yes", "true"):
        return name
    if value in ("no", "false", "none"):
        return f"no {name}"
    if name.endswith("s") and re.fullmatch(r"[\d.]+", value):
        return f"{value} {name.removesuffix('s') if value == '1' else name}"
    return f"{name} {in_words(value)}".rstrip()
