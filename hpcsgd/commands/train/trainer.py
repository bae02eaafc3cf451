"""`hpcsgd train`: trains a model with a data set and a strategy, from settings to a run folder."""

from __future__ import annotations

import signal
import time
from contextlib import closing, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpcsgd import compress
from hpcsgd.collectives.peers import Peers
from hpcsgd.commands.signals import SignalRecorder
from hpcsgd.commands.train import run_folder
from hpcsgd.commands.train.evaluation import Objective, evaluate
from hpcsgd.commands.train.metrics import Counters, Meter, Sums
from hpcsgd.commands.train.on_failure import check_on_failure, exit_after_failure
from hpcsgd.commands.train.optimizers import build as build_optimizer
from hpcsgd.commands.train.optimizers import learning_rate_schedule
from hpcsgd.commands.train.plan import Plan
from hpcsgd.commands.train.run_log import RunLog
from hpcsgd.commands.train.settings import Settings, default_model
from hpcsgd.commands.train.state import ResumePoint, RunState, find_resume_point
from hpcsgd.commands.train.storage import RunStorage
from hpcsgd.commands.train.strategy import build_delays, build_strategy
from hpcsgd.diagnostics import trace_file
from hpcsgd.errors import RankFailed
from hpcsgd.mpi.world import World
from hpcsgd.training import data, models, rng_state
from hpcsgd.training.checkpoint.in_memory import InMemoryCheckpoints
from hpcsgd.training.data.base import Source
from hpcsgd.training.data.loader import Loader
from hpcsgd.training.data.partition import evaluation_shard
from hpcsgd.training.run import Run

#: Seconds between two exchanges of signals by the ranks.
EXCHANGE_PERIOD = 0.2
#: The same with an asynchronous method, whose ranks must stop for it.
ASYNCHRONOUS_EXCHANGE_PERIOD = 30.0


def train(settings: Settings, trace: bool = False) -> Path:
    """Train with the given settings; collective.

    Parameters
    ----------
    settings
        Settings of the run.
    trace
        Record a timeline of both threads of every rank in the run's folder, `trace.json`. Default False.

    Returns
    -------
    Path
        The run's folder: `config.toml`, `metrics.jsonl`, `checkpoints/`.

    Raises
    ------
    HpcsgdError
        On all ranks: settings that contradict each other, missing files, or an unsuitable checkpoint.
    """
    world = World(device=settings.device, timeout=settings.timeout)
    check_on_failure(settings, world)
    snapshots = InMemoryCheckpoints()
    lost: RankFailed | None = None
    while True:
        try:
            with world:
                trainer = world.collectively(partial(Trainer, settings, world, snapshots, lost, trace))
                return trainer.execute()
        except Exception as error:
            if not world.has_lost_ranks(error):
                raise
            world, lost = world.survivors()
            if settings.on_failure != "shrink":
                exit_after_failure(lost, settings, snapshots.run_folder, world)


