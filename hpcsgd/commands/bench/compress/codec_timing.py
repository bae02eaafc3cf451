"""Timing of codecs without communication: messages are combined as if all ranks had equal gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from hpcsgd.commands.bench.compress.problem import AveragingProblem, tensor_extents
from hpcsgd.commands.bench.timing import Contender, with_barrier
from hpcsgd.compress.base import Compressor, Message, RandomKey, Segment
from hpcsgd.tensors.group import Bucket

#: The phases of a reduction, and the messages at which they end.
PHASES: dict[str, tuple[str, ...]] = {"norms": ("max",), "encode": ("sum", "gather"), "decode": ()}


class CodecTimer:
    """The codecs of one scheme for all buckets of a group of gradients."""

    def __init__(self, problem: AveragingProblem, compressor: Compressor) -> None:
        self._problem, self._terms = problem, problem.world.size
        self._codecs = [_bucket_codec(problem, bucket, compressor) for bucket in problem.group]
        self._runs: list[Iterator[Message | None]] = []
        self._pending: list[Message | None] = []

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
            self._combine(self._pending)

        prepare = {"norms": self._start, "encode": self._start, "decode": encode}
        runs = {phase: with_barrier(comm, partial(self._run_until, ops)) for phase, ops in PHASES.items()}
        return [Contender(phase_name(name, phase), prepare[phase], run) for phase, run in runs.items()]

    def _start(self) -> None:
        """Rewrite the gradients, and begin the next step, which has random numbers of its own."""
        self._problem.write()
        self._problem.world.activity.step += 1
        self._runs = [codec(self._problem.world.activity.step) for codec in self._codecs]

    def _run_until(self, ops: Collection[str]) -> None:
        """Compute, and combine messages, up to the first with an operation in `ops`, or to the end."""
        self._pending = []
        for run in self._runs:
            for message in run:
                if message is not None and message.op in ops:
                    self._pending.append(message)
                    break
                self._combine([message])

    def _combine(self, messages: Sequence[Message | None]) -> None:
        for message in messages:
            if message is not None and message.op == "sum":
                message.data.mul_(self._terms)  # integers wrap around
            elif message is not None and message.gathered is not None:
                message.gathered.copy_(message.data.expand_as(message.gathered))


def phase_name(name: str, phase: str) -> str:
    """The name of the contender that times a phase of a scheme."""
    return f"{phase} of {name}"


def _bucket_codec(
    problem: AveragingProblem, bucket: Bucket, compressor: Compressor
) -> Callable[[int], Iterator[Message | None]]:
    """Return a function that begins the reduction of a bucket at a step."""
    numel, terms, rank = bucket.numel, problem.world.size, problem.world.rank
    codec = compressor.codec(Segment(numel, terms, 0, numel / problem.flat.numel(), tensor_extents(bucket)))
    buffers = [torch.zeros(size, dtype=dtype, device="cpu") for size, dtype in codec.sum_buffers]
    residual = torch.zeros(numel, device="cpu") if compressor.feedback else None

    def run(step: int) -> Iterator[Message | None]:
        key = RandomKey(0, step, bucket.index, rank)
        return codec.run(bucket.flat, buffers, key, 1.0 / terms, residual)

    return run
