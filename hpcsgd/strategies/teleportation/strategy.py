"""TELEPORTATION: a few models move over many peers and average only with one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hpcsgd.collectives.neighbour_exchange import Exchange
from hpcsgd.collectives.staging import after_compute
from hpcsgd.errors import HpcsgdError
from hpcsgd.registry.limits import PeerCount
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.strategies.replicas import ReplicaStrategy
from hpcsgd.strategies.teleportation.optimizer_state import PortableOptimizerState
from hpcsgd.strategies.teleportation.tokens import Tokens
from hpcsgd.topology import TopologySpec


@dataclass(eq=False, repr=False)
class Teleportation(ReplicaStrategy):
    """A few active peers step and average; their models then move to other peers (arXiv 2501.15259).

    TELEPORTATION (Takezawa and Stich, ICLR 2025). There are as many models, the tokens, as active peers.
    In iteration t they are held by peers that are a function of (seed, t) on all ranks; the holders take
    their steps, y_m = x_m - lr g(x_m), and x_m <- sum_m' W_mm' y_m' over a topology of the tokens goes to
    the peer that holds token m in iteration t + 1. No peer waits for an idle one, and an idle peer waits only
    for its next model: HPCSGD_TIMEOUT must be longer than any idle time.

    Our reading: the order of the tokens is random too; the optimizer state moves with its token and is not
    averaged; buffers such as BatchNorm's stay with the peer. The consensus is the mean of the tokens.
    Learning rates are set on each rank, so schedules must follow `run.steps`, the number of the iteration,
    and not the number of this rank's steps. A loop over `run.batches(loader, steps=...)` must run to its end;
    if one is left early, the run can only be closed, and all ranks then get the mean of the models of the
    latest iteration that any rank has reached.

    Parameters
    ----------
    active
        Number of active peers, 1 to all. Default: 4, or all if these are fewer. Several numbers, 1x2x4: as
        many independent trainings at once, on disjoint peers in each iteration, for `hpcsgd tune`.
    topology
        The topology over the tokens, NAME or NAME:key=value+key=value of `hpcsgd.topology`. Default
        "exponential".
    fused
        Send each y straight to all peers that average it for the next iteration (default); False: first
        average, then move, with one more message for each token and the same bits.

    Attributes
    ----------
    evaluated_group
        With several numbers of active peers: index of the training that `averaged()`, `consensus_distance()`
        and `consensus_weight()` are about. Default 0.

    Raises
    ------
    BadOption
        On attachment, `active` above the number of peers.
    """

    title = "TELEPORTATION"
    accepts_virtual_nodes = True
    synchronous = False
    evaluated_group = 0

    active: PeerCount | tuple[PeerCount, ...] | None = None
    topology: TopologySpec = "exponential"
    fused: bool = True

    def clamp_to(self, peers: int) -> None:
        if isinstance(self.active, int):
            self.active = min(self.active, peers)

    def attach(self, context: StrategyContext) -> None:
        peers = context.peers
        if peers.size > 1:
            context.require_torch_optimizer("TELEPORTATION")
        self.tokens = Tokens(peers, self.active, self.topology, context.seed)
        super().attach(context)
        assert context.optimizer is not None
        # A single peer transfers nothing, and its optimizer stays unchanged.
        copies = peers.per_rank if peers.size > 1 else 0
        self._state = PortableOptimizerState(context.world, context.optimizer, copies, context.bucket_mib)
        group_lists = filter(None, (self.parameters.groups, self._state.groups))
        self._exchanges = [Exchange(peers, groups, channel) for channel, groups in enumerate(group_lists)]
        progress = context.world.progress
        self._services = [progress.serve(e.progress_sends()) for e in self._exchanges if e.uses_messages]
        self._scheduled = False
        self._latest_holders: tuple[int, ...] | None = (
            None  # set at the close after a loop that was left early
        )
        self._complete_step = context.step  # the last one in which all holders have their models

    def detach(self) -> None:
        progress = self.context.world.progress
        for service in self._services:
            progress.stop_serving(service)
        for exchange in self._exchanges:
            exchange.flush()
        progress.drain()
        self._check_for_early_exit()
        del exchange, self._exchanges, self._state
        super().detach()

    def peer_schedule(self, end: int) -> Iterator[int]:
        context, tokens = self.context, self.tokens
        self._check_models_in_place()
        try:
            for step in range(context.step, end):
                context.step = step
                for peer in tokens.local_holders(step):
                    self._scheduled = True
                    yield context.peers.index(peer)
                if not tokens.local_holders(step) and tokens.local_holders(step + 1):
                    self._transfer(step)
            context.step = self._complete_step = end
        finally:
            self._scheduled = False

    def step(self, update: Callable[[], None]) -> None:
        context, step = self.context, self.context.step
        if not self._scheduled:
            self._step_outside_batches(update)
            return
        self._state.load(context.current_peer_index)
        update()
        self._state.store(context.current_peer_index)
        if context.peer == self.tokens.local_holders(step)[-1]:
            self._transfer(step)
            context.step = step + 1

    def _step_outside_batches(self, update: Callable[[], None]) -> None:
        """Take one iteration for a call of `run.step` outside of `run.batches`."""
        context, tokens = self.context, self.tokens
        if context.peers.per_rank > 1 or not tokens.local_holders(context.step):
            raise HpcsgdError(
                f"run.step() outside run.batches() with {tokens.count} of {context.peers.size} peers active",
                rank=context.world.rank,
                do="iterate over run.batches(loader), which yields batches only for active peers",
            )
        for _ in self.peer_schedule(context.step + 1):
            self.step(update)

    def _transfer(self, step: int) -> None:
        """Average the models of an iteration and move them, with optimizer states, to the next holders."""
        world = self.context.world
        for transfer in self.tokens.transfers(step, self._exchanges, self.fused):
            # Not `progress.run`, which may run it in this thread: the services poll the same messages.
            what = f"the transfer of models after iteration {step}"
            world.progress.submit(what, after_compute(world.device, transfer.run)).wait()
        for peer in self.tokens.local_holders(step + 1):
            self._state.mark_received(self.context.peers.index(peer))

    def consensus_weight(self, peer: int) -> float:
        holders = self._latest_holders
        if holders is None:
            self._check_models_in_place()
            holders = self.tokens.group(self.evaluated_group, self.context.step)
        return 1.0 / len(holders) if peer in holders else 0.0

    def _check_for_early_exit(self) -> None:
        """Set the peers whose models are the consensus of the close if some rank left its loop early."""
        context = self.context
        local = [(self._model_step(peer), peer) for peer in context.peers.local]
        early_exit = self._complete_step != context.step
        found = context.world.gather((early_exit, local), "the last iteration of each peer")
        if any(early_exit for early_exit, _ in found):
            models = [model for _, local in found for model in local]
            latest = max(models)[0]
            self._latest_holders = tuple(peer for step, peer in models if step == latest)

    def check_consensus(self) -> None:
        self._check_models_in_place()

    def _check_models_in_place(self) -> None:
        if self._complete_step != self.context.step:
            raise HpcsgdError(
                "a transfer of models is not finished: run.batches() was left early, after "
                f"iteration {self._complete_step}",
                rank=self.context.world.rank,
                do="pass the number of steps, run.batches(loader, steps=...), and evaluate after the loop",
            )

    def model_step(self) -> int:
        return max(map(self._model_step, self.context.peers.local))

    def _model_step(self, peer: int) -> int:
        """Return the iteration of the model of a peer, -1 for the initial one."""
        steps = range(self.context.step, -1, -1)
        return next((step for step in steps if peer in self.tokens.holders(step)), -1)

    def state_dict(self) -> dict[str, Any]:
        local = map(self.context.peers.index, self.tokens.local_holders(self.context.step))
        return {"optimizer": {index: self._state.copy(index) for index in local if self._state.groups}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._complete_step = self.context.step
        for exchange in self._exchanges:
            exchange.reset()
        for index, values in state["optimizer"].items():
            self._state.restore(index, values)
