"""The computing of a scheme on one rank, with messages combined as if all ranks had the same gradients."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

import torch

from hpcsgd.commands.bench.compress.problem import Problem, places
from hpcsgd.commands.bench.timing import Contender, together
from hpcsgd.compress import Codec, Compressor, Draw, Message, Stretch
from hpcsgd.tensors.group import Bucket

#: The phases of a reduction, and the messages at which they end.
PHASES: dict[str, tuple[str, ...]] = {"norms": ("max",), "encode": ("sum", "gather"), "decode": ()}


class Rehearsal:
    """The codecs of all buckets of a group.

    Parameters
    ----------
    problem
        Its group is what they work on.
    compressor
        Makes them.
    """

    def __init__(self, problem: Problem, compressor: Compressor) -> None:
        self._problem = problem
        self._parts = [_Part(problem, bucket, compressor) for bucket in problem.group]

    def check(self, name: str, limit: float) -> None:
        """Raise `HpcsgdError` on all ranks where what is decoded is too far from a rank's own gradients."""
        self._start()
        self._until(())
        self._problem.check(f"{name} without communication", self._problem.result(), limit, own=True)

    def contenders(self, name: str, comm: Any) -> list[Contender]:
        """What times the phases, `called` so: the norms; all up to the sums; all after these."""

        def encoded() -> None:
            self._start()
            self._until(PHASES["encode"])
            for part in self._parts:
                part.combine()

        prepare = {"norms": self._start, "encode": self._start, "decode": encoded}
        return [
            Contender(called(name, phase), prepare[phase], together(comm, partial(self._until, ops)))
            for phase, ops in PHASES.items()
        ]

    def _start(self) -> None:
        """Write the gradients anew, and begin with the next step's random numbers."""
        self._problem.write()
        self._problem.world.status.step += 1
        for part in self._parts:
            part.start(self._problem.world.status.step)

    def _until(self, ops: Collection[str]) -> None:
        """Compute, and combine messages, up to the first one of `ops`; or to the end."""
        for part in self._parts:
            part.until(ops)


def called(name: str, phase: str) -> str:
    """The contender that times a phase of a scheme."""
    return f"{phase} of {name}"


class _Part:
    def __init__(self, problem: Problem, bucket: Bucket, compressor: Compressor) -> None:
        world, numel = problem.world, bucket.numel
        self._terms, self._index, self._rank = world.size, bucket.index, world.rank
        self._values = bucket.flat
        share = numel / problem.flat.numel()
        self._codec: Codec = compressor.codec(Stretch(numel, self._terms, 0, share, places(bucket)))
        self._buffers = [torch.zeros(size, dtype=dtype) for size, dtype in self._codec.sums]
        self._residual = torch.zeros(numel) if compressor.feedback else None
        self._message: Message | None = None
        self._run: Iterator[Message | None] = iter(())

    def start(self, step: int) -> None:
        draw = Draw(0, step, self._index, self._rank)
        self._message = None
        self._run = self._codec.run(self._values, self._buffers, draw, 1.0 / self._terms, self._residual)

    def until(self, ops: Collection[str]) -> None:
        for message in self._run:
            self._message = message
            if message is not None and message.op in ops:
                return
            self.combine()

    def combine(self) -> None:
        message, self._message = self._message, None
        if message is not None and message.op == "sum":
            message.data.mul_(self._terms)  # whole numbers wrap around
        elif message is not None and message.gathered is not None:
            message.gathered.copy_(message.data.expand_as(message.gathered))
