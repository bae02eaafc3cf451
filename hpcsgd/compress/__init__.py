"""Gradient compression, one file a scheme: codes that all-reduce can sum, and baselines by all-gather."""

from __future__ import annotations

import re
from collections.abc import Callable

from hpcsgd import registry
from hpcsgd.compress.base import Codec, Compressor, Message, RandomKey, Segment, Wrapper
from hpcsgd.compress.error_feedback import ErrorFeedback
from hpcsgd.compress.float32 import Float32
from hpcsgd.compress.hadamard import Hadamard
from hpcsgd.compress.half import BF16, FP16
from hpcsgd.compress.maxnorm import QSGDMaxNorm
from hpcsgd.compress.multiscale import QSGDMaxNormMultiScale
from hpcsgd.compress.powersgd import PowerSGD
from hpcsgd.compress.randk import GlobalRandK, GlobalRandKMaxNorm, GlobalRandKMaxNormMultiScale
from hpcsgd.compress.signsgd import SignSGD
from hpcsgd.compress.topk import TopK
from hpcsgd.errors import BadOption, unknown

__all__ = [
    "BF16",
    "COMPRESSORS",
    "FP16",
    "WRAPPERS",
    "Codec",
    "Compressor",
    "ErrorFeedback",
    "Float32",
    "GlobalRandK",
    "GlobalRandKMaxNorm",
    "GlobalRandKMaxNormMultiScale",
    "Hadamard",
    "Message",
    "PowerSGD",
    "QSGDMaxNorm",
    "QSGDMaxNormMultiScale",
    "RandomKey",
    "Segment",
    "SignSGD",
    "TopK",
    "build",
    "spec_of",
]

#: The schemes of `--compress`, besides "none".
COMPRESSORS: dict[str, Callable[..., Compressor]] = {
    "fp16": FP16,
    "bf16": BF16,
    "maxnorm": QSGDMaxNorm,
    "multiscale": QSGDMaxNormMultiScale,
    "randk": GlobalRandK,
    "randk-maxnorm": GlobalRandKMaxNorm,
    "randk-multiscale": GlobalRandKMaxNormMultiScale,
    "powersgd": PowerSGD,
    "topk": TopK,
    "signsgd": SignSGD,
}
#: The wrappers that may precede a scheme, joined by "+".
WRAPPERS: dict[str, Callable[[Compressor], Compressor]] = {"ef": ErrorFeedback, "hadamard": Hadamard}


def build(spec: str) -> Compressor | None:
    """Create the compressor of a spec; None for "none".

    Parameters
    ----------
    spec
        ``NAME:key=value,...``, with wrappers before it: ``ef+hadamard+maxnorm:bits=4``.

    Raises
    ------
    BadOption
        The name or an option is unknown; the message lists the valid ones.
    """
    if spec.strip() == "none":
        return None
    *wrappers, scheme = re.split(r"\+(?=[a-z])", spec)
    compressor = registry.build(COMPRESSORS, scheme, "compression scheme")
    for name in reversed(wrappers):
        if name.strip() not in WRAPPERS:
            raise unknown("wrapper of a compression scheme", name, WRAPPERS)
        compressor = WRAPPERS[name.strip()](compressor)
    return compressor


def spec_of(compressor: Compressor) -> str:
    """Return the spec from which `build` creates this compressor.

    Raises
    ------
    BadOption
        The compressor is none of `COMPRESSORS` and `WRAPPERS`.
    """
    kind, rows = type(compressor), {**COMPRESSORS, **WRAPPERS}
    names = [name for name, row in rows.items() if row is kind]
    if not names:
        raise BadOption(
            f"compression scheme {compressor} is not registered, so other programs cannot create it",
            expected="a scheme of hpcsgd.compress.COMPRESSORS, with wrappers of hpcsgd.compress.WRAPPERS",
            do="use one of: " + ", ".join(sorted(rows)),
            everywhere=True,
        )
    if isinstance(compressor, Wrapper):
        return f"{names[0]}+{spec_of(compressor.inner)}"
    return registry.format_spec(names[0], compressor.options())
