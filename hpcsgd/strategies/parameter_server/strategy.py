"""PS/MPI: groups of workers that all-reduce inside, and parameter servers between them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from hpcsgd.collectives import broadcast
from hpcsgd.collectives.peers import Peers
from hpcsgd.compress import spec_of
from hpcsgd.compress.point_to_point import check
from hpcsgd.errors import BadOption, unknown
from hpcsgd.server import Policy
from hpcsgd.server.update_rules import describe
from hpcsgd.strategies.allreduce import AllReduce
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import Setting
from hpcsgd.strategies.parameter_server.connect import RankDial, dials, group_name
from hpcsgd.strategies.parameter_server.server_rank import Serving
from hpcsgd.strategies.parameter_server.worker import Descending, Drawn, Place, Worker
from hpcsgd.tensors.group import TensorGroup

_MODES = ("sync", "async", "elastic")


class ParameterServer(Strategy):
    """Groups of workers that average inside by all-reduce, and servers between them (arXiv 1801.03855).

    From the paper (Mamidala, Kollias, Ward, Artico): groups are MPI communicators, each a client of the
    servers; with one worker a group this is a pure parameter server, with no server pure MPI. The elastic
    rule is EASGD's (arXiv 1412.6651). Our reading: buckets are the shards; ranks of a group's first node
    share the talking to the servers; what may be lost in time, and who is waited for, see `hpcsgd.server`.

    The last `servers` ranks of the job are servers; the others are divided in groups of neighbours. With
    "sync" and "async" the optimizer's step is taken by the servers, which must know the optimizer (of
    `torch.optim`, element by element); with "elastic" each group has its own. Steps are those of all groups
    divided by their number. When the run is closed all models are that of the servers.

    `Run(compress=...)` compresses the all-reduce inside groups of several ranks, and what groups and servers
    send to each other, see `hpcsgd.server.delta_coding`; for the latter every scheme but PowerSGD.

    Parameters
    ----------
    mode
        "sync" (default): one step with the mean gradient of all groups: AR-SGD. "async": one with the
        gradient of each group, at once. "elastic": the model of a group and that of the servers draw each
        other near after every `interval` steps of the group.
    servers
        Ranks that serve; 0: none. Default 1. A single rank trains alone.
    groups
        How many, as equal as possible; default: every worker is one.
    interval
        Of mode "elastic": steps between two exchanges. Default 8.
    alpha
        Of mode "elastic": by which share of their distance; default 0.9 divided by the number of groups.
    max_staleness
        How many exchanges a group may be ahead of the slowest; 0: all exchange together. None (default): any.
    lease
        Seconds after which a group that is not heard is not waited for, until it is heard again. Default 10.
    connect
        The file of `hpcsgd serve --listen FILE`: this job is one group, whose servers are another job. Mode
        and other options of the servers are theirs. Empty (default): servers are ranks of this job.
    """

    def __init__(
        self,
        mode: Literal["sync", "async", "elastic"] = "sync",
        servers: int = 1,
        groups: int | None = None,
        interval: int = 8,
        alpha: float | None = None,
        max_staleness: int | None = None,
        lease: float = 10.0,
        connect: str = "",
    ) -> None:
        if mode not in _MODES:
            raise unknown("mode of a parameter server", mode, _MODES)
        _check("servers", servers, servers >= 0, "at least 0")
        _check("groups", groups, groups is None or groups >= 1, "at least 1")
        _check("interval", interval, interval >= 1, "at least 1 step")
        _check("alpha", alpha, alpha is None or 0 < alpha < 1, "above 0 and below 1")
        _check("max_staleness", max_staleness, max_staleness is None or max_staleness >= 0, "at least 0")
        _check("lease", lease, 0 < lease < math.inf, "seconds, above 0")
        if servers == 0 and mode != "sync" and not connect:
            raise BadOption(
                f"mode {mode} needs a server",
                got="servers=0, which is pure MPI",
                do="use servers=1, or mode=sync",
            )
        self.mode, self.servers, self.groups, self.connect = mode, servers, groups, connect
        self.interval = interval if mode == "elastic" else 1
        self.alpha, self.max_staleness, self.lease = alpha, max_staleness, lease
        self.lockstep = servers == 0 and not connect

    def options(self) -> dict[str, object]:
        names = ("mode", "servers", "groups", "interval", "alpha", "max_staleness", "lease", "connect")
        return {name: getattr(self, name) for name in names}

    def workers(self, ranks: int) -> int:
        return ranks if self._alone(ranks) or self.connect else max(1, ranks - self.servers)

    def _alone(self, ranks: int) -> bool:
        return not self.connect and (self.servers == 0 or ranks == 1)

    def attach(self, setting: Setting) -> None:
        setting.refuse("a parameter server", virtual_nodes=True)
        super().attach(setting)
        world = setting.world
        self.lockstep = self._alone(world.size)
        self._part = world
        if self.lockstep:
            self._role: AllReduce | Worker | Serving = AllReduce()
            self._role.attach(setting)
            return
        # These raise on all ranks alike.
        if self.mode != "elastic":
            assert setting.optimizer is not None
            describe(setting.optimizer)
        if setting.compress is not None:
            check(setting.compress)
            spec_of(setting.compress)
        self._role = self._connected() if self.connect else self._in_job()
        part = copy.copy(setting)
        part.world, part.peers = self._part, Peers(self._part)
        part.begin_step()
        self._role.attach(part)

    def _connected(self) -> Worker:
        world = self.setting.world
        found = dials(Path(self.connect), world)
        return self._worker(found, group_name(world), 0)

    def _in_job(self) -> Worker | Serving:
        """Take this rank's part, as a server or in a group."""
        world = self.setting.world
        workers = world.size - self.servers
        groups = workers if self.groups is None else self.groups
        if workers < 1 or groups > workers:
            raise BadOption(
                "too few ranks for servers and groups",
                expected=f"at least {self.servers + (self.groups or 1)} ranks",
                got=f"{world.size} ranks, {self.servers} servers"
                + ("" if self.groups is None else f", {groups} groups"),
                do="start more ranks, or set servers and groups",
                everywhere=True,
            )
        policy = Policy(self.mode, self.alpha, self.max_staleness, self.lease)
        serving = world.rank >= workers
        group = groups if serving else world.rank * groups // workers
        self._part = world.split(group)
        net = world.control.twin(1)
        talks = world.gather(not serving and self._part.node == 0)
        if serving:
            talkers = [rank for rank, talk in enumerate(talks) if talk]
            index = world.rank - workers
            return Serving(self.setting, policy, index, self.servers, net, talkers, groups)
        dials = [RankDial(net, rank, world.traffic) for rank in range(workers, world.size)]
        name = f"group {group:0{len(str(groups - 1))}d}"
        return self._worker(list(dials), name, groups)

    def _worker(self, dials: list[Any], name: str, groups: int) -> Worker:
        together = self.mode == "sync" or self.max_staleness == 0
        place = Place(self.setting, dials, name, groups, self.mode, self.interval, together)
        return Drawn(place) if self.mode == "elastic" else Descending(place)

    # What the role does.

    def turns(self, end: int) -> Iterator[int]:
        return self._role.turns(end)

    def accumulate(self) -> AbstractContextManager[None]:
        return self._role.accumulate()

    def synchronize(self) -> None:
        self._role.synchronize()

    def step(self, update: Callable[[], None]) -> None:
        self._role.step(update)

    def figures(self) -> dict[str, Any]:
        return self._role.figures()

    def state_dict(self) -> dict[str, Any]:
        return self._role.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._role.load_state_dict(state)

    # The servers' model, on all ranks of the run.

    def averaged(self) -> AbstractContextManager[None]:
        if self.lockstep:
            return self._role.averaged()
        return self._role.pulled() if self.connect and isinstance(self._role, Worker) else self._averaged()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        trained = self._trained()
        own = [p.detach().clone() for _, p in trained]
        self._show()
        try:
            yield
        finally:
            for (_, p), value in zip(trained, own, strict=True):
                p.data.copy_(value)

    @torch.no_grad()
    def _show(self) -> None:
        """Put the servers' model in place."""
        trained, world = self._trained(), self.setting.world
        values = TensorGroup(world, list(reversed(trained)), self.setting.bucket_mib)
        for bucket in values:
            kept = self._role.values(bucket.index) if isinstance(self._role, Serving) else None
            if kept is not None:
                bucket.flat.copy_(kept)
            broadcast(bucket, world.size - self.servers + bucket.index % self.servers)
        for name, p in trained:
            p.data.copy_(values.views[name])

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.setting.parameters if p.requires_grad]

    def consensus_distance(self) -> float:
        """Root mean square over workers of the distance of their models from that of the servers."""
        if self.lockstep:
            return 0.0
        own = [p.detach().clone() for _, p in self._trained()]
        with self.averaged():
            pairs = zip(own, self._trained(), strict=True)
            squared = sum(float((a - p.detach()).double().square().sum()) for a, (_, p) in pairs)
        told = self.setting.world.gather(squared)[: self.workers(self.setting.world.size)]
        return math.sqrt(sum(told) / len(told))

    def detach(self) -> None:
        if not self.lockstep:
            with self.averaged():
                last = [p.detach().clone() for _, p in self._trained()]
        self._role.detach()
        if not self.lockstep:
            for (_, p), value in zip(self._trained(), last, strict=True):
                p.data.copy_(value)
        if self._part is not self.setting.world:
            self._part.close()


def _check(name: str, value: object, good: bool, expected: str) -> None:
    if not good:
        raise BadOption(f"{name} of a parameter server", expected=expected, got=value)
