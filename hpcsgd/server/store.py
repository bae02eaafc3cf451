"""Key-value store on parameter servers: push and pull of tensor groups by the ranks of one group.

The buckets of all keys, in their order, are the shards. Shard i is on server i % servers. The ranks of the
group's first node are its gateways, the only ones with connections to the servers: gateway
(i // servers) % gateways pushes and pulls shard i. Pulled values are broadcast to the rest of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from hpcsgd.collectives import ibroadcast
from hpcsgd.collectives.staging import after_compute
from hpcsgd.compress import spec_of
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.tasks import Steps, Wait, Work
from hpcsgd.mpi.world import World
from hpcsgd.server.connection import Connection, Connector, Request
from hpcsgd.server.delta_coding import ClientDeltaCodec, CodingConfig, shard_codec
from hpcsgd.server.protocol import Header, MessageType, ReplyStatus
from hpcsgd.tensors.group import Bucket, TensorGroup

Options = Sequence[Mapping[str, Any]]


class Store:
    """Keys and their values on the servers; its methods are collective over the group.

    Each method starts an operation and returns its `Work`, which is done when all buckets are. Each key may
    have one operation at a time.

    Parameters
    ----------
    world
        Ranks of this group.
    connectors
        One for each server.
    name
        Name of this group, unique among the groups.
    keys
        By key: a tensor group with the layout of the values.
    contract
        Settings that must be equal in all groups, by name.
    options
        Options of the optimizer, for each of its parameter groups. Default: none.
    segments
        Returns the segments (start, stop, parameter group) of a bucket. Default: none.
    hello_fields
        Further fields of the hello message.
    coding
        Compression of pushes and replies; None (default): none.

    Attributes
    ----------
    late
        Number of this rank's pushes that the servers have dropped as too late.
    granted, steps_begun
        Steps that were granted to the last request, and steps begun by all groups; on the leader.
    """

    def __init__(
        self,
        world: World,
        connectors: Sequence[Connector],
        name: str,
        keys: Mapping[str, TensorGroup],
        contract: Mapping[str, Any],
        options: Options = (),
        segments: Callable[[Bucket], list[tuple[int, int, int]]] = lambda bucket: [],
        hello_fields: Mapping[str, Any] | None = None,
        coding: CodingConfig | None = None,
    ) -> None:
        world.progress.require_thread_multiple("pushes to a server are sent by the communication thread")
        self._world = world
        starts = np.cumsum([0, *map(len, keys.values())]).tolist()
        self._first_index: dict[str, int] = dict(zip(keys, starts, strict=False))
        self._gateways = [rank for rank, node in enumerate(world.gather(world.node)) if node == 0]
        self._push_numbers, self._versions = [0] * starts[-1], [0] * starts[-1]
        self._options = [dict(group) for group in options]
        self._requests: dict[int, Request] = {}
        buckets = [bucket for group in keys.values() for bucket in group]
        shards = [
            (str(bucket.flat.dtype).removeprefix("torch."), bucket.numel, segments(bucket))
            for bucket in buckets
        ]
        self._hello_fields = dict(hello_fields or {})
        shard_fields = {"servers": len(connectors), "keys": list(keys), "shards": shards, "compress": None}
        self._contract = {**contract, **shard_fields}
        self._codecs: dict[int, ClientDeltaCodec] = {}
        if coding is not None:
            self._compress(coding, buckets)
        self.late = self.granted = self.steps_begun = 0
        self._connections = self._connect(connectors, name) if world.rank in self._gateways else []
        self._services = [world.progress.serve(connection.serve()) for connection in self._connections]

    def _compress(self, coding: CodingConfig, buckets: Sequence[Bucket]) -> None:
        tensors = [[bucket.extent(view) for view in bucket.views] for bucket in buckets]
        self._contract["compress"] = {"scheme": spec_of(coding.compressor), "tensors": tensors}
        total = sum(bucket.numel for bucket in buckets)
        for index, bucket in enumerate(buckets):
            if self._is_gateway_of(index):
                codec = shard_codec(coding.compressor, bucket.flat.dtype, bucket.numel, total, tensors[index])
                if codec is not None:
                    self._codecs[index] = ClientDeltaCodec(codec, index, coding)

    @property
    def leader(self) -> int:
        """Rank of the group that requests steps."""
        return self._gateways[0]

    def _connect(self, connectors: Sequence[Connector], name: str) -> list[Connection]:
        gateway = self._gateways.index(self._world.rank)

        def hello() -> dict[str, Any]:
            client = f"{name}.{gateway}" if gateway else name
            identity = {"client": client, "talker": gateway, "talkers": len(self._gateways)}
            return {**self._hello_fields, **identity, "contract": self._contract, "options": self._options}

        timeout = self._world.timeout
        return [Connection(connector, hello, timeout) for connector in connectors]

    # Values.

    def init(self, key: str, group: TensorGroup) -> Work:
        """Start to pull the values, or to initialize the servers with the group's if they have none."""
        return self._submit_each(key, "init", group, self._fetch_or_initialize)

    def pull(self, key: str, group: TensorGroup, join: bool = False) -> Work:
        """Start to pull the values of a key that has been initialized.

        Parameters
        ----------
        key, group
            Key, and the group to which its values are written.
        join
            Whether the servers await pushes of this group from now on. Default False.
        """
        return self._submit_each(
            key, "pull", group, lambda bucket, index: self._fetch(bucket, index, MessageType.PULL, join)
        )

    def push(self, key: str, group: TensorGroup, weight: float = 1.0) -> Work:
        """Start to push a group, which must stay unchanged until the work is done, without pulling.

        Parameters
        ----------
        key, group
            Key, and the gradients or (elastic) model that are pushed.
        weight
            Number of gradients whose mean is pushed. Default 1.
        """
        self._submit_pushes(key, group, None, weight, 0)
        return self._world.progress.submit(f"push of {key}", lambda: self._await_replies(key, group))

    def pushpull(
        self, key: str, group: TensorGroup, into: TensorGroup, weight: float = 1.0, steps: int = 0
    ) -> Work:
        """Start to push a group and to pull the reply: new values, or (elastic) the difference to subtract.

        Parameters
        ----------
        key, group, weight
            As for `push`.
        into
            Group of the same layout, to which the reply is written.
        steps
            Number of steps that this group requests, see `granted`. Default 0: none.
        """
        self._submit_pushes(key, group, into, weight, steps)
        return self._submit_each(key, "pushpull", into, self._finish_push)

    def _submit_each(
        self, key: str, what: str, group: TensorGroup, job: Callable[[Bucket, int], object]
    ) -> Work:
        """Submit a job for each bucket on its gateway, and the broadcast of its result to the group."""
        progress, work = self._world.progress, None
        for bucket in group:
            index = self._first_index[key] + bucket.index
            if self._is_gateway_of(index):
                name = f"{what} of {key}, bucket {bucket.index} at step {self._world.activity.step}"
                work = progress.submit(name, after_compute(bucket.flat.device, partial(job, bucket, index)))
            if self._world.size > 1:
                work = ibroadcast(bucket, self._gateway_of(index))
        return work or progress.submit(f"{what} of nothing", lambda: None)

    def _gateway_of(self, index: int) -> int:
        return self._gateways[index // self._servers % len(self._gateways)]

    def _is_gateway_of(self, index: int) -> bool:
        return self._gateway_of(index) == self._world.rank

    @property
    def _servers(self) -> int:
        return int(self._contract["servers"])

    def _connection(self, index: int) -> Connection:
        return self._connections[index % self._servers]

    # In the communication thread of the shard's gateway.

    def _submit_pushes(
        self, key: str, group: TensorGroup, into: TensorGroup | None, weight: float, steps: int
    ) -> None:
        for bucket in group:
            index = self._first_index[key] + bucket.index
            if self._is_gateway_of(index):
                target = None if into is None else into.buckets[bucket.index]
                job = lambda b=bucket, t=target, i=index: self._send_push(b, t, i, weight, steps)  # noqa: E731
                name = f"push of {key}, bucket {bucket.index} at step {self._world.activity.step}"
                self._world.progress.submit(name, after_compute(bucket.flat.device, job))

    def _send_push(self, bucket: Bucket, into: Bucket | None, index: int, weight: float, steps: int) -> None:
        _to_host(bucket)
        self._push_numbers[index] += 1
        header = Header(
            MessageType.PUSH if into is None else MessageType.PUSHPULL,
            index,
            push_number=self._push_numbers[index],
            version=self._versions[index],
            weight=weight,
            steps=steps if index == 0 else 0,
            nbytes=bucket.nbytes,
        )
        request = Request(header, _bytes(bucket), None if into is None else _bytes(into))
        if index in self._codecs:
            request = self._codecs[index].encode_push(request, bucket.host)
            self._world.traffic.count(saved=bucket.nbytes)
        self._send(request)

    def _send(self, request: Request) -> None:
        index = request.header.shard
        self._requests[index] = request
        if index in self._codecs:
            self._world.traffic.count(saved=-request.header.nbytes)
        self._connection(index).send_request(request)

    def _continue_pushes(self) -> None:
        """Send the next requests of pushes that need several."""
        for index, request in list(self._requests.items()):
            if request.done and index in self._codecs:
                next_request = self._codecs[index].next_request(request)
                if next_request is not None:
                    self._send(next_request)

    def _finish_push(self, bucket: Bucket, index: int) -> Steps[None]:
        yield from self._await_reply(index, bucket)
        _to_device(bucket)
        bucket.clear_gaps(slice(0, bucket.numel))

    def _await_reply(self, index: int, bucket: Bucket) -> Steps[None]:
        """Wait for the last reply to a push; its values go to the bucket."""

        def is_done() -> bool:
            self._continue_pushes()
            return self._requests[index].done

        yield _reply(is_done, f"the reply to a push of {bucket}")
        reply = self._record_reply(self._requests.pop(index))
        if index in self._codecs:
            self._codecs[index].decode_reply(reply, bucket.host)

    def _await_replies(self, key: str, group: TensorGroup) -> Steps[None]:
        for bucket in group:
            index = self._first_index[key] + bucket.index
            if self._is_gateway_of(index):
                yield from self._await_reply(index, bucket)

    def _fetch_or_initialize(self, bucket: Bucket, index: int) -> Steps[None]:
        status = yield from self._fetch(bucket, index, MessageType.PULL)
        if status is ReplyStatus.NO_VALUES:
            _to_host(bucket)
            yield from self._fetch(bucket, index, MessageType.INIT)

    def _fetch(
        self, bucket: Bucket, index: int, message_type: MessageType, join: bool = False
    ) -> Steps[ReplyStatus]:
        values = _bytes(bucket)
        # The source must stay unchanged until all of it has arrived, even over several links.
        source = values.copy() if message_type is MessageType.INIT else None
        header = Header(
            message_type, index, steps=int(join), nbytes=bucket.nbytes if source is not None else 0
        )
        request = Request(header, source, values)
        self._connection(index).send_request(request)
        reply = yield from self._wait_for(request, f"the {message_type.name.lower()} of {bucket}")
        status = reply.status
        if status is not ReplyStatus.NO_VALUES:
            _to_device(bucket)
        return status

    def _wait_for(self, request: Request, what: str) -> Steps[Header]:
        yield _reply(lambda: request.done, what)
        return self._record_reply(request)

    def _record_reply(self, request: Request) -> Header:
        reply = request.reply
        assert reply is not None
        if reply.nbytes:
            self._versions[request.header.shard] = reply.version
        self.late += reply.status is ReplyStatus.LATE
        if request.header.steps:
            self.granted, self.steps_begun = reply.steps, reply.steps_begun
        return reply

    # Control messages.

    def request_steps(self, steps: int) -> Work:
        """Start to request a quota of steps, see `granted`."""

        def send_claim() -> Steps[None]:
            if self._world.rank == self.leader:
                request = Request(Header(MessageType.CLAIM, steps=steps))
                self._connections[0].send_request(request)
                yield from self._wait_for(request, "the grant of steps")

        return self._world.progress.submit("request for steps", send_claim)

    def set_options(self, options: Options) -> None:
        """Set the options of the optimizer for the following pushes."""
        new = [dict(group) for group in options]
        if new == self._options:
            return
        self._options = new
        for connection in self._connections:
            connection.notify_json(MessageType.OPTIONS, {"options": new})

    def pause(self) -> None:
        """Announce that no push follows until the next one."""
        for connection in self._connections:
            connection.notify(Header(MessageType.PAUSE))

    def close(self) -> None:
        """Close the sessions; collective. Servers that cannot be reached are not waited for."""
        progress = self._world.progress
        for connection in self._connections:
            connection.start_close()
        are_closed = Wait(lambda: all(connection.closed for connection in self._connections))
        progress.run("the closing of server sessions", lambda: (yield are_closed))
        for service in self._services:
            progress.stop_serving(service)
        self._connections = []

    def abandon(self) -> None:
        """Stop without a message to the servers, after the run was dropped or left; local."""
        for connection in self._connections:
            connection.abandon()

    def state_dict(self) -> dict[str, Any]:
        """State of this rank; the servers' state is not included."""
        codes = {index: codec.state_dict() for index, codec in self._codecs.items()}
        return {"rounds": list(self._push_numbers), "versions": list(self._versions), "codes": codes}

    def load_state_dict(self, state: dict[str, Any], with_servers: bool = True) -> None:
        """Restore a state of `state_dict`; if the servers' state is not restored, only the residuals.

        Raises
        ------
        HpcsgdError
            If the state belongs to another compression.
        """
        if state["codes"].keys() != self._codecs.keys():
            raise HpcsgdError(
                "the checkpoint was written with another compression",
                rank=self._world.global_rank,
                expected=f"compressed shards {sorted(self._codecs)}",
                got=f"compressed shards {sorted(state['codes'])}",
                do="resume with the compression (--compress) and bucket size (--bucket-mib) of "
                "the run that wrote the checkpoint",
            )
        if with_servers:
            self._push_numbers, self._versions = list(state["rounds"]), list(state["versions"])
        for index, codec in self._codecs.items():
            codec.load_state_dict(state["codes"][index], with_servers)


def _reply(done: Callable[[], bool], what: str) -> Wait:
    advice = "see the output of the servers, and of the other groups, which mode sync awaits"
    return Wait(done, None, f"{what} (the server has not replied)", advice)


def _bytes(bucket: Bucket) -> np.ndarray:
    values: np.ndarray = bucket.host.view(torch.uint8).numpy()
    return values


def _to_host(bucket: Bucket) -> None:
    if bucket.staged:
        bucket.host.copy_(bucket.flat)


def _to_device(bucket: Bucket) -> None:
    if bucket.staged:
        bucket.flat.copy_(bucket.host)
