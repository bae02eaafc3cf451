"""Timing of codecs without communication: messages are combined as if all ranks had equal gradients."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

import torch

from hpcsgd.commands.bench.compress.problem import AveragingProblem, tensor_extents
from hpcsgd.commands.bench.timing import Contender, with_barrier
from hpcsgd.compress.base import Codec, Compressor, Message, RandomKey, Segment
from hpcsgd.tensors.group import Bucket

#: The phases of a reduction, and the messages at which they end.
PHASES: dict[str, tuple[str, ...]] = {"norms": ("max",), "encode": ("sum", "gather"), "decode": ()}


class CodecTimer:
    """The codecs of one scheme for all buckets of a group.

    Parameters
    ----------
    problem
        The gradients; the codecs work on its group.
    compressor
        The scheme.
    """

    def __init__(self, problem: AveragingProblem, compressor: Compressor) -> None:
        self._problem = problem
        self._codecs = [_BucketCodec(problem, bucket, compressor) for bucket in problem.group]

    def check(self, name: str, limit: float) -> None:
        """Raise `HpcsgdError` on all ranks if decoded gradients are too far from a rank's own."""
        self._start()
        self._run_until(())
        self._problem.check(f"{name} without communication", self._problem.result(), limit, own=True)

    def contenders(self, name: str, comm: Any) -> list[Contender]:
        """The contenders that time the phases: the norms, all up to the sums, and all after the sums."""

        def encode() -> None:
            self._start()
            self._run_until(PHASES["encode"])
            for codec in self._codecs:
                codec.combine()

        prepare = {"norms": self._start, "encode": self._start, "decode": encode}
        return [
            Contender(
                phase_name(name, phase), prepare[phase], with_barrier(comm, partial(self._run_until, ops))
            )
            for phase, ops in PHASES.items()
        ]

    def _start(self) -> None:
        """Rewrite the gradients, and begin the next step, which has random numbers of its own."""
        self._problem.write()
        self._problem.world.activity.step += 1
        for codec in self._codecs:
            codec.start(self._problem.world.activity.step)

    def _run_until(self, ops: Collection[str]) -> None:
        """Compute, and combine messages, up to the first with an operation in `ops`, or to the end."""
        for codec in self._codecs:
            codec.run_until(ops)


def phase_name(name: str, phase: str) -> str:
    """The name of the contender that times a phase of a scheme."""
    return f"{phase} of {name}"


class _BucketCodec:
    def __init__(self, problem: AveragingProblem, bucket: Bucket, compressor: Compressor) -> None:
        world, numel = problem.world, bucket.numel
        self._terms, self._index, self._rank = world.size, bucket.index, world.rank
        self._values = bucket.flat
        share = numel / problem.flat.numel()
        self._codec: Codec = compressor.codec(Segment(numel, self._terms, 0, share, tensor_extents(bucket)))
        self._buffers = [
            torch.zeros(size, dtype=dtype, device="cpu") for size, dtype in self._codec.sum_buffers
        ]
        self._residual = torch.zeros(numel, device="cpu") if compressor.feedback else None
        self._message: Message | None = None
        self._run: Iterator[Message | None] = iter(())

    def start(self, step: int) -> None:
        key = RandomKey(0, step, self._index, self._rank)
        self._message = None
        self._run = self._codec.run(self._values, self._buffers, key, 1.0 / self._terms, self._residual)

    def run_until(self, ops: Collection[str]) -> None:
        for message in self._run:
            self._message = message
            if message is not None and message.op in ops:
                return
            self.combine()

    def combine(self) -> None:
        message, self._message = self._message, None
        if message is not None and message.op == "sum":
            message.data.mul_(self._terms)  # integers wrap around
        elif message is not None and message.gathered is not None:
            message.gathered.copy_(message.data.expand_as(message.gathered))
