"""Gradient compression, one file a scheme: codes that all-reduce can sum, and baselines by all-gather."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hpcsgd import registry
from hpcsgd.errors import BadOption, unknown

if TYPE_CHECKING:
    from hpcsgd.compress.base import Compressor

#: The schemes of `--compress`, besides "none". Their classes are exported by `hpcsgd`.
COMPRESSORS: registry.Rows[Compressor] = registry.Rows(
    "compression scheme",
    __name__,
    {
        "fp16": "half.FP16",
        "bf16": "half.BF16",
        "maxnorm": "maxnorm.QSGDMaxNorm",
        "multiscale": "multiscale.QSGDMaxNormMultiScale",
        "randk": "randk.GlobalRandK",
        "randk-maxnorm": "randk.GlobalRandKMaxNorm",
        "randk-multiscale": "randk.GlobalRandKMaxNormMultiScale",
        "powersgd": "powersgd.PowerSGD",
        "topk": "topk.TopK",
        "signsgd": "signsgd.SignSGD",
    },
)
#: The wrappers that may precede a scheme, joined by "+".
WRAPPERS: registry.Rows[Compressor] = registry.Rows(
    "wrapper of a compression scheme",
    __name__,
    {"ef": "error_feedback.ErrorFeedback", "hadamard": "hadamard.Hadamard"},
)


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
    wrappers, scheme = _split(spec)
    compressor = registry.build(COMPRESSORS, scheme, "compression scheme")
    for name in reversed(wrappers):
        compressor = WRAPPERS[name](compressor)
    return compressor


def check_name(spec: str) -> None:
    """Check the names in a spec, without importing the compressor.

    Raises
    ------
    BadOption
        One is unknown.
    """
    if spec.strip() != "none":
        COMPRESSORS.check_name(_split(spec)[1])


def _split(spec: str) -> tuple[list[str], str]:
    """The names of the wrappers, and the spec of the scheme."""
    *wrappers, scheme = re.split(r"\+(?=[a-z])", spec)
    for name in wrappers:
        if name.strip() not in WRAPPERS:  # which have no options
            raise unknown("wrapper of a compression scheme", name, WRAPPERS)
    return [name.strip() for name in wrappers], scheme


def spec_of(compressor: Compressor) -> str:
    """Return the spec from which `build` creates this compressor.

    Raises
    ------
    BadOption
        The compressor is none of `COMPRESSORS` and `WRAPPERS`.
    """
    from hpcsgd.compress.base import Wrapper

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
