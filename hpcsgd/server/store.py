"""A group's way to the parameter servers: push and pull of tensor groups, by the ranks of its first node.

The buckets of all keys, in their order, are shards. Shard i is kept by server i % servers, and the ranks of
the group's first node share the talking: shard i is that of rank (i // servers) % ranks. All others of the
group get what was pulled by a broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hpcsgd.collectives import ibroadcast
from hpcsgd.collectives.staging import after_compute
from hpcsgd.compress import spec_of
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.progress import Work
from hpcsgd.mpi.world import World
from hpcsgd.server.connection import Connection, Dial, Request
from hpcsgd.server.delta_coding import ClientCodes, Coding, coder_of
from hpcsgd.server.protocol import Head, Kind, State
from hpcsgd.tensors.group import Bucket, TensorGroup

Options = Sequence[Mapping[str, Any]]


class Store:
    """Keys and their values, which are kept by servers; its methods are collective over the group.

    Each returns at once, and is over for all of its buckets when the `Work` is. One at a time for each key.

    Parameters
    ----------
    world
        The ranks of this group.
    dials
        How each server is reached.
    name
        Of this group; no other has it.
    keys
        For each key a tensor group with the layout of its values.
    contract
        What all groups must bring alike, by name.
    options
        Of the optimizer, for each of its groups of parameters.
    segments
        Of a bucket: (start, stop, group of parameters) of its stretches.
    about
        What else the servers are told of this group.
    coding
        How what is pushed and what is answered to it is compressed; None: not at all.

    Attributes
    ----------
    late
        How many pushes of this rank were of no use, for nobody had waited for them.
    granted, begun
        What the server has answered to the last request for steps; on the leader.
    """

    def __init__(
        self,
        world: World,
        dials: Sequence[Dial],
        name: str,
        keys: Mapping[str, TensorGroup],
        contract: Mapping[str, Any],
        options: Options = (),
        segments: Callable[[Bucket], list[tuple[int, int, int]]] = lambda bucket: [],
        about: Mapping[str, Any] | None = None,
        coding: Coding | None = None,
    ) -> None:
        world.progress.need_thread("pushes to a server need a thread of their own")
        self._world = world
        starts = np.cumsum([0, *map(len, keys.values())]).tolist()
        self._first: dict[str, int] = dict(zip(keys, starts, strict=False))
        self._talkers = [rank for rank, node in enumerate(world.gather(world.node)) if node == 0]
        self._rounds, self._versions = [0] * starts[-1], [0] * starts[-1]
        self._options = [dict(group) for group in options]
        self._requests: dict[int, Request] = {}
        buckets = [bucket for group in keys.values() for bucket in group]
        shards = [
            (str(bucket.flat.dtype).removeprefix("torch."), bucket.numel, segments(bucket))
            for bucket in buckets
        ]
        self._about = dict(about or {})
        own = {"servers": len(dials), "keys": list(keys), "shards": shards, "compress": None}
        self._contract = {**contract, **own}
        self._codes: dict[int, ClientCodes] = {}
        if coding is not None:
            self._compress(coding, buckets)
        self.late = self.granted = self.begun = 0
        self._connections = self._connect(dials, name) if world.rank in self._talkers else []

    def _compress(self, coding: Coding, buckets: Sequence[Bucket]) -> None:
        tensors = [[bucket.extent(view) for view in bucket.views] for bucket in buckets]
        self._contract["compress"] = {"scheme": spec_of(coding.compressor), "tensors": tensors}
        total = sum(bucket.numel for bucket in buckets)
        for index, bucket in enumerate(buckets):
            if self._talks(index):
                coder = coder_of(coding.compressor, bucket.flat.dtype, bucket.numel, total, tensors[index])
                if coder is not None:
                    self._codes[index] = ClientCodes(coder, index, coding)

    @property
    def leader(self) -> int:
        """The rank of the group that asks for steps."""
        return self._talkers[0]

    def _connect(self, dials: Sequence[Dial], name: str) -> list[Connection]:
        me = self._talkers.index(self._world.rank)

        def hello() -> dict[str, Any]:
            who = {"client": f"{name}.{me}" if me else name, "talker": me, "talkers": len(self._talkers)}
            return {**self._about, **who, "contract": self._contract, "options": self._options}

        patience = self._world.timeout
        connections = [Connection(dial, hello, patience) for dial in dials]
        for connection in connections:
            self._world.progress.serve(connection.pump)
        return connections

    # Values.

    def init(self, key: str, group: TensorGroup) -> Work:
        """Start to make the values those of the servers, or these those of the group if they have none."""
        return self._each(key, "init", group, self._fetch_or_fill)

    def pull(self, key: str, group: TensorGroup, begin: bool = False) -> Work:
        """Start to fetch the values; there are some.

        Parameters
        ----------
        key, group
            Which, and where they go.
        begin
            Whether the pushes of this group may be waited for from now on.
        """
        return self._each(
            key, "pull", group, lambda bucket, index: self._fetch(bucket, index, Kind.PULL, begin)
        )

    def push(self, key: str, group: TensorGroup, weight: float = 1.0) -> Work:
        """Start to push a group, which must stay unchanged until it is over; values are not fetched.

        Parameters
        ----------
        key, group
            Where and what: gradients or, of an elastic server, a model.
        weight
            Of how many gradients it is the mean.
        """
        self._start(key, group, None, weight, 0)
        return self._world.progress.submit(f"push of {key}", lambda: self._wait_for_all(key, group))

    def pushpull(
        self, key: str, group: TensorGroup, into: TensorGroup, weight: float = 1.0, steps: int = 0
    ) -> Work:
        """Start to push a group and to fetch what the server answers: the new values, or what to subtract.

        Parameters
        ----------
        key, group, weight
            As for `push`.
        into
            Where the answer goes: another group of the same layout.
        steps
            How many steps this group wants to take next, see `granted`; 0: nothing is asked.
        """
        self._start(key, group, into, weight, steps)
        return self._each(key, "pushpull", into, self._finish)

    def _each(self, key: str, what: str, group: TensorGroup, job: Callable[[Bucket, int], object]) -> Work:
        """Let who talks for a bucket do something about it, and tell the group; bucket by bucket."""
        progress, work = self._world.progress, None
        for bucket in group:
            index = self._first[key] + bucket.index
            if self._talks(index):
                name = f"{what} of {key}, bucket {bucket.index} at step {self._world.status.step}"
                work = progress.submit(name, after_compute(bucket.flat.device, _bound(job, bucket, index)))
            if self._world.size > 1:
                work = ibroadcast(bucket, self._talker(index))
        return work or progress.submit(f"{what} of nothing", lambda: None)

    def _talker(self, index: int) -> int:
        return self._talkers[index // self._servers % len(self._talkers)]

    def _talks(self, index: int) -> bool:
        return self._talker(index) == self._world.rank

    @property
    def _servers(self) -> int:
        return int(self._contract["servers"])

    def _connection(self, index: int) -> Connection:
        return self._connections[index % self._servers]

    # In the communication thread, of the rank that talks for the shard.

    def _start(
        self, key: str, group: TensorGroup, into: TensorGroup | None, weight: float, steps: int
    ) -> None:
        for bucket in group:
            index = self._first[key] + bucket.index
            if self._talks(index):
                target = None if into is None else into.buckets[bucket.index]
                job = lambda b=bucket, t=target, i=index: self._push(b, t, i, weight, steps)  # noqa: E731
                name = f"push of {key}, bucket {bucket.index} at step {self._world.status.step}"
                self._world.progress.submit(name, after_compute(bucket.flat.device, job))

    def _push(self, bucket: Bucket, into: Bucket | None, index: int, weight: float, steps: int) -> None:
        _to_host(bucket)
        self._rounds[index] += 1
        head = Head(
            Kind.PUSH if into is None else Kind.PUSHPULL,
            index,
            round=self._rounds[index],
            version=self._versions[index],
            weight=weight,
            steps=steps if index == 0 else 0,
            nbytes=bucket.nbytes,
        )
        request = Request(head, _bytes(bucket), None if into is None else _bytes(into))
        if index in self._codes:
            request = self._codes[index].begin(request, bucket.host)
            self._world.traffic.saved += bucket.nbytes
        self._ask(request)

    def _ask(self, request: Request) -> None:
        index = request.head.shard
        self._requests[index] = request
        if index in self._codes:
            self._world.traffic.saved -= request.head.nbytes
        self._connection(index).ask(request)

    def _follow_up(self) -> None:
        """Go on with the pushes whose answers were not the last."""
        for index, request in list(self._requests.items()):
            if request.done and index in self._codes:
                following = self._codes[index].follow(request)
                if following is not None:
                    self._ask(following)

    def _finish(self, bucket: Bucket, index: int) -> None:
        self._settle(index, bucket)
        _to_device(bucket)
        bucket.clear_gaps(slice(0, bucket.numel))

    def _settle(self, index: int, bucket: Bucket) -> None:
        """Wait for the last answer to a push, which goes to a bucket."""

        def over() -> bool:
            self._follow_up()
            return self._requests[index].done

        what = f"the answer to a push of {bucket} (the server has not answered)"
        self._world.waiter.until(over, what)
        answer = self._note(self._requests.pop(index))
        if index in self._codes:
            self._codes[index].hear(answer, bucket.host)

    def _wait_for_all(self, key: str, group: TensorGroup) -> None:
        for bucket in group:
            index = self._first[key] + bucket.index
            if self._talks(index):
                self._settle(index, bucket)

    def _fetch_or_fill(self, bucket: Bucket, index: int) -> None:
        if self._fetch(bucket, index, Kind.PULL) is State.EMPTY:
            _to_host(bucket)
            self._fetch(bucket, index, Kind.FILL)

    def _fetch(self, bucket: Bucket, index: int, kind: Kind, begin: bool = False) -> State:
        values = _bytes(bucket)
        # What is sent must not be overwritten before all of it has arrived, whatever breaks.
        source = values.copy() if kind is Kind.FILL else None
        head = Head(kind, index, steps=int(begin), nbytes=bucket.nbytes if source is not None else 0)
        request = Request(head, source, values)
        self._connection(index).ask(request)
        state = self._wait(request, f"the {kind.name.lower()} of {bucket}").state
        if state is not State.EMPTY:
            _to_device(bucket)
        return state

    def _wait(self, request: Request, what: str) -> Head:
        self._world.waiter.until(lambda: request.done, f"{what} (the server has not answered)")
        return self._note(request)

    def _note(self, request: Request) -> Head:
        answer = request.answer
        assert answer is not None
        if answer.nbytes:
            self._versions[request.head.shard] = answer.version
        self.late += answer.state is State.LATE
        if request.head.steps:
            self.granted, self.begun = answer.steps, answer.begun
        return answer

    # What is said besides.

    def claim(self, steps: int) -> Work:
        """Start to ask for so many steps, see `granted`."""

        def ask() -> None:
            if self._world.rank == self.leader:
                request = Request(Head(Kind.CLAIM, steps=steps))
                self._connections[0].ask(request)
                self._wait(request, "leave to take steps")

        return self._world.progress.submit("a claim of steps", ask)

    def tell_options(self, options: Options) -> None:
        """The optimizer's options have changed, for the pushes that follow."""
        found = [dict(group) for group in options]
        if found == self._options:
            return
        self._options = found
        for connection in self._connections:
            connection.tell_note(Kind.OPTIONS, {"options": found})

    def rest(self) -> None:
        """No push will come until further notice."""
        for connection in self._connections:
            connection.tell(Head(Kind.REST))

    def close(self) -> None:
        """Say goodbye; who is not heard within some seconds is left without one."""
        progress = self._world.progress
        for connection in self._connections:
            connection.say_goodbye()
        progress.run("goodbye to the servers", self._wait_until_closed)
        for connection in self._connections:
            progress.dismiss(connection.pump)
        self._connections = []

    def _wait_until_closed(self) -> None:
        self._world.waiter.until(lambda: all(c.closed for c in self._connections), "goodbye to the servers")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold, of this rank, beside what the servers hold."""
        codes = {index: codes.state_dict() for index, codes in self._codes.items()}
        return {"rounds": list(self._rounds), "versions": list(self._versions), "codes": codes}

    def load_state_dict(self, state: dict[str, Any], servers_too: bool = True) -> None:
        """Take back what `state_dict` gave; without the servers only what compression remembers.

        Raises
        ------
        HpcsgdError
            Where it is that of another compression.
        """
        if state["codes"].keys() != self._codes.keys():
            raise HpcsgdError(
                "the state is not one of this compression",
                rank=self._world.name,
                expected=f"codes of shards {sorted(self._codes)}",
                got=f"of {sorted(state['codes'])}",
                do="go on with the compression, and the bucket size, that the checkpoint was made with",
            )
        if servers_too:
            self._rounds, self._versions = list(state["rounds"]), list(state["versions"])
        for index, codes in self._codes.items():
            codes.load_state_dict(state["codes"][index], servers_too)


def _bound(job: Callable[[Bucket, int], object], bucket: Bucket, index: int) -> Callable[[], None]:
    def run() -> None:
        job(bucket, index)

    return run


def _bytes(bucket: Bucket) -> np.ndarray:
    values: np.ndarray = bucket.host.view(torch.uint8).numpy()
    return values


def _to_host(bucket: Bucket) -> None:
    if bucket.host is not bucket.flat:
        bucket.host.copy_(bucket.flat)


def _to_device(bucket: Bucket) -> None:
    if bucket.host is not bucket.flat:
        bucket.flat.copy_(bucket.host)
