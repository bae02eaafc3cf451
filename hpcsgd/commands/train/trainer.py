"""`hpcsgd train`: a model, a data set and a strategy, from settings to a run folder."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hpcsgd import compress, registry
from hpcsgd.collectives.peers import Peers
from hpcsgd.commands.signals import Signals
from hpcsgd.commands.train import run_folder
from hpcsgd.commands.train.metrics import Counters, Meter, Sums
from hpcsgd.commands.train.on_failure import check_movable, check_survival, leave
from hpcsgd.commands.train.optimizers import OPTIMIZERS, course
from hpcsgd.commands.train.run_log import Journal
from hpcsgd.commands.train.settings import AUTO, Settings, default_model, resumed
from hpcsgd.diagnostics import trace_file
from hpcsgd.errors import BadOption, RankFailed
from hpcsgd.mpi.world import World
from hpcsgd.strategies import STRATEGIES, Strategy, delays
from hpcsgd.training import data, models, rng_state
from hpcsgd.training.checkpoint.checkpoints import Checkpoints
from hpcsgd.training.checkpoint.in_memory import Kept, moved, reform
from hpcsgd.training.data.base import Source
from hpcsgd.training.run import Run

_VOTE_EVERY = 0.2  # seconds between two questions whether any rank was told to stop
_MEET_EVERY = 30.0  # the same where ranks must come to rest for it
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_EVALUATION_BATCH = 256


def train(settings: Settings, trace: bool = False) -> Path:
    """Train as the settings say; collective.

    Parameters
    ----------
    settings
        What to do.
    trace
        Leave a timeline of both threads of every rank in the folder: `trace.json`.

    Returns
    -------
    Path
        The run's folder: `config.toml`, `metrics.jsonl`, `checkpoints/`.

    Raises
    ------
    HpcsgdError
        On all ranks alike, for settings that do not fit, missing files, or a checkpoint that does not.
    """
    world = World(device=settings.device, timeout=settings.timeout)
    check_survival(settings, world)
    kept = Kept()
    lost: RankFailed | None = None
    while True:
        try:
            with world:
                training = world.together(partial(Training, settings, world, kept, lost, trace))
                return training.execute()
        except Exception as error:
            if not world.has_lost_ranks(error):
                raise
            world, lost = world.survivors()
            if settings.on_failure != "shrink":
                leave(lost, settings, kept.folder, world)


class Training:
    """One run on one rank.

    Parameters
    ----------
    settings
        What to do.
    world
        The ranks.
    kept
        Where copies of the state go, and what to go on from, if any are there.
    lost
        Who has died before.
    trace
        Whether to trace it into its folder.
    """

    def __init__(
        self,
        settings: Settings,
        world: World,
        kept: Kept | None = None,
        lost: RankFailed | None = None,
        trace: bool = False,
    ) -> None:
        self.world = world
        self.kept, self.lost = kept or Kept(), lost
        self.settings = settings
        self.traced = trace
        self.data = data.load(settings.data)
        torch.manual_seed(settings.seed)
        self.model = models.build(settings.model or default_model(settings.data), self.data).to(world.device)
        self.optimizer = registry.build(
            OPTIMIZERS,
            settings.optimizer,
            "optimizer",
            params=self.model.parameters(),
            lr=settings.learning_rate,
        )
        self.strategy = _strategy(settings)
        self.compressor = compress.build(settings.compress)
        self.peers = Peers(world, settings.virtual_nodes)
        if lost is not None:
            self.strategy.fit(self.peers.size)
        self.delays = delays.build(settings.delays)
        _check_delays(settings, self.peers)
        self.loaders = [self._loader(peer) for peer in self.peers.local]
        self.shard = data.evaluation_shard(len(self.data.test), world.rank, world.size)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=settings.autocast == "float16")
        #: Steps are the run's, and those before it in which other ranks took part.
        self.base = self.step = self.epoch = self.batch = self.passes = 0
        self.keep: int | None = None
        self.sums = Sums()
        self.logged = Counters()
        self.signals = Signals()
        self.signal: int | None = None

    def _loader(self, peer: int) -> data.Loader:
        settings, workers = self.settings, self.strategy.workers(self.peers.size)
        return data.Loader(
            self.data.train,
            settings.batch,
            peer % workers,
            workers,
            settings.alpha,
            settings.seed,
            self.data.augment,
        )

    def execute(self) -> Path:
        """Train to the end, or to a signal; returns the run's folder."""
        settings, world = self.settings, self.world
        self._plan()
        self.folder = Path(world.gather(self.kept.folder or str(run_folder.path_of(settings)))[0])
        self.kept.folder = str(self.folder)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", world.rank, world.size, world.gather)
        state, others = self._find_state()
        if others:
            self.model.load_state_dict(state["run"]["model"])
            self.optimizer.load_state_dict(state["run"]["optimizer"])
        self.run = Run(
            self.model,
            self.optimizer,
            self.strategy,
            comm=world,
            bucket_mib=settings.bucket_mib,
            algorithm=settings.algorithm,
            buffers=settings.buffers,
            uneven=settings.uneven,
            compress=self.compressor,
            seed=settings.seed,
            nonfinite="skip" if self.scaler.is_enabled() else settings.nonfinite,
            virtual_nodes=settings.virtual_nodes,
        )
        torch.set_num_threads(settings.threads or world.threads)
        before = self._resume(state, others) if state else world.together(self._begin)
        self.journal = world.together(self._open_journal)
        if self.traced:
            world.trace_into(self.folder)
        # From here on dropout and the like differ from peer to peer.
        if not state:
            for peer in self.run.each_peer():
                rng_state.seed(settings.seed + 1 + peer)
        self.meter = Meter(world, before)
        with self.signals.noted(), closing(self.journal):
            self._keep()
            self._train()
            self._finish()
        self.run.close()
        return self.folder

    def _plan(self) -> None:
        told: list[list[int]] = self.world.gather([len(loader) for loader in self.loaders])
        counts = [count for counts in told for count in counts]
        join = self.settings.uneven == "join" or not self.strategy.lockstep
        self.batches = max(counts) if join else min(counts)
        self.steps_per_epoch = math.ceil(self.batches / self.settings.accumulate)
        self.total = math.ceil(self.settings.epochs * self.steps_per_epoch)
        warmup = round(self.settings.warmup * self.steps_per_epoch)
        self.factor = course(self.settings.schedule, warmup, self.total)
        self.evaluate_every = self._in_steps(self.settings.evaluate_every)
        self.checkpoint_every = self._in_steps(self.settings.checkpoint_every)
        shrink = self.settings.on_failure == "shrink"
        self.keep_every = self._in_steps(self.settings.keep_every if shrink else 0.0)
        # Where nobody keeps step, what a step takes is not known before a first meeting.
        self.next_vote = 0 if self.strategy.lockstep else self.settings.log_every

    def _in_steps(self, epochs: float) -> int:
        return max(1, round(epochs * self.steps_per_epoch)) if epochs else self.total + 1

    def _resumes(self) -> bool:
        """Whether there is something to go on with; rank 0 looks, for all must do the same."""
        if self.settings.resume != AUTO:
            return bool(self.settings.resume)
        return bool(self.world.gather(self.checkpoints.steps())[0])

    def _begin(self) -> Counters:
        about: dict[str, object] = {"ranks": self.world.size, "nodes": self.world.nodes}
        if self.world.rank == 0:
            run_folder.make(self.folder, self.settings, about)
        return Counters()

    def _find_state(self) -> tuple[dict[str, Any], bool]:
        """What to go on from, if anything, and whether it is the state of other ranks."""
        kept = self.kept.common(self.world)
        if kept is not None:
            return self._moved(reform([kept], self.world, 1)), True
        if not self._resumes():
            return {}, False
        step = None if self.settings.resume == AUTO else resumed(self.settings.resume)[1]
        others = self.settings.on_failure != "stop"
        states, meta = self.checkpoints.load(step, of_others=others)
        run_folder.check_unchanged(self.settings, meta["settings"])
        ranks = meta["ranks"]
        if ranks == self.world.size:
            return states[0], False
        check_movable(self.settings, ranks, self.world)
        givers = len(states) if self.world.rank < ranks else 0
        return self._moved(reform(states, self.world, givers)), True

    def _moved(self, state: dict[str, Any]) -> dict[str, Any]:
        self.keep = state["step"]
        lockstep = self.strategy.lockstep
        return moved(
            state, self.steps_per_epoch, self.batches, self.settings.accumulate if lockstep else None
        )

    def _resume(self, state: dict[str, Any], others: bool) -> Counters:
        if not others:
            # All ranks alike fail to put it into a model or an optimizer of another kind.
            self.world.together(lambda: self.run.load_state_dict(state["run"]))
        self.scaler.load_state_dict(state["scaler"])
        self.base = state["base"]
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        self.sums, self.logged = Sums(**state["sums"]), Counters(**state["logged"])
        self.world.together(lambda: self._seek(state["loaders"]))
        rng_state.restore(state["generators"])
        return Counters(**state["spent"])

    def _seek(self, positions: list[dict[str, int]]) -> None:
        for loader, position in zip(self.loaders, positions, strict=True):
            loader.load_state_dict(position)

    def _positions(self) -> list[dict[str, int]]:
        """Where each loader goes on; in lockstep all at the same place, some beyond their own last batch."""
        if self.strategy.lockstep:
            return [{"epoch": self.epoch, "batch": self.batch} for _ in self.loaders]
        return [loader.state_dict() for loader in self.loaders]

    def _state(self) -> dict[str, Any]:
        return {
            "run": self.run.state_dict(),
            "scaler": self.scaler.state_dict(),
            "steps_per_epoch": self.steps_per_epoch,
            "batches": self.batches,
            "base": self.base,
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "loaders": self._positions(),
            "sums": asdict(self.sums),
            "logged": asdict(self.logged),
            "generators": rng_state.state(),
            "spent": asdict(self.meter.read()),
        }

    def _open_journal(self) -> Journal:
        length = (self.total, self.settings.epochs, self.steps_per_epoch)
        run_folder.mark(self.folder, self.world.rank, done=False)
        mode = self.settings.progress
        journal = Journal(self.folder, self.world.rank, self.step, *length, mode, self.keep)
        if self.lost is not None:
            journal.say(f"{self.lost}\ngoes on without, from epoch {self.step / self.steps_per_epoch:.2f}")
        journal.say(self._headline())
        return journal

    def _headline(self) -> str:
        world, count = self.world, sum(p.numel() for p in self.model.parameters())
        nodes = f"{world.nodes} node{'s' if world.nodes > 1 else ''}"
        start = f", from step {self.step}" if self.step else ""
        slowed = "" if self.settings.delays == "none" else f", simulated delays: {self.settings.delays}"
        return (
            f"{self.settings.data}, {type(self.model).__name__} of {count:,} parameters, "
            f"{self._method()} over {self._peers()} on {nodes}, {world.device.type}, "
            f"{torch.get_num_threads()} threads a rank{slowed}; {self.total} steps{start}; {self.folder}"
        )

    def _peers(self) -> str:
        ranks = f"{self.world.size} ranks"
        return ranks if self.peers.each == 1 else f"{self.peers.size} virtual nodes in {ranks}"

    def _method(self) -> str:
        strategy, scheme = self.settings.strategy, self.settings.compress
        return strategy if scheme == "none" else f"{strategy} with {scheme}"

    def _train(self) -> None:
        while self.step < self.total and self.signal is None:
            with _closing(self._batches()) as batches:
                for x, y in batches:
                    self._one_batch(x, y)
                    if self.step >= self.total or self.signal is not None:
                        break
            if not self.strategy.lockstep:
                self._count_steps()

    def _batches(self) -> Any:
        """An epoch's; or as many steps as are left until the ranks must meet."""
        loaders = self.loaders if self.peers.each > 1 else self.loaders[0]
        meetings = (self.evaluate_every, self.checkpoint_every, self.keep_every, self.total)
        steps = min(every - self.step % every for every in meetings)
        return self.run.batches(loaders, steps=min(steps, max(1, self.next_vote - self.step)))

    def _one_batch(self, x: Tensor, y: Tensor) -> None:
        passes = self.settings.accumulate
        if self.strategy.lockstep:
            passes = min(passes, self.batches - self.batch)
        self.passes += 1
        last = self.passes == passes
        with nullcontext() if last else self.run.accumulate():
            self._backward(x.to(self.world.device), y.to(self.world.device), passes)
        if not last:
            return
        self.passes = 0
        self._update()
        if self.strategy.lockstep and self.base + self.run.steps > self.step:
            self.batch += passes
            self._count_steps()

    def _count_steps(self) -> None:
        """All peers have taken the step, or the steps until they meet."""
        self.step = self.base + self.run.steps
        if not self.strategy.lockstep:
            self.epoch = self.step // self.steps_per_epoch
        elif self.batch == self.batches:
            self.epoch, self.batch = self.epoch + 1, 0
        self._after_step()

    def _backward(self, x: Tensor, y: Tensor, passes: int) -> None:
        if self.passes == 1:
            self.optimizer.zero_grad()
        loss, sums = self._loss(x, y)
        if self.passes == passes:
            self._delay()
        self.scaler.scale(loss / passes).backward()  # type: ignore[no-untyped-call]
        if self.run.weight:
            self.sums = self.sums + sums

    def _delay(self) -> None:
        """A straggler's gradient takes longer; its first bucket may leave as soon as backward begins."""
        if seconds := self.delays.draw(self.world.rank, self.meter.gradients):
            time.sleep(seconds)
        self.meter.gradients += 1

    def _loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Sums]:
        with self._autocast():
            logits = self.model(x)
            logits, targets = logits.reshape(-1, logits.shape[-1]), y.reshape(-1)
            loss = F.cross_entropy(logits, targets)
        hits = int((logits.argmax(1) == targets).sum())
        return loss, Sums(float(loss.detach()) * len(targets), hits, len(targets), len(x))

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = _DTYPES.get(self.settings.autocast)
        return torch.autocast(self.world.device.type, dtype) if dtype else nullcontext()

    def _update(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        if self.settings.clip is not None:
            if self.scaler.is_enabled():
                self.scaler.unscale_(self.run)  # type: ignore[arg-type]
            self.run.synchronize()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.scaler.step(self.run)  # type: ignore[arg-type]
        self.scaler.update()

    def _learning_rate(self) -> float:
        """Of the step that comes next: a function of it alone, for not every peer takes every step."""
        return self.settings.learning_rate * self.factor(self.base + self.run.steps)

    def _after_step(self) -> None:
        ended = self.step == self.total
        # Who waits for nobody is asked nothing before the ranks meet.
        logging = self.step % self.settings.log_every == 0 or ended or not self.strategy.lockstep
        if logging or self.step >= self.next_vote:
            self._exchange(logging)
        if ended or self.step % self.evaluate_every == 0:
            with self.meter.paused(), self.world.trace.span("evaluation", "compute"):
                self._evaluate()
        if ended or self.signal is not None or self.step % self.checkpoint_every == 0:
            with self.meter.paused(), self.world.trace.span("checkpoint", "compute"):
                meta = {"settings": asdict(self.settings), "ranks": self.world.size}
                self.checkpoints.save(self.step, self._state(), meta)
        if not ended and self.step % self.keep_every == 0:
            self._keep()

    def _keep(self) -> None:
        """Copy the state in memory; nobody begins before all have come to this step."""
        if self.settings.on_failure == "shrink":
            self.world.gather(self.step, "a copy of the state")
            self.kept.add(self._state())

    def _exchange(self, logging: bool) -> None:
        """Tell each other signals, and what is to be logged."""
        counters = self.meter.read()
        figures = self.strategy.figures() if logging else {}
        mine = (self.signals.caught, counters, self.sums, figures)
        caught, spent, sums, told = zip(*self.world.gather(mine, "the exchange of metrics"), strict=True)
        self.signal = next((number for number in caught if number is not None), None)
        longest = max(each.seconds for each in spent) / self.step
        pause = _VOTE_EVERY if self.strategy.lockstep else _MEET_EVERY
        self.next_vote = self.step + max(1, round(pause / longest))
        if logging:
            rate = self._learning_rate()
            self.journal.train(self.step, spent, sum(sums, Sums()), self.logged, rate, told)
            self.sums, self.logged = Sums(), counters

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Loss and accuracy of the consensus model, each test sample counted once."""
        counters: list[Counters] = self.world.gather(self.meter.read())
        distance = self.run.consensus_distance()
        self.journal.test(self.step, counters, self._measure(self.data.test, self.shard), distance)

    def _measure(self, source: Source, shard: Tensor) -> Sums:
        """Of the consensus model over a source's samples, of which this rank takes those of its shard."""
        self.model.eval()
        with self.run.averaged():
            sums = Sums()
            for indices in torch.split(shard, _EVALUATION_BATCH):
                x, y = source.batch(indices)
                sums = sums + self._loss(x.to(self.world.device), y.to(self.world.device))[1]
        self.model.train()
        return sum(self.world.gather(sums), Sums())

    def _finish(self) -> None:
        if self.signal is not None and self.step < self.total:
            name = signal.Signals(self.signal).name
            self.journal.say(f"{name}: checkpoint of step {self.step} written; --resume {self.folder}")
        else:
            run_folder.mark(self.folder, self.world.rank, done=True)
            self.journal.say(f"done; hpcsgd report {self.folder}")
        if self.world.trace.on:
            self.journal.say(
                f"timeline for https://ui.perfetto.dev: {self.world.trace_folder / trace_file.FILE}"
            )


def _strategy(settings: Settings) -> Strategy:
    if not settings.connect:
        return registry.build(STRATEGIES, settings.strategy, "strategy")
    if registry.parse(settings.strategy)[0] != "ps":
        raise BadOption(
            "only a strategy with parameter servers can connect to them",
            got=f"--strategy {settings.strategy} --connect {settings.connect}",
            do="use --strategy ps:mode=..., with the mode of the servers, or leave out --connect",
            everywhere=True,
        )
    return registry.build(STRATEGIES, settings.strategy, "strategy", connect=settings.connect)


def _check_delays(settings: Settings, peers: Peers) -> None:
    if settings.delays != "none" and peers.each > 1:
        raise BadOption(
            "virtual nodes have no delays in real time: those of one rank take turns",
            got=f"--delays {settings.delays}",
            do=f"use virtual time: --strategy backup:delays={settings.delays.replace(',', '+')}",
            everywhere=True,
        )


@contextmanager
def _closing(batches: Iterator[Any]) -> Iterator[Iterator[Any]]:
    try:
        yield batches
    finally:
        batches.close()  # type: ignore[attr-defined]
