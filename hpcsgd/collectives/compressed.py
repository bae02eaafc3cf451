"""Compressed all-reduce: codecs before and after any of the all-reduce algorithms.

On several nodes with shared memory, the ranks of a node sum float32, and only the sum of the node is
compressed, by the local ranks that own its slices ("two-level"). Otherwise every rank compresses its own
buckets, and the words are summed by "library", "ring" or "node" like any other bucket. While the words of one
bucket are in flight, the communication thread encodes the next buckets and decodes the previous ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hpcsgd.collectives import ALGORITHMS, check_algorithm, choose_algorithm, node
from hpcsgd.collectives.bucket_order import BucketOrder
from hpcsgd.collectives.bucket_shards import BucketShard, locate_non_finite, make_shards
from hpcsgd.collectives.ring import RingCollective
from hpcsgd.collectives.staging import after_compute, on_host, via_host, wait_for_compute
from hpcsgd.compress.base import Compressor, Message, RandomKey, all_finite
from hpcsgd.compress.point_to_point import warm_up
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.communicator import Communicator
from hpcsgd.mpi.tasks import Steps, Wait, Work, steps_of
from hpcsgd.mpi.world import World
from hpcsgd.tensors.group import Bucket, TensorGroup

_TAGS = 2**14  # MPI guarantees tags up to 2**15 - 1
#: Purposes of the two duplicates of a communicator: maxima need no order relative to the codes.
_MAXIMA, _CODES = "maxima of compressed buckets", "codes of compressed buckets"
_OPERATIONS = {"max": "MAX", "and": "BAND"}

#: One order for all reductions of a world: messages match because all ranks start them in the same order.
_last: WeakKeyDictionary[World, BucketOrder] = WeakKeyDictionary()


class _NonFinite(Exception):
    """A bucket holds NaN or infinity; raised on all ranks."""


class CompressedReducer:
    """Sums buckets by codecs, with the methods of `PlainReducer`; collective when created.

    Parameters
    ----------
    group, algorithm, compressor, seed, nonfinite, kind
        See `hpcsgd.collectives.reducer.make_reducer`.
    """

    def __init__(
        self,
        group: TensorGroup,
        algorithm: str,
        compressor: Compressor,
        seed: int,
        nonfinite: str,
        kind: str,
    ) -> None:
        if algorithm != "auto":
            check_algorithm(group, algorithm)
        self._world = world = group.world
        self._group, self._algorithm, self._seed = group, algorithm, seed
        self._compressor, self._nonfinite, self._kind = compressor, nonfinite, kind
        for dtype in dict.fromkeys(bucket.flat.dtype for bucket in group):
            world.local.compile_kernels(partial(warm_up, compressor, dtype, world.size))
        self._by_node = self._sums_inside_nodes()
        self._communicator: Communicator | None = world.internode if self._by_node else world.all
        if self._communicator is not None:
            for purpose in (_MAXIMA, _CODES):
                self._communicator.dup(purpose)  # collective, so before any bucket is reduced
        self._shards, self._buffers = make_shards(
            group, algorithm, compressor, self._communicator, self._by_node
        )
        self._barriers = [world.local.make_barrier() for _ in range(2)] if self._by_node else []
        self._flags = TensorGroup(
            world, [("not finite", torch.zeros(1, device="cpu"))], staged=False
        ).buckets[0]
        self._works: list[Work] = []

    def _sums_inside_nodes(self) -> bool:
        windowed = all(bucket.windowed for bucket in self._group)
        if self._compressor.needs_whole_tensors or (self._group.staged and not windowed):
            return False
        if self._algorithm == "auto":
            return self._group.shared and self._world.nodes > 1
        return self._algorithm == "two-level"

    def start(self, bucket: Bucket, scale: float, sequence_number: int | None = None) -> None:
        """Start to replace a bucket by `scale` times its sum; see `PlainReducer.start`."""
        step = self._world.activity.step
        number = step if sequence_number is None else sequence_number
        operation = f"compressed all-reduce of bucket {bucket.index} at step {step}"
        shard = self._shards[bucket.index]
        _last[self._world] = order = BucketOrder(_last.get(self._world))
        job = after_compute(bucket.flat.device, lambda: self._counted(order, shard, scale, number))
        self._works.append(self._world.progress.submit(operation, job, order))

    def finish(self) -> bool:
        """Wait for all started sums; False: a value is not finite, and all ranks must skip the step."""
        works, self._works = self._works, []
        for work in works:
            work.wait()
        # A rank that owns no slice reads the flags of its node.
        finite = not any(bool(row[0]) for row in self._flags.rows or [self._flags.flat])
        if not finite and works:
            self._world.progress.run("the end of a skipped step", self._clear_flag)
        return finite

    def _clear_flag(self) -> Steps[None]:
        if len(self._flags.rows) > 1:
            yield self._world.local.arrive()
        self._flags.flat.zero_()
        if len(self._flags.rows) > 1:
            yield self._world.local.arrive()

    def state_dict(self) -> dict[str, Any]:
        """Return the residuals and codec states of this rank."""
        return {
            "residuals": [
                None if shard.residual is None else shard.residual.cpu().clone() for shard in self._shards
            ],
            "codecs": [shard.codec.state_dict() if shard.codec else {} for shard in self._shards],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict`.

        Raises
        ------
        HpcsgdError
            The state has another number of buckets.
        """
        if len(state.get("residuals", ())) != len(self._shards):
            raise HpcsgdError(
                f"the checkpoint holds no state of {self._compressor} with these buckets",
                rank=self._world.global_rank,
                expected=f"{len(self._shards)} buckets",
                got=f"{len(state.get('residuals', ()))}",
                do="resume with the compression (--compress) and bucket size (--bucket-mib) of the run that "
                "wrote the checkpoint",
            )
        for shard, residual, codec in zip(self._shards, state["residuals"], state["codecs"], strict=True):
            if shard.residual is not None:
                shard.residual.copy_(residual)
            if shard.codec is not None:
                shard.codec.load_state_dict(codec)

    # The steps of one bucket.

    def _counted(self, order: BucketOrder, shard: BucketShard, scale: float, number: int) -> Steps[None]:
        """Reduce a bucket, and count the bytes that this saves."""
        reduce = self._reduce_two_level if self._by_node else self._run_codec
        steps, moved, traffic = reduce(order, shard, scale, number), 0, self._world.traffic
        while True:
            before = self._bytes_moved()
            try:
                wait = next(steps)
            except StopIteration:
                break
            finally:
                moved += self._bytes_moved() - before
            yield wait
        order.end()
        if self._communicator is not None:
            uncompressed, ranks = shard.values.nbytes, self._communicator.size
            traffic.count(saved=2 * (ranks - 1) * uncompressed // ranks - moved)

    def _bytes_moved(self) -> int:
        traffic = self._world.traffic
        return traffic.sent + (0 if self._by_node else traffic.shared)

    def _reduce_two_level(
        self, order: BucketOrder, shard: BucketShard, scale: float, number: int
    ) -> Steps[None]:
        """Sum within the node, compress this rank's slice of the sum, and copy the result to the node."""
        world, bucket = self._world, shard.bucket
        if world.local_size > 1:
            yield from self._pass_barrier(order, shard, 0)
            node.reduce(bucket, shard.part, scale, to_all=False)
            yield None
        elif scale != 1.0:
            shard.values.mul_(scale)
        if self._communicator is not None and self._communicator.size > 1:
            yield from self._run_codec(order, shard, 1.0, number)
        if world.local_size > 1:
            node.copy_to_node(bucket, shard.part)
            yield from self._pass_barrier(order, shard, 1)

    def _pass_barrier(self, order: BucketOrder, shard: BucketShard, index: int) -> Steps[None]:
        """Wait for the node's ranks; buckets pass each of the two barriers in order."""
        yield Wait(lambda: order.may_pass(index))
        wait_for_compute(shard.bucket.flat.device)
        yield self._barriers[index].arrive()
        order.barriers_passed = index + 1

    def _run_codec(self, order: BucketOrder, shard: BucketShard, scale: float, number: int) -> Steps[None]:
        """Run the codec, and combine its messages."""
        assert shard.codec is not None and self._communicator is not None
        values, codec = shard.values, shard.codec
        random_key = RandomKey(self._seed, number, shard.bucket.index, self._communicator.rank)
        buffers = [
            buffer.views[0][:numel]
            for buffer, (numel, _) in zip(shard.buffers, codec.sum_buffers, strict=True)
        ]
        sums_left, residual = len(codec.sum_buffers), shard.residual
        narrow = values.dtype is torch.float16  # no scheme keeps to its range for certain
        try:
            new_residual = residual.clone() if narrow and residual is not None else residual
            run = codec.run(values, buffers, random_key, scale, new_residual)
            for message in self._traced(run, sums_left, shard.bucket):
                if message is None:
                    yield None
                    continue
                yield from self._combine(order, shard, message)
                sums_left -= message.op == "sum"
                order.over = sums_left == 0 and message.op == "sum" and not self._by_node
            if narrow:
                self._check_range(shard)
                if residual is not None and new_residual is not None:
                    residual.copy_(new_residual)
        except _NonFinite:
            self._flags.flat.fill_(1)
            values.fill_(torch.nan)
        shard.clear_gaps()

    def _check_range(self, shard: BucketShard) -> None:
        """Raise if decoded values exceed the range of their type."""
        values = shard.values
        if bool(values.isfinite().all()):
            return
        if self._nonfinite == "error":
            raise HpcsgdError(
                f"{self._compressor} cannot represent the mean {self._kind} of {shard.bucket} "
                f"at step {self._world.activity.step}",
                rank=self._world.global_rank,
                expected=f"decoded values up to {torch.finfo(values.dtype).max:g}, the largest of float16",
                got="larger ones: rounding, or the factor of sampled coordinates, has enlarged some",
                do="use parameters of bfloat16 or float32, or a scheme that enlarges less: norm=max, "
                "more bits, error feedback (ef+) with samples; nonfinite='skip' skips such steps",
            )
        raise _NonFinite

    def _traced(
        self, run: Iterator[Message | None], sums_left: int, bucket: Bucket
    ) -> Iterator[Message | None]:
        """Trace the run of a codec; it decodes once all sums are done."""
        while True:
            span = f"{'encode' if sums_left else 'decode'} of bucket {bucket.index}"
            try:
                with self._world.tracer.span(span, "codec"):
                    message = next(run)
            except StopIteration:
                return
            sums_left -= message is not None and message.op == "sum"
            yield message

    def _combine(self, order: BucketOrder, shard: BucketShard, message: Message) -> Steps[None]:
        if message.op == "sum":
            yield Wait(order.may_send)
            order.sent += 1
            yield from self._sum(order, shard.buffers[message.buffer_index])
            order.completed += 1
            return
        data = shard.to_host(message.data)
        if message.op == "max" and not all_finite(data) and self._nonfinite == "error":
            raise self._error(shard)
        yield Wait(order.may_send)
        order.sent += 1
        yield from self._exchange(shard, message, data)
        order.completed += 1
        if message.op == "max" and not all_finite(data):
            raise _NonFinite

    def _sum(self, order: BucketOrder, buffer: Bucket) -> Steps[None]:
        """Sum by a ring, which may overlap with others; any other algorithm waits for its turn."""
        assert self._communicator is not None
        if self._by_node or (self._algorithm_for(buffer) == "ring" and not self._group.staged):
            with on_host(buffer, slice(0, buffer.numel)) as words:
                yield from RingCollective(self._communicator, words, 1 + order.number % _TAGS).allreduce(1.0)
        else:
            yield Wait(lambda: order.begun)
            yield from steps_of(via_host(ALGORITHMS[self._algorithm_for(buffer)], buffer, 1.0))

    def _exchange(self, shard: BucketShard, message: Message, data: Tensor) -> Steps[None]:
        """Combine the message, which is `data` on the host."""
        assert self._communicator is not None
        communicator = self._communicator.dup(_MAXIMA if message.op == "max" else _CODES)
        if message.gathered is None:
            result, target = data, message.data
            request = communicator.iallreduce(_unsigned(data), _OPERATIONS[message.op])
        else:
            result, target = shard.to_host(message.gathered), message.gathered
            request = communicator.iallgather(_bytes(data), _bytes(result))
        yield communicator.completion(request)
        if result is not target:
            target.copy_(result, non_blocking=True)

    def _algorithm_for(self, buffer: Bucket) -> str:
        name = choose_algorithm(buffer) if self._algorithm == "auto" else self._algorithm
        # MPI would have to send half precision as float32.
        return "ring" if name == "library" and buffer.flat.element_size() < 4 else name

    def _error(self, shard: BucketShard) -> HpcsgdError:
        rank, name = locate_non_finite(shard, self._by_node)
        step = self._world.activity.step
        if name is None:
            return HpcsgdError(
                f"{self._compressor} cannot represent the {self._kind}s of {shard.bucket} at step {step}",
                rank=rank,
                expected="finite values, also with the error-feedback residual added and after a rotation",
                got=f"finite {self._kind}s that overflow (inf or NaN) with the residual or by the rotation",
                do="lower the learning rate (--learning-rate), or clip the gradient (--clip)",
            )
        return non_finite_error(self._kind, name, rank, step)


def non_finite_error(kind: str, name: str, rank: int, step: int) -> HpcsgdError:
    """Return the error for NaN or infinity in a tensor that is to be compressed.

    Parameters
    ----------
    kind
        Meaning of the tensor, such as "gradient".
    name
        Name of its parameter.
    rank
        Global rank that holds the value.
    step
        The step.
    """
    return HpcsgdError(
        f"the {kind} of {name} is not finite at step {step}",
        rank=rank,
        expected="finite values",
        got="NaN or infinity",
        do="find its cause (a learning rate that is too high?); with GradScaler, or to skip such steps on "
        "all ranks, use nonfinite='skip'",
    )


def _bytes(tensor: Tensor) -> Any:
    return tensor.view(torch.uint8).numpy()


def _unsigned(tensor: Tensor) -> Any:
    return tensor.view({2: torch.uint16, 4: torch.uint32}[tensor.element_size()]).numpy()
