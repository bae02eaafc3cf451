"""Interface of compression schemes: a coroutine of messages between reading a gradient and writing a mean.

A `Compressor` is a scheme with its options. For each segment of a bucket it creates a `Codec`, whose `run`
computes, yields a message to be combined over the ranks, and continues with the result. A scheme thus reads
from top to bottom, however many messages it exchanges, and its driver may suspend it, run other codecs in
between, or combine the messages of simulated ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from hpcsgd import registry
from hpcsgd.errors import BadOption
from hpcsgd.registry import Within

CHUNK = 256 * 1024  # elements of work between two polls of the messages

#: Bits of a code.
Bits = Annotated[int, Within(2, 16)]
#: Number, and share, of the elements to send.
SampleSize = Annotated[int, Within(1, 10**12)]
SampleRatio = Annotated[float, Within(1e-9, 1)]


@dataclass(frozen=True)
class Segment:
    """Consecutive elements of a bucket that one codec compresses.

    Attributes
    ----------
    numel
        Number of elements.
    terms
        Number of summands: ranks, or nodes, whose segments are summed.
    offset
        Index of the first element in its bucket. Default 0.
    share
        Fraction of the elements of the whole group, in (0, 1]. Default 1.
    tensors
        (start, shape) of each tensor that lies completely in the segment.
    device
        Device of the elements. Default: the CPU.
    """

    numel: int
    terms: int
    offset: int = 0
    share: float = 1.0
    tensors: tuple[tuple[int, tuple[int, ...]], ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Message:
    """Data to be combined over the ranks before the codec continues.

    Attributes
    ----------
    op
        "max", "and" or "sum": `data` is replaced by the maximum, the bitwise and, or the sum, in which
        unsigned words wrap around. "gather": row r of `gathered` is set to the `data` of rank r.
    data
        This rank's contribution.
    buffer_index
        For "sum", the index of `data` among the buffers of `Codec.run`. Default 0.
    gathered
        For "gather", the result, one row a rank.
    """

    op: str
    data: Tensor
    buffer_index: int = 0
    gathered: Tensor | None = None


@dataclass(frozen=True)
class RandomKey:
    """Source of the random numbers of one reduction: counter-based, without generator state.

    Attributes
    ----------
    seed, step, bucket
        Equal on all ranks.
    rank
        Index of this rank among the terms.
    """

    seed: int
    step: int
    bucket: int
    rank: int

    def per_rank(self) -> tuple[int, int]:
        """Return the key of random numbers that differ between ranks and steps."""
        return _key(0, self.seed, self.bucket, self.step, self.rank)

    def shared(self) -> tuple[int, int]:
        """Return the key of random numbers that are equal on all ranks and differ between steps."""
        return _key(1, self.seed, self.bucket, self.step)

    def fixed(self) -> tuple[int, int]:
        """Return the key of random numbers that are equal on all ranks and in all steps."""
        return _key(2, self.seed, self.bucket)


class Codec:
    """Compresses one segment by one scheme; holds the buffers that this needs.

    Parameters
    ----------
    segment
        The elements.

    Attributes
    ----------
    sum_buffers
        (elements, dtype) of each buffer that is summed over the ranks, in order. Default: none.
    magnitude
        Largest magnitude of the segment; after the first message that of all ranks.
    norms
        (any number,) uint16: the first message. Default: the largest magnitude.
    """

    sum_buffers: Sequence[tuple[int, torch.dtype]] = ()
    norms: Tensor

    def __init__(self, segment: Segment) -> None:
        self.magnitude = MaxMagnitude(segment)
        self.norms = self.magnitude.norm

    def run(
        self,
        values: Tensor,
        buffers: list[Tensor],
        random_key: RandomKey,
        scale: float,
        residual: Tensor | None,
    ) -> Iterator[Message | None]:
        """Replace `values` by `scale` times the sum of the decoded values of all terms.

        Yields messages, to be combined before the next step, and None after a chunk of work. The first
        message is the "max" of norms (uint16, see `hpcsgd.kernels.codec.spec`); if one of them is not finite,
        the driver stops the codec there.

        Parameters
        ----------
        values
            (numel,), a floating dtype.
        buffers
            One for each of `sum_buffers`.
        random_key
            Source of random numbers.
        scale
            Factor of the sum.
        residual
            (numel,) float32, or None. It is added to the values and replaced by the compression error of
            this rank: values + old residual = decoded values + new residual.
        """
        yield from self.compute_norms(values, random_key, residual)
        yield Message("max", self.norms)
        yield from self.reduce(values, buffers, random_key, scale, residual)

    def compute_norms(self, values: Tensor, random_key: RandomKey, residual: Tensor | None) -> Iterator[None]:
        """Compute the norms of this rank's values + residual, of which it changes neither.

        Default: the largest magnitude. See `run`.
        """
        yield from self.magnitude.compute(values, residual)

    def reduce(
        self,
        values: Tensor,
        buffers: list[Tensor],
        random_key: RandomKey,
        scale: float,
        residual: Tensor | None,
    ) -> Iterator[Message | None]:
        """Encode, yield the further messages, and decode: `run` once the norms are those of all ranks."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the state to be saved in a checkpoint, besides the residual."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""


