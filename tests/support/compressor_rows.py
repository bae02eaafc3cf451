"""A row for each compression scheme, with its error bound and its bytes; a new scheme adds a row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st
from scipy.ndimage import maximum_filter1d

from hpcsgd.compress.base import Segment

Array = np.ndarray
_LARGEST = float(np.uint32(0x7F7F0000).view(np.float32))  # the largest norm that a bfloat16 holds
_DENORMAL = 2.0**-148


@dataclass(frozen=True)
class Row:
    """One scheme with one set of options.

    Attributes
    ----------
    spec
        Spec for `hpcsgd.compress.build`.
    bound
        The largest error of each element: from the inputs of all ranks, (ranks, numel), and the
        segment. In the basis in which the scheme works.
    wire
        Bytes of one rank that are reduced, and bytes that are gathered.
    unbiased
        Whether the expectation of the decoded values is the input, without feedback.
    exact
        Whether small integers are reproduced exactly.
    rounds, draws
        Whether ranks use random numbers of their own; whether they use shared ones.
    words
        Whether the sum does not depend on the order of the terms: integers, or gathered values.
    precision
        Relative error of one addition of the sum.
    mixes
        Whether an element of the result depends on other elements.
    rotated
        Whether the residual is kept in another basis.
    feedback
        Whether the spec includes error feedback.
    """

    spec: str
    bound: Callable[[Array, Segment], Array]
    wire: Callable[[Segment], tuple[int, int]]
    unbiased: bool = False
    exact: bool = False
    rounds: bool = False
    draws: bool = False
    words: bool = False
    precision: float = 2.0**-24
    mixes: bool = False
    rotated: bool = False
    feedback: bool = False

    @property
    def name(self) -> str:
        return self.spec.rpartition("+")[2].partition(":")[0]

    def bytes_per_rank(self, segment: Segment) -> float:
        """Bytes sent by a rank, on average over the ranks."""
        reduced, gathered = self.wire(segment)
        return 2 * (segment.terms - 1) / segment.terms * reduced + (segment.terms - 1) * gathered

    def __str__(self) -> str:
        return self.spec


def half(name: str, precision: float, smallest: float) -> Row:
    """`precision` is half a unit in the last place of 1, `smallest` half the least positive number."""

    def bound(totals: Array, segment: Segment) -> Array:
        largest = np.abs(totals).max(initial=0) * (1 + 2**-7)
        brought_down = 2 * largest * 2.0 ** (segment.terms.bit_length() - 15)
        return precision * np.abs(totals) + smallest * brought_down + _DENORMAL

    return Row(name, bound, lambda s: (2 * s.numel + 2, 0), exact=True, precision=precision)


def levels(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def lane(bits: int, terms: int) -> tuple[int, int]:
    """(bits of a word, lanes in it): the word that wastes less."""
    width = math.ceil(math.log2(2 * levels(bits) * terms + 1))
    return (32, 32 // width) if 32 // width * 2 >= 64 // width else (64, 64 // width)


def extents(segment: Segment, scale: str) -> list[tuple[int, int]]:
    starts = [start for start, _ in segment.tensors[1:]] if scale == "tensor" else []
    return list(pairwise([0, *starts, segment.numel]))


def shared_norm(totals: Array, segment: Segment, scale: str, block: int, norm: str) -> Array:
    """For each element at least the norm that it is quantised with."""
    largest = np.abs(totals).max(axis=0, initial=0)
    sizes = np.full(largest.size, min(block, largest.size))
    if scale == "block":
        # Wherever its block begins.
        largest = maximum_filter1d(largest, 2 * block - 1, mode="constant") if largest.size else largest
    else:
        for start, stop in extents(segment, scale):
            largest[start:stop] = largest[start:stop].max(initial=0)
            sizes[start:stop] = stop - start
    return (largest * (1 + 2**-7) + 2.0**-133) * (np.sqrt(sizes) if norm == "euclidean" else 1)


def lanes_row(name: str, bits: tuple[int, ...], scale: str, block: int, norm: str) -> Row:
    """The MaxNorm schemes: one number of bits, or several."""
    options = f"bits={'x'.join(map(str, bits))},scale={scale},block={block},norm={norm}"
    tops = [levels(b) for b in bits]

    def bound(totals: Array, segment: Segment) -> Array:
        largest = shared_norm(totals, segment, scale, block, norm)
        step = largest / tops[0]
        if len(tops) > 1:
            # On a scale s that is not the finest, the element did not fit the next one, t: |x| t > s_1 W.
            ratio = max(t / s for s, t in pairwise(tops)) / tops[0]
            most = np.abs(totals).max(axis=0, initial=0)
            step = np.minimum(step, np.maximum(largest / tops[-1], most * ratio * (1 + 2**-20)))
        return step + 2.0**-20 * largest + np.maximum(0, np.abs(totals).max(axis=0) - _LARGEST) + _DENORMAL

    def wire(segment: Segment) -> tuple[int, int]:
        word, lanes = lane(bits[0], segment.terms)
        total, rows = 0, 0
        parts = extents(segment, scale)
        for start, stop in parts:
            numel = stop - start
            tiles = math.ceil(numel / (lanes * block))
            row = 4 * math.ceil(numel / (4 * lanes * tiles)) if tiles else 0
            own_rows = math.ceil(numel / row) if row else 0
            rows += own_rows
            total += tiles * row * word // 8 + (len(bits) - 1) * math.ceil(own_rows / 32) * row * 4
        return total + 2 * {"block": rows, "tensor": len(parts), "bucket": 1}[scale], 0

    return Row(f"{name}:{options}", bound, wire, unbiased=True, rounds=True, words=True)


def maxnorm(bits: int = 4, scale: str = "block", block: int = 384, norm: str = "max") -> Row:
    return lanes_row("maxnorm", (bits,), scale, block, norm)


def multiscale(
    bits: tuple[int, ...] = (4, 8), scale: str = "block", block: int = 384, norm: str = "max"
) -> Row:
    return lanes_row("multiscale", bits, scale, block, norm)


def count(segment: Segment, ratio: float) -> int:
    return min(segment.numel, max(1, math.floor(ratio * segment.numel + 0.5)))


def randk(ratio: float = 0.1, inner: Row | None = None) -> Row:
    """`inner` quantises the sampled coordinates."""

    def bound(totals: Array, segment: Segment) -> Array:
        sampled = np.zeros(1)
        if inner is not None:
            everywhere = np.full((1, segment.numel), np.abs(totals).max(initial=0))
            sampled = inner.bound(everywhere, Segment(segment.numel, segment.terms))
        return np.maximum(np.abs(totals), sampled)

    def wire(segment: Segment) -> tuple[int, int]:
        sampled = count(segment, ratio) if segment.numel else 0
        return (4 * sampled + 2, 0) if inner is None else inner.wire(Segment(sampled, segment.terms))

    if inner is None:
        return Row(f"randk:ratio={ratio}", bound, wire, unbiased=True, exact=ratio == 1, draws=True)
    name, _, options = inner.spec.partition(":")
    return replace(inner, spec=f"randk-{name}:ratio={ratio},{options}", bound=bound, wire=wire, draws=True)


def topk(ratio: float = 0.01) -> Row:
    def wire(segment: Segment) -> tuple[int, int]:
        return 2, 8 * count(segment, ratio) if segment.numel else 0

    return Row(f"topk:ratio={ratio}", lambda x, s: np.abs(x), wire, exact=ratio == 1, words=True)


def signsgd() -> Row:
    def bound(totals: Array, segment: Segment) -> Array:
        mean = np.abs(totals).mean(axis=1, keepdims=True) if totals.size else 0
        return np.abs(np.abs(totals) - mean) + 2.0**-20 * np.abs(mean) + _DENORMAL

    return Row("signsgd", bound, lambda s: (2, 4 + math.ceil(s.numel / 8)), words=True)


def powersgd(rank: int = 2) -> Row:
    def bound(totals: Array, segment: Segment) -> Array:
        return np.linalg.norm(totals, axis=1, keepdims=True) * (1 + 2.0**-10) + _DENORMAL

    def wire(segment: Segment) -> tuple[int, int]:
        elements = segment.numel
        for _, shape in segment.tensors:
            rows, columns = shape[0], math.prod(shape[1:])
            elements -= max(0, rows * columns - rank * (rows + columns))
        return 4 * elements + 2, 0

    return Row(f"powersgd:rank={rank}", bound, wire, mixes=True)


def with_feedback(row: Row) -> Row:
    return replace(row, spec=f"ef+{row.spec}", feedback=True)


def rotated(row: Row) -> Row:
    def without_tensors(segment: Segment) -> Segment:
        return Segment(segment.numel, segment.terms, segment.offset, segment.share)

    return replace(
        row,
        spec=f"hadamard+{row.spec}",
        bound=lambda totals, segment: row.bound(totals, without_tensors(segment)),
        wire=lambda segment: row.wire(without_tensors(segment)),
        exact=False,
        mixes=True,
        rotated=True,
    )


ROWS = [
    half("fp16", 2.0**-11, 2.0**-25),
    half("bf16", 2.0**-8, 2.0**-134),
    maxnorm(),
    maxnorm(2, block=64),
    maxnorm(8, "tensor"),
    maxnorm(4, "bucket", norm="euclidean"),
    multiscale(),
    multiscale((2, 6, 10), "bucket"),
    randk(),
    randk(1.0),
    randk(0.1, maxnorm(8)),
    randk(0.3, multiscale(block=128)),
    powersgd(),
    topk(0.05),
    topk(1.0),
    signsgd(),
    with_feedback(maxnorm(2)),
    with_feedback(topk()),
    rotated(maxnorm()),
    with_feedback(rotated(multiscale((3, 6)))),
]

_bits = st.integers(2, 16)
_several = st.lists(_bits, min_size=2, max_size=4, unique=True).map(sorted).map(tuple)
_ratio = st.sampled_from([0.001, 0.05, 0.5, 1.0])
_scaling: dict[str, Any] = {
    "scale": st.sampled_from(["block", "tensor", "bucket"]),
    "block": st.sampled_from([16, 32, 100, 512, 4096]),
    "norm": st.sampled_from(["max", "euclidean"]),
}
_maxnorm = st.builds(maxnorm, bits=_bits, **_scaling)
_multiscale = st.builds(multiscale, bits=_several, **_scaling)

#: Each scheme, and each wrapper, with random options.
FAMILIES: dict[str, st.SearchStrategy[Row]] = {
    "fp16": st.just(ROWS[0]),
    "bf16": st.just(ROWS[1]),
    "maxnorm": _maxnorm,
    "multiscale": _multiscale,
    "randk": st.builds(randk, ratio=_ratio),
    "randk-maxnorm": st.builds(randk, ratio=_ratio, inner=_maxnorm),
    "randk-multiscale": st.builds(randk, ratio=_ratio, inner=_multiscale),
    "powersgd": st.builds(powersgd, rank=st.integers(1, 4)),
    "topk": st.builds(topk, ratio=_ratio),
    "signsgd": st.builds(signsgd),
    "ef": st.builds(with_feedback, st.sampled_from([row for row in ROWS if not row.feedback])),
    "hadamard": st.builds(rotated, st.builds(signsgd) | _maxnorm | _multiscale),
}
