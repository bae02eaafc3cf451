"""Run: a model, an optimizer and a strategy on the ranks of one job."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hpcsgd import collectives
from hpcsgd.compress import Compressor
from hpcsgd.errors import BadOption
from hpcsgd.mpi.world import World
from hpcsgd.strategies import AllReduce, Setting, Strategy
from hpcsgd.tensors.fingerprint import describe, versions
from hpcsgd.tensors.group import DEFAULT_BUCKET_MIB, SUMMABLE, TensorGroup
from hpcsgd.training import batches, rng_state, step_trace
from hpcsgd.training.virtual_nodes import Turns


class Run:
    """Trains one model on all ranks.

    The model of rank 0 is copied to all ranks; the optimizer may already have state. Use `run.step()` in
    place of `optimizer.step()` and iterate over `run.batches(loader)` in place of `loader`. With one
    rank this is plain training, bit for bit.

    Parameters
    ----------
    model
        Any module; its parameters and buffers stay the same objects.
    optimizer
        Any `torch.optim` optimizer of the model's parameters.
    strategy
        The method; default `AllReduce()`.
    comm
        The user's own mpi4py communicator, which is duplicated, or a `World`, which is used as it is.
        Default `MPI.COMM_WORLD`.
    bucket_mib
        Size in MiB of the pieces that are communicated at a time. Default 4.
    algorithm
        The all-reduce, see `hpcsgd.collectives.iallreduce`. Default "auto".
    buffers
        What `averaged()` does with buffers such as BatchNorm's running statistics: "broadcast" those of
        rank 0 (default), "average" the floating-point ones, or leave them "local".
    unused
        A parameter that got no gradient contributes "zeros" (default) or is an "error".
    uneven
        Ranks with fewer batches "join" the others' remaining steps with weight 0 (default), or all
        "stop" with the first that runs out.
    compress
        How what the strategy reduces is compressed, see `hpcsgd.compress`; default: not at all.
    seed
        Of the random numbers that compression and strategies draw. Default 0.
    nonfinite
        With compression, NaN or infinity in a gradient is an "error" that names parameter, rank and step
        (default), or all ranks "skip" the step, as GradScaler needs.
    virtual_nodes
        Peers of a gossip method in all, a multiple of the number of ranks: each rank then trains several
        models, in turn, with the results of as many ranks. Default: one a rank.

    Raises
    ------
    Disagreement
        On all ranks, where these brought different models, settings or versions.
    """

    #: torch's GradScaler then leaves unscaling and skipping to `step`, which happens on every rank.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        strategy: Strategy | None = None,
        *,
        comm: Any = None,
        bucket_mib: float = DEFAULT_BUCKET_MIB,
        algorithm: str = "auto",
        buffers: str = "broadcast",
        unused: str = "zeros",
        uneven: str = "join",
        compress: Compressor | None = None,
        seed: int = 0,
        nonfinite: str = "error",
        virtual_nodes: int | None = None,
    ) -> None:
        _check("buffers", buffers, ("broadcast", "average", "local"))
        _check("unused", unused, ("zeros", "error"))
        _check("uneven", uneven, ("join", "stop"))
        _check("nonfinite", nonfinite, ("error", "skip"))
        _check("algorithm", algorithm, ("auto", *collectives.ALGORITHMS))
        parameters = list(model.named_parameters())
        self.model = model
        self.optimizer = optimizer
        self.strategy = strategy or AllReduce()
        self._owns_world = not isinstance(comm, World)
        self.world: World = World(comm, device=str(_device_of(parameters))) if self._owns_world else comm
        self._buffers, self._uneven = buffers, uneven
        self._closed = False
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(self.world.threads)
        self.world.agree(
            {
                **versions(),
                "strategy": type(self.strategy).__name__,
                **{f"strategy option {k}": v for k, v in self.strategy.options().items()},
                "optimizer": type(optimizer).__name__,
                "bucket_mib": bucket_mib,
                "algorithm": algorithm,
                "buffers": buffers,
                "unused": unused,
                "uneven": uneven,
                "compress": str(compress),
                "seed": seed,
                "nonfinite": nonfinite,
                "virtual_nodes": virtual_nodes,
                "list of parameters": [describe(n, p) for n, p in parameters],
                "list of buffers": [describe(n, b) for n, b in model.named_buffers()],
            }
        )
        self._copy_from_rank_0([*parameters, *model.named_buffers()])
        self._setting = Setting(
            self.world,
            parameters,
            bucket_mib,
            algorithm,
            unused,
            compress,
            seed,
            nonfinite,
            virtual_nodes,
            optimizer,
        )
        self._count(0)
        self._setting.unscale = self._unscale
        self.strategy.attach(self._setting)
        self._turns = Turns(model, optimizer, self.strategy, self._setting)
        self._endless = batches.Endless(self._setting, self.strategy, self._turns)

    @property
    def steps(self) -> int:
        """Steps taken so far; of a method whose peers do not keep step, the iterations of all together."""
        return self._setting.step

    @property
    def workers(self) -> int:
        """How many ranks compute gradients: all but the last ones, which serve. Split data in so many."""
        return self.strategy.workers(self.world.size)

    @property
    def worker(self) -> int:
        """This rank among the workers; a server's loader is never asked for a batch."""
        return self.world.rank % self.workers

    @property
    def peers(self) -> range:
        """The peers that live on this rank: its rank, or with virtual nodes several."""
        return self._setting.peers.local

    @property
    def weight(self) -> int:
        """1, or 0 where this peer only repeats a batch to keep step with others that have more."""
        return self._setting.weight

    def each_peer(self) -> Iterator[int]:
        """Put every peer of this rank in place in turn, for seeding the generators say."""
        return self._turns.each()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's, with synchronised gradients: for `GradScaler` and clipping utilities."""
        self.synchronize()
        return self.optimizer.param_groups

    def batches(
        self, loader: Iterable[Any] | Sequence[Iterable[Any]], steps: int | None = None
    ) -> Iterator[Any]:
        """The loader's batches; every rank gets as many, so that no rank ever waits for one that left.

        With a method whose peers do not keep step, a rank gets a batch whenever one of its peers is to
        take a step, until `steps` more have been taken; a loader that is through begins again.

        Parameters
        ----------
        loader
            This rank's batches; with virtual nodes a list of loaders, one a peer of this rank.
        steps
            How many steps, for a method whose peers do not keep step; default: the batches of the longest
            loader of all.

        Raises
        ------
        HpcsgdError
            Where a rank has no batch at all, or a loader's `len()` is not what it yields.
        """
        loaders = self._loaders(loader)
        if self.strategy.lockstep:
            found = batches.in_step(loaders, self._setting, self._uneven)
        else:
            found = self._endless.batches(loaders, steps)
        return step_trace.traced(found, self.model, self.world.trace) if self.world.trace.on else found

    def _loaders(self, loader: Any) -> list[Iterable[Any]]:
        each = self._setting.peers.each
        if each == 1:
            return [loader]
        if not isinstance(loader, list | tuple) or len(loader) != each:
            raise BadOption(
                "virtual nodes have a loader each",
                expected=f"a list of {each} loaders, for peers {self.peers[0]} to {self.peers[-1]}",
                got=f"{type(loader).__name__}" + (f" of {len(loader)}" if hasattr(loader, "__len__") else ""),
                everywhere=True,
            )
        return list(loader)

    def accumulate(self) -> Any:
        """Context: backward adds to the gradients without communication; not for the last one of a step."""
        return self.strategy.accumulate()

    def synchronize(self) -> None:
        """Bring the gradients to what the optimizer will see; needed before clipping or reading them."""
        self.strategy.synchronize()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The optimizer's."""
        self.optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        """Take one step with the peer whose turn it is."""
        setting, number = self._setting, self._setting.step
        self.strategy.step(self._update)
        if self.strategy.lockstep:
            self._turns.enter((setting.turn + 1) % setting.peers.each)
            if setting.turn == 0:
                self._count(setting.step + 1)
        setting.taken = True
        setting.begin_step()
        self.world.status.step = setting.step
        self.world.trace.end_step(number)

    def _count(self, steps: int) -> None:
        self._setting.step = self.world.status.step = steps

    def _update(self) -> None:
        if self._unscale():
            with self.world.trace.span("update", "compute"):
                self.optimizer.step()

    def _unscale(self) -> bool:
        # GradScaler leaves these two here for the time of the call.
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        scale: Tensor | None = getattr(self, "grad_scale", None)
        if found_inf is not None and bool(found_inf):
            return False
        if scale is not None:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.div_(scale)
        return True

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the consensus model in place, for evaluation; afterwards training goes on from its own."""
        self._turns.enter(0)
        self._synchronize_buffers()
        with self.strategy.averaged():
            yield

    def consensus_distance(self) -> float:
        """Root mean square over ranks of ||x_i - mean x||; collective."""
        self._turns.enter(0)
        return self.strategy.consensus_distance()

    def state_dict(self) -> dict[str, Any]:
        """All that going on needs: model, optimizer, strategy, number of steps; of this rank."""
        state = {"steps": self.steps, **self._own(), "strategy": self.strategy.state_dict()}
        state["model_step"] = self.strategy.model_step()
        if len(self.peers) > 1:
            state["peers"] = [
                {**copy.deepcopy(self._own()), "generators": rng_state.state()} for _ in self.each_peer()
            ]
        return state

    def _own(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave on this rank; collective.

        Raises
        ------
        Disagreement
            Where the ranks bring states of different steps.
        """
        self.world.agree({"number of steps in the state": state["steps"]})
        self.world.progress.drain()
        for own, _ in zip(state.get("peers", [state]), self.each_peer(), strict=True):
            self.model.load_state_dict(own["model"])
            self.optimizer.load_state_dict(own["optimizer"])
            if "generators" in own:
                rng_state.restore(own["generators"])
        self._count(int(state["steps"]))
        self.strategy.load_state_dict(state["strategy"])

    def close(self) -> None:
        """Finish what is in flight and give the model memory of its own; collective, idempotent."""
        if self._closed:
            return
        self._closed = True
        self.world.progress.drain()
        self._turns.enter(0)
        self.strategy.detach()
        if self._owns_world:
            self.world.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an exception the other ranks are elsewhere: a collective close would wait for them.
        if kind is None:
            self.close()

    def _copy_from_rank_0(self, tensors: list[tuple[str, Tensor]]) -> None:
        if self.world.size == 1:
            return
        group = TensorGroup(self.world, [(n, t) for n, t in tensors if t.numel()])
        with torch.no_grad():
            for name, tensor in tensors:
                if tensor.numel():
                    group.views[name].copy_(tensor)
            collectives.broadcast(group)
            for name, tensor in tensors:
                if tensor.numel():
                    tensor.copy_(group.views[name])

    @torch.no_grad()
    def _synchronize_buffers(self) -> None:
        tensors = list(self.model.named_buffers())
        if self._buffers == "local" or not tensors:
            return
        if self._buffers == "average":
            self._turns.average_buffers()
            floating = [(n, b) for n, b in tensors if b.dtype in SUMMABLE]
            group = TensorGroup(self.world, floating)
            for name, buffer in floating:
                group.views[name].copy_(buffer)
            collectives.allreduce(group)
            for name, buffer in floating:
                buffer.copy_(group.views[name])
            tensors = [(n, b) for n, b in tensors if b.dtype not in SUMMABLE]
        self._copy_from_rank_0(tensors)
        self._turns.spread_buffers()


def _check(option: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise BadOption(f"unknown {option} {value!r}", do="use one of: " + ", ".join(valid))


def _device_of(parameters: list[tuple[str, nn.Parameter]]) -> torch.device:
    return parameters[0][1].device if parameters else torch.device("cpu")
