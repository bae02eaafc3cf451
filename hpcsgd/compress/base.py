"""What a compression scheme is: a generator of messages between reading a gradient and writing a mean.

A `Compressor` is a choice of scheme and options. For each stretch of a bucket it makes a `Codec`, whose
`run` computes, yields what has to be combined over the ranks, and goes on with the result. So a scheme
reads from top to bottom, however many rounds of messages it takes, and who drives it can let it wait, run
others in between, or combine the messages of simulated ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hpcsgd.errors import BadOption

PIECE = 256 * 1024  # elements of work between two looks at the messages


@dataclass(frozen=True)
class Stretch:
    """The elements that one codec works on.

    Attributes
    ----------
    numel
        Elements.
    terms
        Ranks, or nodes, whose stretches are added.
    first
        Index of the first one in its bucket.
    share
        Of the elements of all stretches of the group, in (0, 1].
    tensors
        (start, shape) of each tensor that lies wholly in it.
    device
        Where the elements are.
    """

    numel: int
    terms: int
    first: int = 0
    share: float = 1.0
    tensors: tuple[tuple[int, tuple[int, ...]], ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Message:
    """Something to be combined over the ranks before the codec goes on.

    Attributes
    ----------
    op
        "max" and "and": `data` becomes the maximum, or the bitwise and. "gather": row r of `gathered` becomes
        the `data` of rank r. "sum": `data`, which is buffer number `slot` of `run`, becomes the sum; words
        wrap around.
    """

    op: str
    data: Tensor
    slot: int = 0
    gathered: Tensor | None = None


@dataclass(frozen=True)
class Draw:
    """Where the random numbers of one reduction come from; no generator's state is read or changed.

    Attributes
    ----------
    seed, step, bucket
        The same on all ranks.
    rank
        This rank among the terms.
    """

    seed: int
    step: int
    bucket: int
    rank: int

    def own(self) -> tuple[int, int]:
        """The key of this rank's rounding in this step."""
        return _key(0, self.seed, self.bucket, self.step, self.rank)

    def common(self) -> tuple[int, int]:
        """The key of what all ranks draw alike in this step."""
        return _key(1, self.seed, self.bucket, self.step)

    def lasting(self) -> tuple[int, int]:
        """The key of what all ranks draw alike, once for all steps."""
        return _key(2, self.seed, self.bucket)


class Codec:
    """One scheme at work on one stretch, with the memory it needs.

    Attributes
    ----------
    sums
        (elements, dtype) of each buffer that it has summed, in order.
    """

    sums: list[tuple[int, torch.dtype]]

    def run(
        self, values: Tensor, buffers: list[Tensor], draw: Draw, scale: float, residual: Tensor | None
    ) -> Iterator[Message | None]:
        """Replace `values` by `scale` times the sum over all terms of what their codes say.

        The first message is the "max" of norms (uint16, see `hpcsgd.kernels.codec.spec`); who drives the
        codec
        stops it there where one of them is not finite. Up to that message neither `values` nor `residual`
        is changed. None is a pause.

        Parameters
        ----------
        values
            (numel,), a floating dtype.
        buffers
            One for each of `sums`.
        draw
            The random numbers.
        scale
            Factor of the sum.
        residual
            (numel,) float32, or None. It is added to the values, and becomes what this rank's codes do
            not say: values + residual before = decoded codes + residual after.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beyond the residual."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


class Compressor:
    """A scheme with its options; a subclass makes the codecs.

    Attributes
    ----------
    feedback
        Whether what is not sent is added to the next gradient.
    whole
        Whether it needs whole tensors, and cannot work on a slice of a bucket.
    """

    feedback: bool = False
    whole: bool = False

    def options(self) -> dict[str, object]:
        """The options that all ranks must agree on, by name."""
        return {}

    def codec(self, stretch: Stretch) -> Codec:
        """A codec for a stretch.

        Raises
        ------
        BadOption
            Where the options do not fit the number of terms.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options().items())
        return f"{type(self).__name__}({options})"


class Largest:
    """The largest magnitude of a stretch as one norm: the first message of schemes without scales."""

    def __init__(self, stretch: Stretch) -> None:
        from hpcsgd.kernels.codec.spec import Layout

        self._layout = Layout.of(stretch.numel, 1, 4096)
        self._rows = torch.zeros(max(1, self._layout.rows), dtype=torch.uint16, device=stretch.device)
        self.norm = torch.zeros(1, dtype=torch.uint16, device=stretch.device)

    def find(self, values: Tensor, residual: Tensor | None) -> Iterator[None]:
        """Of values + residual on this rank."""
        yield from ops(values).norms(values, residual, self._layout, False, self._rows)
        self.norm.copy_(self._rows.view(torch.int16).max().view(torch.uint16))

    def exponent(self) -> int:
        """The least e with 2**e above every magnitude."""
        return int(self.norm.view(torch.int16)[0] >> 7) - 126


def dry_run(compressor: Compressor, stretch: Stretch, dtype: torch.dtype) -> None:
    """Run a codec once on zeros, with messages that nobody answers."""
    codec = compressor.codec(stretch)
    values = torch.zeros(stretch.numel, dtype=dtype, device=stretch.device)
    residual = torch.zeros(stretch.numel, device=stretch.device) if compressor.feedback else None
    buffers = [torch.zeros(numel, dtype=of, device=stretch.device) for numel, of in codec.sums]
    for _ in codec.run(values, buffers, Draw(0, 0, 0, 0), 1.0, residual):
        pass


def finite(norms: Tensor) -> bool:
    """Whether all norms (uint16) are those of finite numbers."""
    from hpcsgd.kernels.codec.spec import NOT_FINITE

    return not norms.numel() or int(norms.view(torch.int16).max()) < NOT_FINITE


def pieces(numel: int) -> Iterator[slice]:
    """Slices of at most `PIECE` elements."""
    return (slice(start, min(start + PIECE, numel)) for start in range(0, numel, PIECE))


def ops(tensor: Tensor) -> Any:
    """The kernels for the memory that a tensor is in."""
    from hpcsgd.kernels.codec import dispatch

    return dispatch.ops(tensor.device)


def levels_of(bits: int) -> int:
    """Levels on either side of zero of codes of so many bits: 2**(bits-1) - 1.

    Raises
    ------
    BadOption
        Unless bits is 2 to 16.
    """
    if not 2 <= bits <= 16:
        raise BadOption("bits of a code", expected="2 to 16", got=bits)
    return int(2 ** (bits - 1) - 1)


def count_of(k: int | None, ratio: float, stretch: Stretch) -> int:
    """How many of a stretch's elements are sent: a share of `k`, or `ratio` of them; at least one."""
    wanted = ratio * stretch.numel if k is None else k * stretch.share
    return min(stretch.numel, max(1, math.floor(wanted + 0.5)))


def check_count(k: int | None, ratio: float) -> None:
    """Raise `BadOption` where `k` or `ratio` selects nothing, or more than there is."""
    if k is not None and k < 1:
        raise BadOption("k, the elements that are sent", expected="at least 1, or none", got=k)
    if not 0 < ratio <= 1:
        raise BadOption("ratio of the elements that are sent", expected="above 0, at most 1", got=ratio)


def _key(*parts: int) -> tuple[int, int]:
    from hpcsgd.kernels.codec import spec

    return spec.key(*parts)
