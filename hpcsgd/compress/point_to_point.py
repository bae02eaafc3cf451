"""Point-to-point use of codecs, without a sum over ranks: for values sent to and from a server.

The sender runs a codec alone, each message being its own combination, and transmits the messages as the code.
The receiver runs the same codec on zeros, substitutes the code for its messages, and obtains bit-identical
values. This works for every scheme whose codec is stateless.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hpcsgd.compress.base import Codec, Compressor, Message, RandomKey, Segment, all_finite
from hpcsgd.errors import BadOption

_WARM_UP_ELEMENTS = 64


class PointToPointCodec:
    """Encodes and decodes the values of one segment.

    Parameters
    ----------
    compressor
        The scheme. The residual of error feedback (`Compressor.feedback`) is held by the caller.
    segment
        The elements, with one term, in host memory.
    dtype
        Type of the values.

    Attributes
    ----------
    nbytes
        Bytes of each code.

    Raises
    ------
    BadOption
        The scheme needs whole tensors: its codecs depend on their previous results.
    """

    def __init__(self, compressor: Compressor, segment: Segment, dtype: torch.dtype) -> None:
        check_stateless(compressor)
        self._compressor, self._segment = compressor, segment
        self.dtype, self.numel, self._feedback = dtype, segment.numel, compressor.feedback
        self._codec = self.make_codec(1)
        self._buffers = [torch.zeros(numel, dtype=of, device="cpu") for numel, of in self._codec.sum_buffers]
        messages = self._messages(self.zeros(), RandomKey(0, 0, 0, 0), None)
        self.nbytes = sum(message.data.nbytes for message in messages)

    def make_codec(self, terms: int) -> Codec:
        """Create a codec of the segment for a sum of `terms` terms."""
        return self._compressor.codec(replace(self._segment, terms=terms))

    def zeros(self) -> Tensor:
        """Return zeros of the shape and type of the values."""
        return torch.zeros(self.numel, dtype=self.dtype, device="cpu")

    def zero_residual(self) -> Tensor | None:
        """Return an initial residual; None for a scheme without error feedback."""
        return torch.zeros(self.numel, device="cpu") if self._feedback else None

    def encode(
        self, values: Tensor, random_key: RandomKey, residual: Tensor | None = None
    ) -> np.ndarray | None:
        """Encode `values`, and replace them by the decoded code.

        Parameters
        ----------
        values
            (numel,) of `dtype`.
        random_key
            Source of random numbers; the receiver needs an equal key, except for the rank.
        residual
            Residual of a scheme with error feedback, see `Codec.run`. Default: zeros, which are discarded.

        Returns
        -------
        array or None
            The code, a new array (nbytes,) uint8. None if a value is not finite, and then nothing is changed;
            or if a decoded one is not, in float16, and then the residual is unchanged.
        """
        code, end = np.empty(self.nbytes, np.uint8), 0
        narrow = self.dtype is torch.float16
        new_residual = residual.clone() if narrow and residual is not None else residual
        for message in self._messages(values, random_key, new_residual):
            if message.op == "max" and not all_finite(message.data):
                return None
            start, end = end, end + message.data.nbytes
            code[start:end] = bytes_of(message.data)
        if narrow and not bool(values.isfinite().all()):
            return None
        if residual is not None and new_residual is not None and new_residual is not residual:
            residual.copy_(new_residual)
        return code

    def encode_scaled(self, values: Tensor, random_key: RandomKey) -> np.ndarray | None:
        """Encode like `encode`, and append the factor that minimises the 2-norm of the error.

        With this factor the error of any scheme is smaller than the values, so it can be sent later. With a
        factor of 1 this holds neither for `randk`, which multiplies its coordinates, nor for coarse rounding.
        Without a code nothing is changed.
        """
        before = values.to(torch.float64, copy=True)
        code = self.encode(values, random_key)
        if code is None:
            values.copy_(before)
            return None
        decoded = values.double()
        square = float(decoded @ decoded)
        factor = np.float32(float(before @ decoded) / square if square else 0.0)
        values.mul_(float(factor))
        return np.append(code, np.frombuffer(factor.tobytes(), np.uint8))

    def decode(self, code: np.ndarray, values: Tensor, random_key: RandomKey) -> None:
        """Replace `values` by the decoded values of a code of `encode` or `encode_scaled`.

        Bytes that are not a code give arbitrary values, or raise an exception of any type.
        """
        end = 0
        for message in self._messages(values.zero_(), random_key, None):
            start, end = end, end + message.data.nbytes
            bytes_of(message.data)[:] = code[start:end]
            if message.gathered is not None:
                message.gathered[0].copy_(message.data)
        if factor := code[end:].tobytes():
            values.mul_(float(np.frombuffer(factor, np.float32)[0]))

    def _messages(self, values: Tensor, random_key: RandomKey, residual: Tensor | None) -> Iterator[Message]:
        residual = self.zero_residual() if residual is None else residual
        for message in self._codec.run(values, self._buffers, random_key, 1.0, residual):
            if message is not None:
                if message.gathered is not None:
                    message.gathered[0].copy_(message.data)
                yield message


FACTOR_BYTES = 4  # appended to the code by `PointToPointCodec.encode_scaled`


class SharedReference:
    """Reference values held by a sender and a receiver, updated by encoded differences.

    The error of one update is part of the next difference, so errors do not accumulate.

    Parameters
    ----------
    codec
        Encodes the differences.

    Attributes
    ----------
    values
        The reference, equal on both sides; None before the first `reset`.
    """

    def __init__(self, codec: PointToPointCodec) -> None:
        self._codec = codec
        self.values: Tensor | None = None

    def encode_update(self, values: Tensor, random_key: RandomKey) -> np.ndarray | None:
        """Encode the difference to `values`; None if the receiver must be sent the values uncompressed."""
        if self.values is not None:
            difference = values - self.values
            code = self._codec.encode_scaled(difference, random_key)
            if code is not None:
                self.values += difference
                return code
        self.reset(values)
        return None

    def reset(self, values: Tensor) -> None:
        """Set the reference to values that both sides hold."""
        self.values = values.clone()

    def apply_update(self, code: np.ndarray, random_key: RandomKey) -> None:
        """Add a received difference; see `PointToPointCodec.decode` for invalid codes."""
        assert self.values is not None
        difference = self._codec.zeros()
        self._codec.decode(code, difference, random_key)
        self.values += difference


def warm_up(compressor: Compressor, dtype: torch.dtype, terms: int) -> None:
    """Run a scheme on a few zeros in host memory, so that its kernels are compiled."""
    if compressor.needs_whole_tensors:
        return
    segment = Segment(_WARM_UP_ELEMENTS, 1, tensors=((0, (_WARM_UP_ELEMENTS,)),))
    point_to_point = PointToPointCodec(compressor, segment, dtype)
    codec, values = point_to_point.make_codec(terms), point_to_point.zeros()
    buffers = [torch.zeros(numel, dtype=of, device="cpu") for numel, of in codec.sum_buffers]
    residual = point_to_point.zero_residual()
    for message in codec.run(values, buffers, RandomKey(0, 0, 0, 0), 1.0, residual):
        if message is not None and message.gathered is not None:
            message.gathered.copy_(message.data.expand_as(message.gathered))


def check_stateless(compressor: Compressor) -> None:
    """Raise `BadOption` for a scheme whose codes cannot be decoded one by one."""
    if compressor.needs_whole_tensors:
        raise BadOption(
            f"{compressor} cannot compress messages to and from a parameter server",
            got="a scheme whose codec depends on its previous result",
            do="use one of: fp16, bf16, maxnorm, multiscale, randk, randk-maxnorm, randk-multiscale, topk, "
            "signsgd; or no server (--strategy ps:servers=0)",
            everywhere=True,
        )


def bytes_of(tensor: Tensor) -> np.ndarray:
    """Return the memory of a tensor as uint8, without a copy."""
    memory: np.ndarray = tensor.view(torch.uint8).numpy()
    return memory
