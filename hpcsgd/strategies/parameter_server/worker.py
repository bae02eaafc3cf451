"""Roles of a worker of a group that exchanges gradients or models with parameter servers."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch

from hpcsgd.collectives import broadcast
from hpcsgd.collectives.compressed import non_finite_error
from hpcsgd.server.connection import Connector
from hpcsgd.server.delta_coding import CodingConfig
from hpcsgd.server.metrics import server_metrics
from hpcsgd.server.store import Store
from hpcsgd.server.update_rules import describe_optimizer
from hpcsgd.strategies.allreduce import AllReduce
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.tensors.fingerprint import describe_tensor, package_versions
from hpcsgd.tensors.group import Bucket, TensorGroup
from hpcsgd.tensors.parameters import Parameters


class GroupConfig(NamedTuple):
    """Configuration of a group of workers."""

    run: StrategyContext  # context of the whole run, which counts the steps of all groups
    connectors: list[Connector]  # one for each server
    name: str
    number: int  # its number in the job, from 0; in a job of its own the seed distinguishes it from others
    groups: int  # number of groups that share the steps of the run; 0: this group takes all of them
    mode: str  # "sync", "async" or "elastic"
    interval: int  # steps between two exchanges with the servers
    synchronous: bool  # whether all groups exchange at the same time


class Worker(AllReduce):
    """Rank of a group that exchanges its mean gradient or its model with parameter servers."""

    synchronous = False
    accepts_weights = False
    KEY = "model"
    _needs_group = True

    def __init__(self, group: GroupConfig) -> None:
        self._group = group

    def attach(self, context: StrategyContext) -> None:
        super().attach(context)
        group, world = self._group, context.world
        # In the order of the gradients' buckets: pushed and pulled buckets have equal boundaries.
        self.parameters = Parameters(world, list(reversed(context.parameters)), context.bucket_mib)
        self._quota = TensorGroup(
            world, [("quota", torch.zeros(2, dtype=torch.int64, device="cpu"))], staged=False
        )
        self._group_index = self._parameter_groups()
        self._store = Store(
            world,
            group.connectors,
            group.name,
            {self.KEY: self.parameters.group},
            self._contract(),
            self._options(),
            self._segments,
            {} if group.groups else {"seed": context.seed},
            self._coding(),
        )
        self._store.init(self.KEY, self.parameters.group).wait()
        self._store.pause()
        self._steps_since_exchange = self._own_steps = self._total_steps = 0
        self._allowed_steps = group.interval
        self._start_step = 0

    def _contract(self) -> dict[str, Any]:
        parameters = [describe_tensor(name, p) for name, p in self.context.parameters]
        return {**package_versions(), "mode": self._group.mode, "list of parameters": parameters}

    def _coding(self) -> CodingConfig | None:
        if self.context.compress is None:
            return None
        # Not the name, which has the process number: two runs shall have the same bits.
        unique = zlib.crc32(f"{self.context.seed} {self._group.number}".encode())
        return CodingConfig(self.context.compress, self._group.mode, unique)

    def _options(self) -> list[dict[str, Any]]:
        return []

    def _parameter_groups(self) -> dict[str, int]:
        optimizer, names = self.context.optimizer, {id(p): name for name, p in self.context.parameters}
        assert optimizer is not None
        return {
            names[id(p)]: number
            for number, group in enumerate(optimizer.param_groups)
            for p in group["params"]
            if id(p) in names
        }

    def _segments(self, bucket: Bucket) -> list[tuple[int, int, int]]:
        """Segments of a bucket whose parameters are in the same parameter group of the optimizer."""
        segments: list[tuple[int, int, int]] = []
        for name, view in zip(bucket.names, bucket.views, strict=True):
            start, stop = bucket.extent(view)
            number = self._group_index.get(name, 0)
            if segments and segments[-1][2] == number:
                start = segments.pop()[0]
            segments.append((start, stop, number))
        return segments

    def peer_schedule(self, end: int) -> Iterator[int]:
        run, shared = self._group.run, self._group.groups > 0
        self._start_step, self._end, self._own_steps = run.step, end, 0
        if shared:
            self._store.request_steps(self._group.interval).wait()
            self._read_quota()
        else:
            self._join_updates()
        try:
            while self._allowed_steps > 0 if shared else run.step < end:
                yield 0
            run.step = end
        finally:  # after an early exit from the loop the servers must not await this group
            self._store.pause()
            self._allowed_steps = self._group.interval

    def _join_updates(self) -> None:
        """Join the updates again, after a pause in which other groups have made some."""

    def restart(self) -> bool:
        return False

    def has_equal_models(self) -> bool:
        return False

    def step(self, update: Callable[[], None]) -> None:
        self._local_step(update)
        self._steps_since_exchange += 1
        self._own_steps += 1
        self._total_steps += 1
        if self._steps_since_exchange >= self._allowed_steps:
            self._exchange(self._group.interval if self._group.groups else 0)
            self._steps_since_exchange = 0
            if self._group.groups:
                self._read_quota()
        self._update_run_step()

    def _reduction_number(self) -> int:
        return (
            self._total_steps
        )  # the run counts the steps of all groups and may stay the same between two of this one's

    def _local_step(self, update: Callable[[], None]) -> None:
        """Take this group's part of a step."""
        raise NotImplementedError

    def _exchange(self, requested_steps: int) -> None:
        """Push and pull, and request a quota of `requested_steps`."""
        raise NotImplementedError

    def _read_quota(self) -> None:
        """Broadcast the granted quota and the steps begun by all groups within the group."""
        quota = self._quota.buckets[0]
        quota.flat[:2] = torch.tensor([self._store.granted, self._store.steps_begun], device="cpu")
        if self.context.world.size > 1:
            broadcast(quota, self._store.leader)
        self._allowed_steps, self._steps_begun = int(quota.flat[0]), int(quota.flat[1])

    def _update_run_step(self) -> None:
        group = self._group
        taken = self._own_steps
        if group.groups and not group.synchronous:
            # Steps that all groups have begun, without those that each may still be taking.
            taken = max(0, self._steps_begun // group.groups - group.interval)
        group.run.step = min(self._end, self._start_step + taken)

    @contextmanager
    def server_model(self) -> Iterator[None]:
        """Context with the servers' model in place of the group's."""
        state, saved = self._store.state_dict(), self.parameters.copy()
        self._store.pull(self.KEY, self.parameters.group).wait()
        try:
            yield
        finally:
            self._store.load_state_dict(state)
            self.parameters.restore(saved)

    def check_memory(self, *, in_update: bool = False) -> None:
        super().check_memory(in_update=in_update)
        self.parameters.adopt(in_update=in_update)

    def taken_in(self) -> AbstractContextManager[None]:
        return self.parameters.taken_in()

    def disconnect(self) -> None:
        super().disconnect()
        if hasattr(self, "_store"):
            self._store.abandon()

    def detach(self) -> None:
        self._store.close()
        del self._store, self._quota
        super().detach()
        self.parameters.release()
        del self.parameters

    def metrics(self) -> dict[str, Any]:
        return server_metrics(Counter(), self._store.late, {"queue": 0.0, "load": 0.0})

    def state_dict(self) -> dict[str, Any]:
        counters = {
            "store": self._store.state_dict(),
            "since": self._steps_since_exchange,
            "ever": self._total_steps,
            "late": self._store.late,
        }
        return {**super().state_dict(), **counters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        # Servers of another job are not restored.
        self._store.load_state_dict(state["store"], with_servers=self._group.groups > 0)
        self._steps_since_exchange, self._total_steps = int(state["since"]), int(state["ever"])
        self._store.late = int(state.get("late", 0))  # older checkpoints have none


class GradientWorker(Worker):
    """Pushes the mean gradient of its group; the servers take the optimizer's step (sync and async SGD)."""

    def attach(self, context: StrategyContext) -> None:
        assert context.optimizer is not None
        self._name, _ = describe_optimizer(context.optimizer)
        super().attach(context)
        context.optimizer._opt_called = True  # type: ignore[attr-defined]  # for torch's schedulers

    def _contract(self) -> dict[str, Any]:
        return {**super()._contract(), "optimizer": self._name}

    def _options(self) -> list[dict[str, Any]]:
        assert self.context.optimizer is not None
        return describe_optimizer(self.context.optimizer)[1]

    def _join_updates(self) -> None:
        self._store.pull(self.KEY, self.parameters.group, join=True).wait()

    def _local_step(self, update: Callable[[], None]) -> None:
        self._is_complete = self.complete_gradients()
        self._store.set_options(self._options())

    def _exchange(self, requested_steps: int) -> None:
        is_valid = self._is_complete and self.context.unscale()
        self.gradients.collect()
        is_valid = is_valid and self._is_encodable()
        weight = float(self.context.world.size) if is_valid else 0.0
        gradients, parameters = self.gradients.group, self.parameters.group
        self._store.pushpull(self.KEY, gradients, parameters, weight, requested_steps).wait()
        self._end_step()

    def _is_encodable(self) -> bool:
        """Whether all gradients are finite, which compression requires."""
        if self.context.compress is None:
            return True
        world, views = self.context.world, self.gradients.group.views
        bad = [name for name, view in views.items() if not bool(view.isfinite().all())]
        if bad and self.context.nonfinite == "error":
            raise non_finite_error("gradient", bad[0], world.global_rank, world.activity.step)
        return not bad


class ElasticWorker(Worker):
    """Takes synchronous steps in its group, with elastic averaging of its model and the servers' (EASGD)."""

    def attach(self, context: StrategyContext) -> None:
        super().attach(context)
        self._difference = TensorGroup(context.world, self.parameters.templates, context.bucket_mib)

    def detach(self) -> None:
        del self._difference
        super().detach()

    def _local_step(self, update: Callable[[], None]) -> None:
        AllReduce.step(self, update)

    def _exchange(self, requested_steps: int) -> None:
        model = self.parameters.group
        self._store.pushpull(self.KEY, model, self._difference, 1.0, requested_steps).wait()
        for bucket, difference in zip(model, self._difference, strict=True):
            bucket.flat.sub_(difference.flat)
