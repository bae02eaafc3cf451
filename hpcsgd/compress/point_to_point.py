"""Codes that one party writes and another one reads, without a sum: for what goes to and from a server.

A codec that is run alone gives its own messages as their combination. What it says in them is the code; who
runs it on zeros, and puts the code where they are, ends with the same values, bit for bit. So this works for
every scheme whose codec has no memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hpcsgd.compress.base import Codec, Compressor, Draw, Message, Stretch, finite
from hpcsgd.errors import BadOption

_FEW = 64


class Coder:
    """Writes and reads the codes of one stretch.

    Parameters
    ----------
    compressor
        The scheme; what it remembers, see `Compressor.feedback`, is held by the caller.
    stretch
        What it works on, with one term, in host memory.
    dtype
        Of the values.

    Attributes
    ----------
    nbytes
        Of each code.

    Raises
    ------
    BadOption
        For a scheme that is `whole`: its codecs go on from what they have read before.
    """

    def __init__(self, compressor: Compressor, stretch: Stretch, dtype: torch.dtype) -> None:
        check(compressor)
        self._compressor, self._stretch = compressor, stretch
        self.dtype, self.numel, self._remembers = dtype, stretch.numel, compressor.feedback
        self._codec = self.codec(1)
        self._buffers = [torch.zeros(numel, dtype=of) for numel, of in self._codec.sums]
        messages = self._messages(self.zeros(), Draw(0, 0, 0, 0), None)
        self.nbytes = sum(message.data.nbytes for message in messages)

    def codec(self, terms: int) -> Codec:
        """Another codec of the stretch."""
        return self._compressor.codec(replace(self._stretch, terms=terms))

    def zeros(self) -> Tensor:
        """Values."""
        return torch.zeros(self.numel, dtype=self.dtype)

    def nothing_kept(self) -> Tensor | None:
        """The residual of who has nothing to remember; None: the scheme has none."""
        return torch.zeros(self.numel) if self._remembers else None

    def write(self, values: Tensor, draw: Draw, residual: Tensor | None = None) -> np.ndarray | None:
        """Replace values by what their code says.

        Parameters
        ----------
        values
            (numel,) of `dtype`.
        draw
            The random numbers; of these the reader needs what all ranks draw alike.
        residual
            Of a scheme that remembers, see `Codec.run`; None: it has nothing to remember.

        Returns
        -------
        array or None
            (nbytes,) uint8, a new one; None where a number is not finite: nothing has changed then.
        """
        code, end = np.empty(self.nbytes, np.uint8), 0
        for message in self._messages(values, draw, residual):
            if message.op == "max" and not finite(message.data):
                return None
            start, end = end, end + message.data.nbytes
            code[start:end] = bytes_of(message.data)
        return code

    def write_near(self, values: Tensor, draw: Draw) -> np.ndarray | None:
        """Like `write`, with the factor behind the code that brings what it says nearest to the values.

        So any scheme leaves less than there was, and what it leaves may be said later. With a factor of 1
        this holds neither for `randk`, which says the few coordinates louder, nor for coarse rounding.
        """
        before = values.to(torch.float64, copy=True)
        code = self.write(values, draw)
        if code is None:
            return None
        said = values.double()
        square = float(said @ said)
        factor = np.float32(float(before @ said) / square if square else 0.0)
        values.mul_(float(factor))
        return np.append(code, np.frombuffer(factor.tobytes(), np.uint8))

    def read(self, code: np.ndarray, values: Tensor, draw: Draw) -> None:
        """Replace values by what a code of `write` or `write_near` says.

        Raises, of whatever kind, for some bytes that are no code; others are read as any numbers.
        """
        end = 0
        for message in self._messages(values.zero_(), draw, None):
            start, end = end, end + message.data.nbytes
            bytes_of(message.data)[:] = code[start:end]
            if message.gathered is not None:
                message.gathered[0].copy_(message.data)
        if factor := code[end:].tobytes():
            values.mul_(float(np.frombuffer(factor, np.float32)[0]))

    def _messages(self, values: Tensor, draw: Draw, residual: Tensor | None) -> Iterator[Message]:
        residual = self.nothing_kept() if residual is None else residual
        for message in self._codec.run(values, self._buffers, draw, 1.0, residual):
            if message is not None:
                if message.gathered is not None:
                    message.gathered[0].copy_(message.data)
                yield message


FACTOR_BYTES = 4  # of `Coder.write_near`, behind the code


class Told:
    """Values that two parties have alike: one tells the other how its own differ, in codes.

    What a code does not say is in the next difference, so errors do not add up.

    Attributes
    ----------
    values
        What both have; None: nothing yet.
    """

    def __init__(self, coder: Coder) -> None:
        self._coder = coder
        self.values: Tensor | None = None

    def tell(self, values: Tensor, draw: Draw) -> np.ndarray | None:
        """The code of how values differ; None: the other one must be given them as they are."""
        if self.values is not None:
            difference = values - self.values
            code = self._coder.write_near(difference, draw)
            if code is not None:
                self.values += difference
                return code
        self.give(values)
        return None

    def give(self, values: Tensor) -> None:
        """Both have these."""
        self.values = values.clone()

    def hear(self, code: np.ndarray, draw: Draw) -> None:
        """What the other one has told; see `Coder.read`."""
        assert self.values is not None
        difference = self._coder.zeros()
        self._coder.read(code, difference, draw)
        self.values += difference


def rehearse(compressor: Compressor, dtype: torch.dtype, terms: int) -> None:
    """Call the kernels of a scheme on a few zeros of host memory, so that they are compiled."""
    if compressor.whole:
        return
    coder = Coder(compressor, Stretch(_FEW, 1, tensors=((0, (_FEW,)),)), dtype)
    codec = coder.codec(terms)
    buffers = [torch.zeros(numel, dtype=of) for numel, of in codec.sums]
    for message in codec.run(coder.zeros(), buffers, Draw(0, 0, 0, 0), 1.0, coder.nothing_kept()):
        if message is not None and message.gathered is not None:
            message.gathered.copy_(message.data.expand_as(message.gathered))


def check(compressor: Compressor) -> None:
    """Raise `BadOption` for a scheme whose codes cannot be read one by one."""
    if compressor.whole:
        raise BadOption(
            f"{compressor} cannot compress what goes to and from a server",
            got="a scheme that goes on from its last result",
            do="use one of: fp16, bf16, maxnorm, multiscale, randk, randk-maxnorm, randk-multiscale, topk, "
            "signsgd; or no server (servers=0)",
            everywhere=True,
        )


def bytes_of(tensor: Tensor) -> np.ndarray:
    """A tensor's memory."""
    memory: np.ndarray = tensor.view(torch.uint8).numpy()
    return memory
