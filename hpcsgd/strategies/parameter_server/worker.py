"""What a worker does that has parameter servers: alone or in a group that computes one mean gradient."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from hpcsgd.collectives import broadcast
from hpcsgd.collectives.compressed import not_finite
from hpcsgd.server.connection import Dial
from hpcsgd.server.delta_coding import Coding
from hpcsgd.server.metrics import figures_of
from hpcsgd.server.store import Store
from hpcsgd.server.update_rules import describe as optimizer_of
from hpcsgd.strategies.allreduce import AllReduce
from hpcsgd.strategies.context import Setting
from hpcsgd.tensors.fingerprint import describe, versions
from hpcsgd.tensors.group import Bucket, TensorGroup
from hpcsgd.tensors.parameters import Parameters


class Place(NamedTuple):
    """Where a worker stands.

    Attributes
    ----------
    run
        The run's setting, whose steps are those of all groups.
    dials
        How each server is reached.
    name
        Of its group.
    groups
        How many groups share the steps of the run; 0: nobody shares this group's steps.
    mode
        "sync", "async" or "elastic".
    interval
        Steps between two exchanges with the servers.
    together
        Whether all groups exchange at the same time.
    """

    run: Setting
    dials: list[Dial]
    name: str
    groups: int
    mode: str
    interval: int
    together: bool


class Worker(AllReduce):
    """A rank of a group whose mean gradient, or model, is exchanged with parameter servers.

    Parameters
    ----------
    place
        See `Place`.
    """

    lockstep = False
    KEY = "model"

    def __init__(self, place: Place) -> None:
        self._place = place

    def attach(self, setting: Setting) -> None:
        super().attach(setting)
        place, world = self._place, setting.world
        # In the order of the gradients' buckets: what is pushed and what is pulled are cut alike.
        self.parameters = Parameters(world, list(reversed(setting.parameters)), setting.bucket_mib)
        self._leave = TensorGroup(world, [("leave", torch.zeros(2, dtype=torch.int64))], staged=False)
        self._number_of = self._groups_of_parameters()
        self._store = Store(
            world,
            place.dials,
            place.name,
            {self.KEY: self.parameters.group},
            self._contract(),
            self._options(),
            self._segments,
            {} if place.groups else {"seed": setting.seed},
            self._coding(),
        )
        self._store.init(self.KEY, self.parameters.group).wait()
        self._store.rest()
        self._since = self._own_steps = self._ever = 0
        self._allowed = place.interval
        self._began = 0

    def _contract(self) -> dict[str, Any]:
        parameters = [describe(name, p) for name, p in self.setting.parameters]
        return {**versions(), "mode": self._place.mode, "list of parameters": parameters}

    def _coding(self) -> Coding | None:
        if self.setting.compress is None:
            return None
        own = zlib.crc32(f"{self.setting.seed} {self._place.name}".encode())
        return Coding(self.setting.compress, self._place.mode, own)

    def _options(self) -> list[dict[str, Any]]:
        return []

    def _groups_of_parameters(self) -> dict[str, int]:
        optimizer, names = self.setting.optimizer, {id(p): name for name, p in self.setting.parameters}
        assert optimizer is not None
        return {
            names[id(p)]: number
            for number, group in enumerate(optimizer.param_groups)
            for p in group["params"]
            if id(p) in names
        }

    def _segments(self, bucket: Bucket) -> list[tuple[int, int, int]]:
        """Stretches of a bucket whose parameters are in one group of the optimizer."""
        found: list[tuple[int, int, int]] = []
        for name, view in zip(bucket.names, bucket.views, strict=True):
            start, stop = bucket.extent(view)
            number = self._number_of.get(name, 0)
            if found and found[-1][2] == number:
                start = found.pop()[0]
            found.append((start, stop, number))
        return found

    def turns(self, end: int) -> Iterator[int]:
        run, shared = self._place.run, self._place.groups > 0
        self._began, self._end, self._own_steps = run.step, end, 0
        if shared:
            self._store.claim(self._place.interval).wait()
            self._hear()
        else:
            self._join()
        try:
            while self._allowed > 0 if shared else run.step < end:
                yield 0
            run.step = end
        finally:  # a loop that is left early must not keep the servers waiting
            self._store.rest()
            self._allowed = self._place.interval

    def _join(self) -> None:
        """Begin to push, after a pause in which other groups have gone on."""

    def step(self, update: Callable[[], None]) -> None:
        self._take(update)
        self._since += 1
        self._own_steps += 1
        self._ever += 1
        if self._since >= self._allowed:
            self._exchange(self._place.interval if self._place.groups else 0)
            self._since = 0
            if self._place.groups:
                self._hear()
        self._count()

    def _number(self) -> int:
        return self._ever  # the run's steps are those of all groups: they may stand still meanwhile

    def _take(self, update: Callable[[], None]) -> None:
        """This group's part of a step."""
        raise NotImplementedError

    def _exchange(self, wanted: int) -> None:
        """Push and pull, and ask for so many steps."""
        raise NotImplementedError

    def _hear(self) -> None:
        """Tell the group how many steps it may take, and how many all groups have begun."""
        told = self._leave.buckets[0]
        told.flat[:2] = torch.tensor([self._store.granted, self._store.begun])
        if self.setting.world.size > 1:
            broadcast(told, self._store.leader)
        self._allowed, self._begun = int(told.flat[0]), int(told.flat[1])

    def _count(self) -> None:
        place = self._place
        taken = self._own_steps
        if place.groups and not place.together:
            # What all groups have begun, but for what each of them has under way.
            taken = max(0, self._begun // place.groups - place.interval)
        place.run.step = min(self._end, self._began + taken)

    @contextmanager
    def pulled(self) -> Iterator[None]:
        """Inside, the model is that of the servers."""
        state, own = self._store.state_dict(), self.parameters.copy()
        self._store.pull(self.KEY, self.parameters.group).wait()
        try:
            yield
        finally:
            self._store.load_state_dict(state)
            self.parameters.restore(own)

    def detach(self) -> None:
        self._store.close()
        del self._store, self._leave
        super().detach()
        self.parameters.release()
        del self.parameters

    def figures(self) -> dict[str, Any]:
        return figures_of(Counter(), self._store.late, {"queue": 0.0, "load": 0.0})

    def state_dict(self) -> dict[str, Any]:
        own = {"store": self._store.state_dict(), "since": self._since, "ever": self._ever}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        # Servers of their own jobs have not gone back.
        self._store.load_state_dict(state["store"], servers_too=self._place.groups > 0)
        self._since, self._ever = int(state["since"]), int(state["ever"])


class Descending(Worker):
    """Pushes the mean gradient of its group; the servers take the optimizer's step (sync and async SGD)."""

    def attach(self, setting: Setting) -> None:
        assert setting.optimizer is not None
        self._name, _ = optimizer_of(setting.optimizer)
        super().attach(setting)
        setting.optimizer._opt_called = True  # type: ignore[attr-defined]  # for torch's schedulers

    def _contract(self) -> dict[str, Any]:
        return {**super()._contract(), "optimizer": self._name}

    def _options(self) -> list[dict[str, Any]]:
        assert self.setting.optimizer is not None
        return optimizer_of(self.setting.optimizer)[1]

    def _join(self) -> None:
        self._store.pull(self.KEY, self.parameters.group, begin=True).wait()

    def _take(self, update: Callable[[], None]) -> None:
        self.synchronize()
        self._store.tell_options(self._options())

    def _exchange(self, wanted: int) -> None:
        counts = self._finite and self.setting.unscale() and self._can_be_said()
        weight = float(self.setting.world.size) if counts else 0.0
        self._finite = True
        work = self._store.pushpull(self.KEY, self.gradients.group, self.parameters.group, weight, wanted)
        work.wait()
        self.gradients.start_over()

    def _can_be_said(self) -> bool:
        """Whether all gradients are finite, which matters to compression alone."""
        if self.setting.compress is None:
            return True
        world, views = self.setting.world, self.gradients.group.views
        bad = [name for name, view in views.items() if not bool(view.isfinite().all())]
        if bad and self.setting.nonfinite == "error":
            raise not_finite("gradient", bad[0], world.name, world.status.step)
        return not bad


class Drawn(Worker):
    """Takes synchronous steps in its group, whose model and the servers' draw each other near (EASGD)."""

    def attach(self, setting: Setting) -> None:
        super().attach(setting)
        trained = [(name, p) for name, p in reversed(setting.parameters) if p.requires_grad]
        self._pull = TensorGroup(setting.world, trained, setting.bucket_mib)

    def detach(self) -> None:
        del self._pull
        super().detach()

    def _take(self, update: Callable[[], None]) -> None:
        AllReduce.step(self, update)

    def _exchange(self, wanted: int) -> None:
        model = self.parameters.group
        self._store.pushpull(self.KEY, model, self._pull, 1.0, wanted).wait()
        for bucket, pull in zip(model, self._pull, strict=True):
            bucket.flat.sub_(pull.flat)
