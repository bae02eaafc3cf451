"""What clients and servers of one shard say to each other in codes instead of values.

Gradients are pushed as the scheme says them, and what it does not say is remembered by the client, see
`Compressor.feedback`. Everything else is a difference to what both sides have: the values of a server that
takes gradients, as far as it has told them to the client; or the model of a client that is drawn to the
server's, as far as the client has told it. What draws these two together is coded too, and both go as far
as the code says: the sum of all models and the server's values stays what it is.

Gradients that a server adds up anyway (mode "sync") are not decoded one by one: see `hpcsgd.server.code_sum`.

Codes are smaller than values, so their size tells which of both a message brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpcsgd.compress import Compressor, Draw, Stretch
from hpcsgd.compress.point_to_point import FACTOR_BYTES, Coder, Told, bytes_of
from hpcsgd.errors import HpcsgdError
from hpcsgd.server.code_sum import ClientSum, ServerSum
from hpcsgd.server.connection import Request
from hpcsgd.server.protocol import Head, State

_PUSHES, _ANSWERS = 0, 1  # seeds of what both sides draw alike

Extents = Sequence[tuple[int, int]]


class Coding(NamedTuple):
    """How a group compresses what it pushes and pulls.

    Attributes
    ----------
    compressor
        The scheme.
    mode
        The servers': with "elastic" models are pushed, else gradients; with "sync" these are summed as words.
    rank
        A number like no other group's, for rounding at random.
    """

    compressor: Compressor
    mode: str
    rank: int


def coder_of(
    compressor: Compressor, dtype: torch.dtype, numel: int, total: int, tensors: Extents
) -> Coder | None:
    """The coder of a shard; None where its codes are no smaller than its values.

    Parameters
    ----------
    compressor
        The scheme.
    dtype, numel
        The shard's; of `total` elements of all shards.
    tensors
        [start, stop) of each tensor in it.
    """
    inside = tuple((start, (stop - start,)) for start, stop in tensors)
    coder = Coder(compressor, Stretch(numel, 1, share=numel / total, tensors=inside), dtype)
    return coder if coder.nbytes + FACTOR_BYTES < numel * dtype.itemsize else None


class _Side:
    """What both sides know.

    Parameters
    ----------
    coder
        Of the shard.
    shard
        Its index.
    mode
        See `Coding`.

    Attributes
    ----------
    push_bytes, answer_bytes
        Of codes.
    """

    def __init__(self, coder: Coder, shard: int, mode: str) -> None:
        self._coder, self._shard, self._models = coder, shard, mode == "elastic"
        self.answer_bytes = coder.nbytes + FACTOR_BYTES
        self.push_bytes = self.answer_bytes if self._models else coder.nbytes

    def push_draw(self, number: int, rank: int = 0) -> Draw:
        """Of a push, or of the sum that follows version `number` of the values."""
        return Draw(_PUSHES, number, self._shard, rank)

    def _answer_draw(self, number: int) -> Draw:
        return Draw(_ANSWERS, number, self._shard, 0)


class ClientCodes(_Side):
    """A client's side.

    Parameters
    ----------
    coder, shard
        See `_Side`.
    coding
        See `Coding`.

    Attributes
    ----------
    landing
        Where the code of an answer goes.
    """

    def __init__(self, coder: Coder, shard: int, coding: Coding) -> None:
        super().__init__(coder, shard, coding.mode)
        self._coding, self._told = coding, Told(coder)
        remembers = coding.compressor.feedback and not self._models
        self._residual = torch.zeros(coder.numel) if remembers else None
        self._pushed = coder.zeros()
        self.landing = np.empty(self.answer_bytes, np.uint8)
        self._sum = ClientSum(coder, self._residual) if coding.mode == "sync" else None

    def begin(self, request: Request, values: Tensor) -> Request:
        """A push of values, which must stay unchanged until it is over, in codes where there are some."""
        self._pushed, head = values, request.head
        if self._sum is not None:
            return self._begin_sum(request, self._sum, self._sum.terms)
        code, draw = None, self.push_draw(head.round, self._coding.rank)
        if self._models:
            code = self._told.tell(values, draw)
        elif head.weight:  # else they may be anything
            code = self._coder.write(values.clone(), draw, self._residual)
        return self._asking(request, bytes_of(values) if code is None else code)

    def follow(self, request: Request) -> Request | None:
        """What comes next after an answer; None: it was the last one."""
        answer = request.answer
        assert answer is not None
        if answer.state is State.UNREAD:
            self._told.give(self._pushed)
            return self._asking(request, bytes_of(self._pushed))
        if self._sum is None or answer.state not in (State.MORE, State.AGAIN):
            return None
        if answer.state is State.AGAIN:
            return self._begin_sum(request, self._sum, answer.terms)
        assert request.coded is not None
        return self._asking(request, self._sum.go_on(request.coded))

    def _begin_sum(self, request: Request, summing: ClientSum, terms: int) -> Request:
        head = request.head
        if not head.weight:  # nothing is added, whatever the values are
            return self._asking(request, np.empty(0, np.uint8))
        draw = self.push_draw(head.version, self._coding.rank)
        part = summing.begin(self._pushed * head.weight, draw, terms)
        if part is None:
            raise HpcsgdError(
                f"{self._coding.compressor} cannot represent the gradients of shard {self._shard}",
                got="finite numbers, but their sum with the residual, or their rotation, is not",
                do="lower the learning rate, or clip the gradient",
            )
        return self._asking(request, part)

    def _asking(self, request: Request, body: np.ndarray) -> Request:
        head, coded = replace(request.head, nbytes=body.nbytes), self.landing
        if self._sum is not None and body.nbytes:
            head = replace(head, part=self._sum.part, terms=self._sum.terms)
            if self._sum.combined_bytes:
                coded = np.empty(self._sum.combined_bytes, np.uint8)
        return replace(request, head=head, source=body, coded=coded, answer=None)

    def hear(self, answer: Head, values: Tensor) -> None:
        """Make `values` what was answered last, which is there already if it was no code."""
        if self._sum is not None:
            self._sum.end(answer.state is State.DONE)
        if self._models and answer.nbytes == self.answer_bytes:
            self._coder.read(self.landing, values, self._answer_draw(answer.round))
        elif answer.nbytes == self.answer_bytes:
            self._told.hear(self.landing, self._answer_draw(answer.version))
            assert self._told.values is not None
            values.copy_(self._told.values)
        elif answer.nbytes and not self._models:
            self._told.give(values)

    def state_dict(self) -> dict[str, Tensor | None]:
        """What was not said, and what has been told."""
        parts = {"residual": self._residual, "told": self._told.values}
        return {name: None if part is None else part.clone() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any], told: bool) -> None:
        """Take back what `state_dict` gave; without `told` only what was not said."""
        if self._residual is not None:
            self._residual.copy_(state["residual"])
        if told:
            self._told.values = None if state["told"] is None else state["told"].clone()


class ServerCodes(_Side):
    """A server's side, of all clients.

    Attributes
    ----------
    sum
        How pushes are summed; None: they are decoded one by one.
    """

    def __init__(self, coder: Coder, shard: int, mode: str) -> None:
        super().__init__(coder, shard, mode)
        self.sum = ServerSum(coder) if mode == "sync" else None
        self._told: dict[str, Told] = {}
        self._pulls: dict[str, np.ndarray | None] = {}

    def takes(self, head: Head, clients: int) -> bool:
        """Whether a push has as many bytes as its code, or its part of a sum; of so many clients at most."""
        if self.sum is None:
            return head.nbytes == self.push_bytes
        if not head.weight:
            return head.nbytes == 0
        if not 0 < head.terms <= clients:  # it will be told how many
            return head.nbytes <= self._coder.zeros().nbytes
        return self.sum.fits(head.nbytes, head.part, head.terms)

    def hear(self, client: str, number: int, body: np.ndarray, values: Tensor) -> bool:
        """Make `values` what was pushed, which is there already if it was no code.

        Returns whether it could be read: there may be nothing that it is the difference to. Raises, of
        whatever kind, for what is no code.
        """
        coded, draw = body.nbytes == self.push_bytes, self.push_draw(number)
        if not self._models:
            if coded:
                self._coder.read(body, values, draw)
            return True
        told = self._told_to(client)
        if not coded:
            told.give(values)
        elif told.values is None:
            return False
        else:
            told.hear(body, draw)
            values.copy_(told.values)
        return True

    def draw_near(self, centre: Tensor, pulls: Sequence[tuple[str, int, Tensor]]) -> None:
        """Add to the values by how much each client's model is drawn to them, as far as its code says.

        Parameters
        ----------
        centre
            The values.
        pulls
            Client, number of its push, and by how much, which becomes what the code says.
        """
        for client, number, pull in pulls:
            self._pulls[client] = self._coder.write_near(pull, self._answer_draw(number))
            centre += pull

    def answer(self, client: str, head: Head, values: Tensor) -> np.ndarray | None:
        """The code of an answer with these values; None: they must be told as they are."""
        if self._models:
            return self._pulls.get(client)
        told = self._told_to(client)
        if head.state is State.LATE:  # it is far from them
            told.give(values)
            return None
        return told.tell(values, self._answer_draw(head.version))

    def forget(self, client: str) -> None:
        """Nobody knows what it has heard."""
        self._told.pop(client, None)

    def _told_to(self, client: str) -> Told:
        return self._told.setdefault(client, Told(self._coder))

    def state_dict(self) -> dict[str, Tensor]:
        """What each client has been told, or has told."""
        return {name: told.values.clone() for name, told in self._told.items() if told.values is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self._told.clear()
        for name, values in state.items():
            self._told_to(name).give(values)