class Compressor:
    """A compression scheme with its options; subclasses create the codecs.

    A scheme with options is a dataclass, without `eq` and `repr`: its fields are the options, and their
    annotations the limits that are checked.

    Attributes
    ----------
    feedback
        Whether the compression error is added to the next gradient (error feedback).
    needs_whole_tensors
        Whether the scheme needs whole tensors, and cannot compress an arbitrary slice of a bucket.
    """

    feedback = False
    needs_whole_tensors = False

    def __post_init__(self) -> None:
        registry.check_fields(self)

    def options(self) -> dict[str, object]:
        """Return the options, by name; they must be equal on all ranks."""
        return registry.field_values(self)

    def codec(self, segment: Segment) -> Codec:
        """Create a codec for a segment.

        Raises
        ------
        BadOption
            The options do not fit the number of terms.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options().items())
        return f"{type(self).__name__}({options})"


class Wrapper(Compressor):
    """A scheme around another one, each at most once.

    Parameters
    ----------
    inner
        The other scheme.

    Raises
    ------
    BadOption
        `inner` has this wrapper already.
    """

    def __init__(self, inner: Compressor) -> None:
        self.inner = within = inner
        while isinstance(within, Wrapper):
            if type(within) is type(self):
                what = f"{type(self).__name__} around {type(inner).__name__} wraps a scheme twice"
                raise BadOption(what, do="name each wrapper once, as in ef+hadamard+maxnorm")
            within = within.inner

    def options(self) -> dict[str, object]:
        return {"inner": str(self.inner)}


class MaxMagnitude:
    """Largest magnitude of a segment as one norm."""

    def __init__(self, segment: Segment) -> None:
        from hpcsgd.kernels.codec.spec import Tiling

        self._tiling = Tiling.of(segment.numel, 1, 4096)
        self._rows = torch.zeros(max(1, self._tiling.rows), dtype=torch.uint16, device=segment.device)
        self.norm = torch.zeros(1, dtype=torch.uint16, device=segment.device)

    def compute(self, values: Tensor, residual: Tensor | None) -> Iterator[None]:
        """Compute the norm of values + residual on this rank."""
        yield from kernels_for(values).norms(values, residual, self._tiling, False, self._rows)
        self.norm.copy_(self._rows.view(torch.int16).max().view(torch.uint16))

    def exponent(self) -> int:
        """Return the smallest e with 2**e above every magnitude."""
        return int(self.norm.view(torch.int16)[0] >> 7) - 126


def dry_run(compressor: Compressor, segment: Segment, dtype: torch.dtype) -> None:
    """Run a codec once on zeros, without combining its messages."""
    codec = compressor.codec(segment)
    values = torch.zeros(segment.numel, dtype=dtype, device=segment.device)
    residual = torch.zeros(segment.numel, device=segment.device) if compressor.feedback else None
    buffers = [torch.zeros(numel, dtype=of, device=segment.device) for numel, of in codec.sum_buffers]
    for _ in codec.run(values, buffers, RandomKey(0, 0, 0, 0), 1.0, residual):
        pass


def all_finite(norms: Tensor) -> bool:
    """Return whether all norms (uint16) are those of finite numbers."""
    from hpcsgd.kernels.codec.spec import NOT_FINITE

    return not norms.numel() or int(norms.view(torch.int16).max()) < NOT_FINITE


def chunks(numel: int) -> Iterator[slice]:
    """Return slices of at most `CHUNK` elements."""
    return (slice(start, min(start + CHUNK, numel)) for start in range(0, numel, CHUNK))


def kernels_for(tensor: Tensor) -> Any:
    """Return the kernels for the device of a tensor."""
    from hpcsgd.kernels.codec import dispatch

    return dispatch.kernels_for(tensor.device)


def levels_of(bits: int) -> int:
    """Return the levels on either side of zero of codes of `bits` bits: 2**(bits-1) - 1."""
    return int(2 ** (bits - 1) - 1)


def sample_size(k: int | None, ratio: float, segment: Segment) -> int:
    """Return the number of elements to send of a segment: its share of `k`, or `ratio` of it; at least 1."""
    size = ratio * segment.numel if k is None else k * segment.share
    return min(segment.numel, max(1, math.floor(size + 0.5)))


def _key(*parts: int) -> tuple[int, int]:
    from hpcsgd.kernels.codec import spec

    return spec.key(*parts)
