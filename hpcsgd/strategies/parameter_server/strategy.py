"""PS/MPI: groups of workers with all-reduce inside, and parameter servers between the groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpcsgd.collectives import broadcast
from hpcsgd.compress import spec_of
from hpcsgd.compress.point_to_point import check_stateless
from hpcsgd.errors import BadOption
from hpcsgd.registry.limits import Count, ElasticAlpha, Natural, ServerMode, Timeout
from hpcsgd.server import Policy
from hpcsgd.server.update_rules import describe_optimizer
from hpcsgd.strategies.allreduce import AllReduce
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.strategies.parameter_server.connect import MPIConnector, group_name, make_connectors
from hpcsgd.strategies.parameter_server.server_rank import ServerRole
from hpcsgd.strategies.parameter_server.worker import ElasticWorker, GradientWorker, GroupConfig, Worker
from hpcsgd.tensors.group import TensorGroup
from hpcsgd.tensors.parameters import grouped_by_memory


@dataclass(eq=False, repr=False)
class ParameterServer(Strategy):
    """Parameter servers between groups of workers, with all-reduce inside groups (arXiv 1801.03855).

    From the paper (Mamidala, Kollias, Ward, Artico): groups are MPI communicators, each a client of the
    servers; groups of one worker make a pure parameter server, and no servers pure MPI. The elastic rule is
    that of EASGD (arXiv 1412.6651). Our reading: buckets are the shards; the ranks of a group's first node
    share the traffic with the servers; leases and dropped pushes, see `hpcsgd.server`.

    The last `servers` ranks of the job are servers; the others are divided into groups of consecutive ranks.
    In modes "sync" and "async" the servers take the optimizer's steps, so it must be an elementwise one of
    `torch.optim`; in mode "elastic" each group has its own optimizer. The steps of the run are the steps of
    all groups divided by their number. When the run is closed all ranks have the servers' model.

    `Run(compress=...)` compresses the all-reduce inside groups of several ranks, and the messages between
    groups and servers (see `hpcsgd.server.delta_coding`); the latter with every scheme except PowerSGD.

    Parameters
    ----------
    mode
        "sync" (default): one step with the mean gradient of all groups (AR-SGD). "async": a step with the
        gradient of each group, as it arrives. "elastic": elastic averaging of a group's model and the
        servers', after every `interval` steps of the group.
    servers
        Number of ranks that serve; 0: none. Default 1. A single rank trains alone.
    groups
        Number of groups, of sizes that differ by at most 1; default: one for each worker.
    interval
        Mode "elastic": steps between two exchanges. Default 8.
    alpha
        Mode "elastic": fraction of the distance between a group's model and the servers' by which both move
        towards each other, in (0, 1). Default: 0.9 divided by the number of groups.
    max_staleness
        Number of exchanges that a group may be ahead of the slowest; 0: all groups exchange at the same time.
        Default None: any number.
    lease
        Seconds without a message after which a group is no longer awaited, until its next one. Default 10.
    connect
        File of `hpcsgd serve --listen FILE`: this job is one group, and another job has the servers, which
        set the options of servers. Default "": the servers are ranks of this job.
    """

    title = "a parameter server"
    accepts_compression = True

    mode: ServerMode = "sync"
    servers: Natural = 1
    groups: Count | None = None
    interval: Count = 8
    alpha: ElasticAlpha | None = None
    max_staleness: Natural | None = None
    lease: Timeout = 10.0
    connect: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.servers == 0 and self.mode != "sync" and not self.connect:
            raise BadOption(
                f"mode {self.mode} needs a server",
                got="servers=0, which is pure MPI",
                do="use servers=1 or mode=sync",
            )
        self.interval = self.interval if self.mode == "elastic" else 1
        self.synchronous = self.servers == 0 and not self.connect

    def workers(self, ranks: int) -> int:
        return ranks if self._is_pure_mpi(ranks) or self.connect else max(1, ranks - self.servers)

    def _is_pure_mpi(self, ranks: int) -> bool:
        return not self.connect and (self.servers == 0 or ranks == 1)

    def attach(self, context: StrategyContext) -> None:
        super().attach(context)
        world = context.world
        self.synchronous = self._is_pure_mpi(world.size)
        # Groups with an interval exchange also at the end of each loop, and other jobs join at any time.
        in_turns = self._groups_are_synchronous() and self.interval == 1 and not self.connect
        self.deterministic = self.synchronous or in_turns
        self._group_world = world
        if self.synchronous:
            self._role: AllReduce | Worker | ServerRole = AllReduce()
            self._role.attach(context)
            self.averages_gradients = self.accepts_weights = True
            return
        # These checks have the same result on all ranks.
        for same in grouped_by_memory(self._trainable()):
            if len(same) > 1:
                raise BadOption(
                    f"parameters {same[0][0]} and {same[1][0]} are the same memory, which servers have not",
                    do="make them one parameter: second.weight = first.weight, before the optimizer is made",
                    everywhere=True,
                )
        if self.mode != "elastic":
            assert context.optimizer is not None
            describe_optimizer(context.optimizer)
        if context.compress is not None:
            check_stateless(context.compress)
            spec_of(context.compress)
        self._role = self._connect_to_servers() if self.connect else self._make_job_role()
        self._role.attach(context.on(self._group_world))

    def _connect_to_servers(self) -> Worker:
        world = self.context.world
        connectors = make_connectors(Path(self.connect), world)
        return self._make_worker(connectors, group_name(world, self.context.seed), 0, 0)

    def _make_job_role(self) -> Worker | ServerRole:
        """Make this rank's role: a server, or a worker of a group."""
        world = self.context.world
        workers = world.size - self.servers
        groups = workers if self.groups is None else self.groups
        if workers < 1 or groups > workers:
            raise BadOption(
                "too few ranks for servers and groups",
                expected=f"at least {self.servers + (self.groups or 1)} ranks",
                got=f"{world.size} ranks, {self.servers} servers"
                + ("" if self.groups is None else f", {groups} groups"),
                do="start more ranks, or lower servers or groups",
                everywhere=True,
            )
        policy = Policy(self.mode, self.alpha, self.max_staleness, self.lease)
        is_server = world.rank >= workers
        group = groups if is_server else world.rank * groups // workers
        self._group_world = world.split(group)
        communicator = world.control.dup("parameter server")
        number = communicator.next_id()
        are_gateways = world.gather(not is_server and self._group_world.node == 0)
        if is_server:
            gateways = [rank for rank, is_gateway in enumerate(are_gateways) if is_gateway]
            index = world.rank - workers
            count = self.servers
            return ServerRole(self.context, policy, index, count, communicator, number, gateways, groups)
        servers = range(workers, world.size)
        connectors = [MPIConnector(communicator, rank, number, world.traffic) for rank in servers]
        name = f"group {group:0{len(str(groups - 1))}d}"
        return self._make_worker(list(connectors), name, group, groups)

    def _groups_are_synchronous(self) -> bool:
        return self.mode == "sync" or self.max_staleness == 0

    def _make_worker(self, connectors: list[Any], name: str, number: int, groups: int) -> Worker:
        synchronous = self._groups_are_synchronous()
        config = GroupConfig(
            self.context, connectors, name, number, groups, self.mode, self.interval, synchronous
        )
        return ElasticWorker(config) if self.mode == "elastic" else GradientWorker(config)

    # Delegated to the role.

    def check_memory(self, *, in_update: bool = False) -> None:
        self._role.check_memory(in_update=in_update)

    def taken_in(self) -> AbstractContextManager[None]:
        return self._role.taken_in()

    def peer_schedule(self, end: int) -> Iterator[int]:
        return self._role.peer_schedule(end)

    def disconnect(self) -> None:
        super().disconnect()
        if hasattr(self, "_role"):
            self._role.disconnect()

    def accumulate(self) -> AbstractContextManager[None]:
        return self._role.accumulate()

    def synchronize(self, weight: float | None = None) -> None:
        self._role.synchronize(weight)

    def complete_gradients(self) -> bool:
        return self._role.complete_gradients()

    def restart(self) -> bool:
        return self._role.restart()

    def has_equal_models(self) -> bool:
        return self._role.has_equal_models()

    def step(self, update: Callable[[], None]) -> None:
        self._role.step(update)

    def metrics(self) -> dict[str, Any]:
        return self._role.metrics()

    def state_dict(self) -> dict[str, Any]:
        return self._role.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._role.load_state_dict(state)

    # The servers' model, on all ranks of the run.

    def averaged(self) -> AbstractContextManager[None]:
        if self.synchronous:
            return self._role.averaged()
        if self.connect and isinstance(self._role, Worker):
            return self._role.server_model()
        return self._averaged()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        trained = self._trainable()
        values = [p.detach().clone() for _, p in trained]
        self._load_server_model()
        try:
            yield
        finally:
            for (_, p), value in zip(trained, values, strict=True):
                p.data.copy_(value)

    @torch.no_grad()
    def _load_server_model(self) -> None:
        """Load the servers' model; collective."""
        trained, world = self._trainable(), self.context.world
        model = TensorGroup(world, list(reversed(trained)), self.context.bucket_mib)
        for bucket in model:
            values = self._role.values(bucket.index) if isinstance(self._role, ServerRole) else None
            if values is not None:
                bucket.flat.copy_(values)
            broadcast(bucket, world.size - self.servers + bucket.index % self.servers)
        for name, p in trained:
            p.data.copy_(model.views[name])

    def _trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.context.parameters if p.requires_grad]

    def consensus_distance(self) -> float:
        """Root mean square over workers of the distance of their models from the servers' model."""
        if self.synchronous:
            return 0.0
        local_values = [p.detach().clone() for _, p in self._trainable()]
        with self.averaged():
            pairs = zip(local_values, self._trainable(), strict=True)
            squared = sum(float((a - p.detach()).double().square().sum()) for a, (_, p) in pairs)
        squares = self.context.world.gather(squared)[: self.workers(self.context.world.size)]
        return math.sqrt(sum(squares) / len(squares))

    def detach(self) -> None:
        if not self.synchronous:
            with self.averaged():
                last = [p.detach().clone() for _, p in self._trainable()]
        self._role.detach()
        if not self.synchronous:
            for (_, p), value in zip(self._trainable(), last, strict=True):
                p.data.copy_(value)
        if self._group_world is not self.context.world:
            self._group_world.close()
