"""TELEPORTATION: a few models that wander over many peers and average only with one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from hpcsgd.collectives.neighbour_exchange import Exchange
from hpcsgd.collectives.staging import after_compute
from hpcsgd.errors import BadOption, HpcsgdError
from hpcsgd.strategies.context import Setting
from hpcsgd.strategies.replicas import OwnModels
from hpcsgd.strategies.teleportation.optimizer_state import CarriedState
from hpcsgd.strategies.teleportation.tokens import Tokens


class Teleportation(OwnModels):
    """A few peers are active at a time: they take over the models of those before, step, and average.

    TELEPORTATION (Takezawa and Stich, ICLR 2025, arXiv 2501.15259). There are as many models, the tokens,
    as active peers. In iteration t they are with peers that all ranks draw from (seed, t); these take their
    steps, y_m = x_m - lr g(x_m), and x_m <- sum_m' W_mm' y_m' over a topology of the tokens goes to the peer
    that holds token m in iteration t + 1. Nobody waits for a peer that rests, and that one only for its next
    model: HPCSGD_TIMEOUT must be longer than any rest.

    Our reading: the tokens' order is drawn too; the optimizer's state travels with its token, not averaged;
    buffers such as BatchNorm's stay with the peer. The consensus is the mean of the tokens. Learning rates
    are each rank's own, so schedules must follow `run.steps`, the number of the iteration, and not how often
    this rank has stepped. A loop over `run.batches(loader, steps=...)` must not be left early.

    Parameters
    ----------
    active
        How many peers compute at a time, 1 to all. Default: 4, or all where these are fewer. Several
        numbers, 1x2x4: as many trainings at once that share nothing, on peers disjoint in each iteration, as
        `hpcsgd tune` compares them; `shown` is the number of the one that `averaged()` and the like mean.
    topology
        Over the tokens, as NAME or NAME:key=value+key=value of `hpcsgd.topology`. Default "exponential".
    fused
        Send each y straight to all who average it for the next iteration (default); else average first,
        then move: a message more for each token, for the same bits.
    """

    lockstep = False
    shown = 0

    def __init__(
        self,
        active: int | tuple[int, ...] | None = None,
        topology: str = "exponential",
        fused: bool = True,
    ) -> None:
        if active is not None and min(active if isinstance(active, tuple) else (active,)) < 1:
            raise BadOption("TELEPORTATION needs active peers", expected="active of at least 1", got=active)
        self.active, self.topology, self.fused = active, topology, fused

    def options(self) -> dict[str, object]:
        return {"active": self.active, "topology": self.topology, "fused": self.fused}

    def fit(self, peers: int) -> None:
        if isinstance(self.active, int):
            self.active = min(self.active, peers)

    def attach(self, setting: Setting) -> None:
        setting.refuse("TELEPORTATION", compression=True)
        peers = setting.peers
        self.tokens = Tokens(peers, self.active, self.topology, setting.seed)
        super().attach(setting)
        assert setting.optimizer is not None
        # Alone nothing travels, and the optimizer is left as it is.
        copies = peers.each if peers.size > 1 else 0
        self._state = CarriedState(setting.world, setting.optimizer, copies, setting.bucket_mib)
        cargoes = filter(None, (self.parameters.groups, self._state.groups))
        self._exchanges = [Exchange(peers, groups, channel) for channel, groups in enumerate(cargoes)]
        for exchange in self._exchanges:
            if exchange.sends:
                setting.world.progress.serve(exchange.push)
        self._computing = False
        self._complete = setting.step  # in this iteration all holders have their models

    def detach(self) -> None:
        progress = self.setting.world.progress
        for exchange in self._exchanges:
            progress.dismiss(exchange.push)
            exchange.settle()
        progress.drain()
        del exchange, self._exchanges, self._state
        super().detach()

    def turns(self, end: int) -> Iterator[int]:
        setting, tokens = self.setting, self.tokens
        self._check_complete()
        try:
            for step in range(setting.step, end):
                setting.step = step
                for peer in tokens.here(step):
                    self._computing = True
                    yield setting.peers.index(peer)
                if not tokens.here(step) and tokens.here(step + 1):
                    self._move(step)
            setting.step = self._complete = end
        finally:
            self._computing = False

    def step(self, update: Callable[[], None]) -> None:
        setting, step = self.setting, self.setting.step
        if not self._computing:
            self._step_alone(update)
            return
        self._state.give(setting.turn)
        update()
        self._state.keep(setting.turn)
        if setting.peer == self.tokens.here(step)[-1]:
            self._move(step)
            setting.step = step + 1

    def _step_alone(self, update: Callable[[], None]) -> None:
        """An iteration for a step outside of `run.batches`."""
        setting, tokens = self.setting, self.tokens
        if setting.peers.each > 1 or not tokens.here(setting.step):
            raise HpcsgdError(
                f"a step outside of run.batches(): {tokens.count} of {setting.peers.size} peers are active",
                rank=setting.world.rank,
                do="iterate over run.batches(loader), which knows whose turn it is",
            )
        for _ in self.turns(setting.step + 1):
            self.step(update)

    def _move(self, step: int) -> None:
        """Average an iteration's models and bring them, with the optimizer's states, to the next holders."""
        world = self.setting.world
        for move in self.tokens.moves(step, self._exchanges, self.fused):
            # Not `run`: what a service pushes on must not be touched by a second thread.
            what = f"moving models after iteration {step}"
            world.progress.submit(what, after_compute(world.device, move.run)).wait()
        for peer in self.tokens.here(step + 1):
            self._state.arrived(self.setting.peers.index(peer))

    def share(self, peer: int) -> float:
        self._check_complete()
        holders = self.tokens.group(self.shown, self.setting.step)
        return 1.0 / len(holders) if peer in holders else 0.0

    def _check_complete(self) -> None:
        if self._complete != self.setting.step:
            raise HpcsgdError(
                f"models are under way: run.batches() was left early, after iteration {self._complete}",
                rank=self.setting.world.rank,
                do="say how many steps it is to have: run.batches(loader, steps=...); evaluate after it",
            )

    def model_step(self) -> int:
        steps = range(self.setting.step, -1, -1)
        return next((step for step in steps if self.tokens.here(step)), -1)

    def state_dict(self) -> dict[str, Any]:
        here = map(self.setting.peers.index, self.tokens.here(self.setting.step))
        return {"optimizer": {turn: self._state.copy(turn) for turn in here if self._state.groups}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._complete = self.setting.step
        for exchange in self._exchanges:
            exchange.clear()
        for turn, values in state["optimizer"].items():
            self._state.restore(turn, values)