class Trainer:
    """One run on one rank, which continues from the snapshots, if there are any, and adds to them.

    With `lost` these ranks are the survivors of a failure.

    Attributes
    ----------
    data, model, optimizer, strategy, objective
        Made from the settings.
    shard
        Indices of the test samples that this rank evaluates.
    folder, run, log, meter
        The run's folder, the run, its log and its counters; set by `execute`.
    """

    def __init__(
        self,
        settings: Settings,
        world: World,
        snapshots: InMemoryCheckpoints | None = None,
        lost: RankFailed | None = None,
        trace: bool = False,
    ) -> None:
        self.settings, self.world = settings, world
        self._snapshots, self._lost, self._trace = snapshots or InMemoryCheckpoints(), lost, trace
        self.data = data.load(settings.data)
        torch.manual_seed(settings.seed)
        self.model = models.build(settings.model or default_model(settings.data), self.data).to(world.device)
        self.objective = Objective(self.model, world.device, settings.autocast)
        self.optimizer = build_optimizer(settings.optimizer, self.model.parameters(), settings.learning_rate)
        self.strategy = build_strategy(settings)
        self._compressor = compress.build(settings.compress)
        self._peers = Peers(world, settings.virtual_nodes)
        if lost is not None:
            self.strategy.clamp_to(self._peers.size)
        self._delays = build_delays(settings, self._peers, clamp=lost is not None)
        self._loaders = [self._loader(peer) for peer in self._peers.local]
        self.shard = evaluation_shard(len(self.data.test), world.rank, world.size)
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=settings.autocast == "float16")
        self._passes = 0  # backward passes of the step under way
        self._signals = SignalRecorder()
        self._stop_signal: int | None = None
        self._save_now = False  # the earlier checkpoints are gone

    def _loader(self, peer: int) -> Loader:
        settings, workers = self.settings, self.strategy.workers(self._peers.size)
        return Loader(
            self.data.train,
            settings.batch,
            peer % workers,
            workers,
            settings.alpha,
            settings.seed,
            self.data.augment,
        )

    def execute(self) -> Path:
        """Train to the end, or to a signal; collective. Returns the run's folder."""
        settings, world = self.settings, self.world
        self._make_plan()
        self.folder = Path(world.gather(self._snapshots.run_folder or str(run_folder.path_of(settings)))[0])
        self._snapshots.run_folder = str(self.folder)
        with RunStorage(self.folder, settings, world, self._snapshots.lock) as self._storage:
            self._snapshots.lock = self._storage.token
            self._start()
            with self._signals.installed(), closing(self.log):
                self._take_snapshot()
                self._train()
                self._finish()
        self.run.close()
        return self.folder

    def _start(self) -> None:
        """Make the run, from the checkpoint that it resumes, if any, and open its log."""
        settings, world = self.settings, self.world
        resumed = find_resume_point(
            settings, world, self._plan, self.strategy.synchronous, self._storage.checkpoints, self._snapshots
        )
        if resumed is not None and resumed.redistributed:
            self.model.load_state_dict(resumed.state["run"]["model"])
            self.optimizer.load_state_dict(resumed.state["run"]["optimizer"])
        self.run = Run(
            self.model,
            self.optimizer,
            self.strategy,
            comm=world,
            bucket_mib=settings.bucket_mib,
            algorithm=settings.algorithm,
            buffers=settings.buffers,
            uneven=settings.uneven,
            compress=self._compressor,
            seed=settings.seed,
            nonfinite="skip" if self._scaler.is_enabled() else settings.nonfinite,
            virtual_nodes=settings.virtual_nodes,
        )
        torch.set_num_threads(settings.threads or world.local.threads)
        spent = Counters()
        if resumed is None:
            self._storage.create()
        else:
            spent = self._resume(resumed)
        self._storage.open_metrics(self.step, *(() if resumed is None else resumed[1:]))
        self.log = self._open_log()
        if self._trace:
            world.start_trace(self.folder)
        # From here on random numbers, of dropout for example, differ from peer to peer.
        if resumed is None:
            for peer in self.run.each_peer():
                rng_state.seed(settings.seed + 1 + peer)
        self.meter = Meter(world, spent)

    @property
    def step(self) -> int:
        """Steps taken."""
        return self._state.step

    @property
    def completed(self) -> bool:
        """True if all steps of the run are taken."""
        return self._state.step >= self._plan.total

    def _make_plan(self) -> None:
        settings, synchronous = self.settings, self.strategy.synchronous
        batches_of_ranks: list[list[int]] = self.world.gather([len(loader) for loader in self._loaders])
        batches_of_peers = [batches for of_rank in batches_of_ranks for batches in of_rank]
        self._plan = Plan.make(settings, batches_of_peers, synchronous)
        self._factor = learning_rate_schedule(settings.schedule, self._plan.warmup, self._plan.total)
        self._state = RunState(self._plan, self._loaders, self._scaler, synchronous)
        # With an asynchronous method the time of a step is unknown before the first exchange.
        self._next_exchange = 0 if synchronous else settings.log_every

    def _resume(self, resumed: ResumePoint) -> Counters:
        if not resumed.redistributed:
            # Collectively: a state of another model or optimizer raises the same error on all ranks.
            self.world.collectively(lambda: self.run.load_state_dict(resumed.state["run"]))
        return self._state.restore(resumed.state, self.world)

    def _open_log(self) -> RunLog:
        plan, settings, step = self._plan, self.settings, self.step
        writer = self._storage.metrics
        log = RunLog(writer, step, plan.total, settings.epochs, plan.steps_per_epoch, settings.progress)
        if self._lost is not None:
            log.message(
                f"{self._lost}\nthe surviving ranks continue from epoch {step / plan.steps_per_epoch:.2f}"
            )
        log.message(self._headline())
        return log

    def _headline(self) -> str:
        settings, world = self.settings, self.world
        parameters = sum(p.numel() for p in self.model.parameters())
        method = settings.strategy + ("" if settings.compress == "none" else f" with {settings.compress}")
        ranks = f"{world.size} ranks"
        peers = ranks if self._peers.per_rank == 1 else f"{self._peers.size} virtual nodes in {ranks}"
        nodes = f"{world.nodes} node{'s' if world.nodes > 1 else ''}"
        start = f", from step {self.step}" if self.step else ""
        delayed = "" if settings.delays == "none" else f", simulated delays: {settings.delays}"
        threads = f"{torch.get_num_threads()} threads a rank"
        return (
            f"{settings.data}, {type(self.model).__name__} of {parameters:,} parameters, "
            f"{method} over {peers} on {nodes}, {world.device.type}, {threads}{delayed}; "
            f"{self._plan.total} steps{start}; {self.folder}"
        )

    def _train(self) -> None:
        while not self._stops():
            with closing(iter(self._batches())) as batches:
                for x, y in batches:
                    self._one_batch(x, y)
                    if self._stops():
                        break
            if not self.strategy.synchronous:
                self._state.advance(self.run)
                self._after_step()

    def _stops(self) -> bool:
        return self.completed or self._stop_signal is not None

    def _batches(self) -> Any:
        """Return the batches of an epoch, or those of the steps until the ranks must synchronise."""
        loaders = self._loaders if self._peers.per_rank > 1 else self._loaders[0]
        if self.strategy.synchronous:
            return self.run.batches(loaders)
        steps = min(self._plan.steps_to_next_stop(self.step), max(1, self._next_exchange - self.step))
        return self.run.batches(loaders, steps=steps)

    def _one_batch(self, x: Tensor, y: Tensor) -> None:
        passes, state = self.settings.accumulate, self._state
        if self.strategy.synchronous:
            passes = min(passes, self._plan.batches - state.batch)
        self._passes += 1
        last = self._passes == passes
        with nullcontext() if last else self.run.accumulate():
            self._backward(x, y, passes)
        if not last:
            return
        self._passes = 0
        self._update()
        if self.strategy.synchronous and state.base + self.run.steps > state.step:
            state.advance(self.run, passes)
            self._after_step()

    def _backward(self, x: Tensor, y: Tensor, passes: int) -> None:
        if self._passes == 1:
            self.optimizer.zero_grad()
        loss, sums = self.objective(x, y)
        if self._passes == passes:
            self._delay()
        self._scaler.scale(loss / passes).backward()  # type: ignore[no-untyped-call]
        if self.run.weight:
            self._state.sums = self._state.sums + sums

    def _delay(self) -> None:
        # Before backward: a straggler's gradient takes longer, and its first bucket is sent during backward.
        if seconds := self._delays.sample(self.world.rank, self.meter.gradients):
            time.sleep(seconds)
        self.meter.gradients += 1

    def _update(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        if self.settings.clip is not None:
            if self._scaler.is_enabled():
                self._scaler.unscale_(self.run)  # type: ignore[arg-type]
            self.run.synchronize()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self._scaler.step(self.run)  # type: ignore[arg-type]
        self._scaler.update()

    def _learning_rate(self) -> float:
        """Return that of the next step, a function of the step alone: not every peer takes every step."""
        return self.settings.learning_rate * self._factor(self._state.base + self.run.steps)

    def _after_step(self) -> None:
        plan, step, strategy = self._plan, self.step, self.strategy
        ended = step == plan.total
        # Ranks of an asynchronous method exchange nothing but when they stop together, as here.
        logging = plan.has_record(step, strategy.synchronous) or not strategy.deterministic
        if logging or step >= self._next_exchange:
            self._exchange(logging)
        if ended or step % plan.evaluate_every == 0:
            with self.meter.paused(), self.world.tracer.span("evaluation", "compute"):
                self.evaluate()
        if ended or self._stop_signal is not None or self._save_now or step % plan.checkpoint_every == 0:
            self._save_now = False
            with self.meter.paused(), self.world.tracer.span("checkpoint", "compute"):
                self.run.check()
                meta = {"settings": asdict(self.settings), "ranks": self.world.size}
                self._storage.save(step, self._capture(), meta)
        if not ended and step % plan.snapshot_every == 0:
            self._take_snapshot()

    def _capture(self) -> dict[str, Any]:
        return self._state.capture(self.run, self.meter)

    def _take_snapshot(self) -> None:
        """Copy the state in memory, after all ranks have reached this step."""
        if self.settings.on_failure == "shrink":
            self.world.gather(self.step, "an in-memory checkpoint")
            self._snapshots.add(self._capture())

    def _exchange(self, logging: bool) -> None:
        """Exchange signals, and the fields of the next record."""
        counters, state = self.meter.read(), self._state
        metrics = self.strategy.metrics() if logging else {}
        local = (self._signals.received, counters, state.sums, metrics, self._storage.state())
        ranks = self.world.gather(local, "the exchange of metrics")
        received, spent, sums, method, files = zip(*ranks, strict=True)
        self._save_now = self._storage.check(files)
        self._stop_signal = next((number for number in received if number is not None), None)
        step_seconds = max(each.seconds for each in spent) / state.step
        period = EXCHANGE_PERIOD if self.strategy.synchronous else ASYNCHRONOUS_EXCHANGE_PERIOD
        self._next_exchange = state.step + max(1, round(period / step_seconds))
        if logging:
            rate = self._learning_rate()
            self.log.train(state.step, spent, sum(sums, Sums()), state.logged, rate, method)
            state.sums, state.logged = Sums(), counters
        elif not self.strategy.synchronous:
            self.log.progress(state.step, spent, sum(sums, Sums()), state.logged)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Evaluate the consensus model on the test data, and record the result; collective."""
        counters: list[Counters] = self.world.gather(self.meter.read())
        distance = self.run.consensus_distance()
        self.log.test(self.step, counters, self.measure(self.data.test, self.shard), distance)

    def measure(self, source: Source, shard: Tensor) -> Sums:
        """Evaluate the consensus model on a source; collective, see `evaluation.evaluate`."""
        return evaluate(self.run, self.objective, source, shard, self.world)

    def _finish(self) -> None:
        self._storage.finish(done=self.completed)
        if not self.completed and self._stop_signal is not None:
            name = signal.Signals(self._stop_signal).name
            self.log.message(f"{name}: checkpoint of step {self.step} written; --resume {self.folder}")
        else:
            self.log.message(f"done; hpcsgd report {self.folder}")
        if self.world.tracer.on:
            self.log.message(
                f"timeline for https://ui.perfetto.dev: {self.world.trace_folder / trace_file.FILE}"
            )
