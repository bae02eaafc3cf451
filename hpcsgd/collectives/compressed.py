"""The compressed all-reduce: codecs before and after any of the all-reduce algorithms.

Where several nodes share memory inside, ranks of one node add up float32 there, and only the sum of the node
is compressed, by the local ranks that own its slices ("two-level"). Elsewhere every rank compresses its
own buckets, and the words go through "library", "ring" or "node" like any other bucket. While the words
of one bucket are on the wire, the communication thread encodes the next ones and decodes the last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hpcsgd.collectives import ALGORITHMS, check_algorithm, choose, mpi_library, node
from hpcsgd.collectives.bucket_shards import Lane, make_lanes, place_of
from hpcsgd.collectives.pipeline import Flow, Pipeline, Steps
from hpcsgd.collectives.ring import Ring
from hpcsgd.collectives.staging import DIRECT, computed, side_stream, staged
from hpcsgd.compress import Compressor, Draw, Message
from hpcsgd.compress.base import finite
from hpcsgd.compress.point_to_point import rehearse
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.communicator import Transport
from hpcsgd.mpi.progress import Work
from hpcsgd.mpi.world import World
from hpcsgd.tensors.group import Bucket, TensorGroup

_TAGS = 2**14  # MPI promises tags up to 2**15 - 1
_OPERATIONS = {"max": "MAX", "and": "BAND"}

#: One for all reductions of a world: messages match because all ranks start them in the same order.
_pipelines: WeakKeyDictionary[World, Pipeline] = WeakKeyDictionary()


class _NotFinite(Exception):
    """All ranks know that a bucket holds NaN or infinity."""


class Compressed:
    """Sums buckets by codecs; the methods are those of `reduction.Plain`. Collective.

    Parameters
    ----------
    group, algorithm, compressor, seed, nonfinite, what
        See `hpcsgd.collectives.reducer.reduction`.
    """

    def __init__(
        self,
        group: TensorGroup,
        algorithm: str,
        compressor: Compressor,
        seed: int,
        nonfinite: str,
        what: str,
    ) -> None:
        if algorithm != "auto":
            check_algorithm(group, algorithm)
        self._world = world = group.world
        self._group, self._algorithm, self._seed = group, algorithm, seed
        self._compressor, self._nonfinite, self._what = compressor, nonfinite, what
        for dtype in dict.fromkeys(bucket.flat.dtype for bucket in group):
            world.compile(partial(rehearse, compressor, dtype, world.size))
        self._staged = any(bucket.flat is not bucket.host for bucket in group)
        self._by_node = self._adds_inside_nodes()
        self._net: Transport | None = world.across if self._by_node else world.all
        if self._net is not None:
            self._net.twin(1)  # made now, by all of its ranks at once
        self._lanes, self._buffers = make_lanes(group, algorithm, compressor, self._net, self._by_node)
        self._barriers = [world.make_barrier() for _ in range(2)] if self._by_node else []
        self._flags = TensorGroup(world, [("not finite", torch.zeros(1))], staged=False).buckets[0]
        if world not in _pipelines:
            device = world.device if self._staged else torch.device("cpu")
            _pipelines[world] = Pipeline(world.waiter, lambda: side_stream(device))
        self._pipeline = _pipelines[world]
        self._works: list[tuple[Flow, Work]] = []

    def _adds_inside_nodes(self) -> bool:
        if self._compressor.whole or self._staged:
            return False
        if self._algorithm == "auto":
            return self._group.shared and self._world.nodes > 1
        return self._algorithm == "two-level"

    def start(self, bucket: Bucket, scale: float, number: int | None = None) -> None:
        """Start to replace a bucket by `scale` times its sum; see `reduction.Plain.start`."""
        number = self._world.status.step if number is None else number
        what = f"compressed all-reduce of bucket {bucket.index} at step {self._world.status.step}"
        lane = self._lanes[bucket.index]
        steps = self._by_nodes if self._by_node else self._steps
        flow = self._pipeline.add(lambda flow: steps(flow, lane, scale, number))
        work = self._world.progress.submit(what, lambda: self._reduce(flow, lane, what))
        self._works.append((flow, work))

    def finish(self) -> bool:
        """Wait for what was started; False: a number is not finite, all ranks shall skip the step."""
        works, self._works = self._works, []
        for _, work in works:
            work.wait()
        if works and not works[-1][0].done:
            # Another reduction's bucket came after the last one of this, which was left to be decoded.
            last = works[-1][0]
            self._world.progress.run("decoding", lambda: self._pipeline.complete(last))
        # Ranks without a slice of their own learn it from their node.
        good = not any(bool(row[0]) for row in self._flags.rows or [self._flags.flat])
        if not good and works:
            self._world.progress.run("the end of a skipped step", self._clear_flag)
        return good

    def _clear_flag(self) -> None:
        if len(self._flags.rows) > 1:
            self._world.node_barrier("the end of a skipped step")
        self._flags.flat.zero_()
        if len(self._flags.rows) > 1:
            self._world.node_barrier("the end of a skipped step")

    def state_dict(self) -> dict[str, Any]:
        """Residuals and the codecs' own state, of this rank."""
        return {
            "residuals": [
                None if lane.residual is None else lane.residual.cpu().clone() for lane in self._lanes
            ],
            "codecs": [lane.codec.state_dict() if lane.codec else {} for lane in self._lanes],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises
        ------
        HpcsgdError
            Where it is that of another scheme.
        """
        if len(state.get("residuals", ())) != len(self._lanes):
            raise HpcsgdError(
                f"the state is not one of {self._compressor}",
                rank=self._world.name,
                expected=f"{len(self._lanes)} buckets",
                got=f"{len(state.get('residuals', ()))}",
                do="go on with the compression, and the bucket size, that the checkpoint was made with",
            )
        for lane, residual, codec in zip(self._lanes, state["residuals"], state["codecs"], strict=True):
            if lane.residual is not None:
                lane.residual.copy_(residual)
            if lane.codec is not None:
                lane.codec.load_state_dict(codec)

    # The way of one bucket.

    def _reduce(self, flow: Flow, lane: Lane, what: str) -> None:
        """In the communication thread, at the bucket's turn."""

        def sum_up(buffer: Bucket) -> None:
            with self._looking_after():
                staged(_algorithm, buffer, what, self._name(buffer))()

        traffic = self._world.traffic
        before = traffic.sent + (0 if self._by_node else traffic.shared)
        self._pipeline.take_turn(flow, what, sum_up)
        moved = traffic.sent + (0 if self._by_node else traffic.shared) - before
        if self._net is not None:
            plain = lane.values.numel() * lane.values.element_size()
            traffic.saved += 2 * (self._net.size - 1) * plain // self._net.size - moved

    def _by_nodes(self, flow: Flow, lane: Lane, scale: float, number: int) -> Steps:
        """Add up inside the node, compress this rank's slice of the sum, and give it to the node."""
        world, bucket = self._world, lane.bucket
        if world.local_size > 1:
            yield from self._pass(flow, 0)
            node.reduce(bucket, lane.part, scale, to_all=False)
            yield None
        elif scale != 1.0:
            lane.values.mul_(scale)
        if self._net is not None and self._net.size > 1:
            yield from self._steps(flow, lane, 1.0, number)
        if world.local_size > 1:
            node.spread(bucket, lane.part)
            yield from self._pass(flow, 1)

    def _pass(self, flow: Flow, index: int) -> Steps:
        """Wait for the node's ranks; buckets pass each of the two barriers one after the other."""
        yield lambda: flow.may_pass(index)
        yield self._barriers[index].arrive()
        flow.passed = index + 1

    def _steps(self, flow: Flow, lane: Lane, scale: float, number: int) -> Steps:
        """Run the codec, and combine its messages."""
        assert lane.codec is not None and self._net is not None
        values, codec = lane.values, lane.codec
        produced = computed(values.device)
        draw = Draw(self._seed, number, lane.bucket.index, self._net.rank)

        def steps() -> Steps:
            if produced is not None:
                produced.wait(torch.cuda.current_stream(values.device))
            buffers = [b.views[0][:size] for b, (size, _) in zip(lane.buffers, codec.sums, strict=True)]
            left = len(codec.sums)
            try:
                work = codec.run(values, buffers, draw, scale, lane.residual)
                for message in self._traced(work, left, lane.bucket):
                    if message is None:
                        yield None
                        continue
                    yield from self._combine(flow, lane, message)
                    left -= message.op == "sum"
                    flow.only_decodes = left == 0 and message.op == "sum" and not self._by_node
            except _NotFinite:
                self._flags.flat.fill_(1)
                values.fill_(torch.nan)
            lane.clear_gaps()
            if produced is not None:
                torch.cuda.current_stream(values.device).synchronize()

        return steps()

    def _traced(self, work: Iterator[Message | None], sums: int, bucket: Bucket) -> Iterator[Message | None]:
        """The codec's work; once nothing is left to be summed, it decodes."""
        decode, encode = (f"{what} of bucket {bucket.index}" for what in ("decode", "encode"))
        while True:
            try:
                with self._world.trace.span(encode if sums else decode, "codec"):
                    message = next(work)
            except StopIteration:
                return
            sums -= message is not None and message.op == "sum"
            yield message

    def _combine(self, flow: Flow, lane: Lane, message: Message) -> Steps:
        assert self._net is not None
        if message.op == "max" and not finite(message.data) and self._nonfinite == "error":
            raise self._error(lane)
        yield flow.may_send
        flow.sent += 1
        if message.op == "sum":
            yield from self._sum(flow, lane.buffers[message.slot])
        else:
            yield from self._exchange(message)
        flow.over += 1
        if message.op == "max" and not finite(message.data):
            raise _NotFinite

    def _sum(self, flow: Flow, buffer: Bucket) -> Steps:
        """Round the ring without waiting; any other way waits for its turn."""
        assert self._net is not None
        if self._by_node or (self._name(buffer) == "ring" and not self._staged):
            for request, _ in Ring(self._net, buffer.host, "", 1 + flow.number % _TAGS).steps(1.0):
                yield request.Test
        else:
            flow.blocked = buffer
            yield lambda: flow.blocked is None

    def _exchange(self, message: Message) -> Steps:
        assert self._net is not None
        net = self._net.twin(0 if message.op == "max" else 1)
        mine, target = message.data.cpu(), message.gathered
        if target is None:
            yield net.iallreduce(_unsigned(mine), _OPERATIONS[message.op]).Test
            message.data.copy_(mine)
        else:
            rows = target.cpu()
            yield net.iallgather(_bytes(mine), _bytes(rows)).Test
            target.copy_(rows)

    def _name(self, buffer: Bucket) -> str:
        """The algorithm that sums a buffer."""
        name = choose(buffer) if self._algorithm == "auto" else self._algorithm
        # MPI would have to send half precision as float32.
        return "ring" if name == "library" and buffer.flat.element_size() < 4 else name

    @contextlib.contextmanager
    def _looking_after(self) -> Iterator[None]:
        """Inside, waits for messages are used for the other buckets."""
        nets = [net for net in (self._world.all, self._world.across) if net is not None]
        for net in nets:
            net.meanwhile = self._pipeline.look_after
        try:
            yield
        finally:
            for net in nets:
                net.meanwhile = None

    def _error(self, lane: Lane) -> HpcsgdError:
        rank, name = place_of(lane, self._by_node)
        step = self._world.status.step
        if name is None:
            return HpcsgdError(
                f"{self._compressor} cannot represent the {self._what}s of {lane.bucket} at step {step}",
                rank=rank,
                got="finite numbers, but their sum with the residual, or their rotation, is not",
                do="lower the learning rate, or clip the gradient",
            )
        return not_finite(self._what, name, rank, step)


def not_finite(what: str, name: str, rank: int, step: int) -> HpcsgdError:
    """The error for NaN or infinity in what shall be compressed."""
    return HpcsgdError(
        f"the {what} of {name} is not finite at step {step}",
        rank=rank,
        do="find out where NaN or infinity comes from (a learning rate that is too high?); with "
        "GradScaler, or to leave out such steps on all ranks, use nonfinite='skip'",
    )


def _algorithm(bucket: Bucket, what: str, name: str) -> None:
    ALGORITHMS[name](bucket, what, 1.0)


def _algorithm_on_device(bucket: Bucket, what: str, name: str) -> None:
    mpi_library.allreduce_on_device(bucket, 1.0)


DIRECT[_algorithm] = _algorithm_on_device


def _bytes(tensor: Tensor) -> Any:
    return tensor.view(torch.uint8).numpy()


def _unsigned(tensor: Tensor) -> Any:
    return tensor.view({2: torch.uint16, 4: torch.uint32}[tensor.element_size()]).numpy()
