"""`Run`: trains one model with an optimizer and a strategy on all ranks of a job."""

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
from hpcsgd.strategies import AllReduce, Strategy, StrategyContext
from hpcsgd.tensors.fingerprint import describe_tensor, package_versions
from hpcsgd.tensors.group import DEFAULT_BUCKET_MIB, SUMMABLE, TensorGroup
from hpcsgd.training import batches, rng_state, step_trace
from hpcsgd.training.virtual_nodes import VirtualNodes


class Run:
    """Trains one model on all ranks.

    The model of rank 0 is copied to all ranks; the optimizer may already have state. Call `run.step()`
    instead of `optimizer.step()` and iterate over `run.batches(loader)` instead of `loader`. With one
    rank this is plain training, bit for bit.

    Parameters
    ----------
    model
        Any module; its parameters and buffers remain the same objects.
    optimizer
        Any `torch.optim` optimizer of the model's parameters.
    strategy
        The method of distributed SGD. Default `AllReduce()`.
    comm
        An mpi4py communicator, which is duplicated, or a `World`, which is used as it is. Default
        `MPI.COMM_WORLD`.
    bucket_mib
        Size of a bucket, the unit of communication, in MiB. Default 4.
    algorithm
        The all-reduce algorithm, see `hpcsgd.collectives.iallreduce`. Default "auto".
    buffers
        Treatment of buffers such as BatchNorm's running statistics by `averaged()`: "broadcast" those of
        rank 0 (default), "average" the floating-point ones, or leave them "local".
    unused
        Treatment of a parameter without gradient: it contributes "zeros" (default) or is an "error".
    uneven
        Treatment of loaders of different lengths: ranks with fewer batches "join" the remaining steps of
        the others with weight 0 (default), or all "stop" at the end of the shortest.
    compress
        Compression scheme of the strategy's reductions, see `hpcsgd.compress`. Default: no compression.
    seed
        Seed of the random numbers of compression and strategy. Default 0.
    nonfinite
        With compression, NaN or infinity in a gradient is an "error" that names parameter, rank and step
        (default), or all ranks "skip" the step, as GradScaler needs.
    virtual_nodes
        Total number of peers of a gossip strategy, a multiple of the number of ranks: each rank then trains
        several models, one after the other, with the same result as one rank for each. Default: one a rank.

    Raises
    ------
    Disagreement
        On all ranks, if their models, options or versions differ.
    BadOption
        An option has a value that does not exist, or that the strategy does not support.
    """

    #: Makes torch's GradScaler leave unscaling and skipping to `step`, which runs on every rank.
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
            torch.set_num_threads(self.world.local.threads)
        self.world.check_consistent(
            {
                **package_versions(),
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
                "list of parameters": [describe_tensor(n, p) for n, p in parameters],
                "list of buffers": [describe_tensor(n, b) for n, b in model.named_buffers()],
            }
        )
        self._copy_from_rank_0([*parameters, *model.named_buffers()])
        self._context = StrategyContext(
            world=self.world,
            parameters=parameters,
            bucket_mib=bucket_mib,
            algorithm=algorithm,
            unused=unused,
            compress=compress,
            seed=seed,
            nonfinite=nonfinite,
            virtual_nodes=virtual_nodes,
            optimizer=optimizer,
            unscale=self._unscale,
        )
        self._set_steps(0)
        self.strategy.attach(self._context)
        self._virtual_nodes = VirtualNodes(model, optimizer, self.strategy, self._context)
        self._asynchronous_batches = batches.AsynchronousBatches(
            self._context, self.strategy, self._virtual_nodes
        )

    @property
    def steps(self) -> int:
        """Steps taken so far; of an asynchronous strategy the iterations of all peers together."""
        return self._context.step

    @property
    def workers(self) -> int:
        """Number of ranks that compute gradients (all but parameter servers): the number of data shards."""
        return self.strategy.workers(self.world.size)

    @property
    def worker(self) -> int:
        """Index of this rank among the workers, its data shard; the loader of a server is never used."""
        return self.world.rank % self.workers

    @property
    def peers(self) -> range:
        """The peers of this rank: its own number, or with virtual nodes several."""
        return self._context.peers.local

    @property
    def weight(self) -> int:
        """Weight of the current batch: 1, or 0 if it only repeats the last one because others have more."""
        return self._context.weight

    def each_peer(self) -> Iterator[int]:
        """Put every peer of this rank in place, one after the other, for example to seed its generators."""
        return self._virtual_nodes.each()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups with synchronised gradients, for `GradScaler` and clipping."""
        self.synchronize()
        return self.optimizer.param_groups

    def batches(
        self, loader: Iterable[Any] | Sequence[Iterable[Any]], steps: int | None = None
    ) -> Iterator[Any]:
        """Yield the loader's batches, equally many on every rank: no rank waits for one that has finished.

        With an asynchronous strategy a rank gets a batch whenever one of its peers is scheduled, until
        `steps` more steps have been taken; at its end the loader is started again.

        Parameters
        ----------
        loader
            The batches of this rank; with virtual nodes a list of loaders, one for each peer of this rank.
        steps
            Number of steps of an asynchronous strategy. Default: the batches of the longest loader of all
            ranks. Ignored by synchronous strategies.

        Raises
        ------
        HpcsgdError
            A rank has no batch at all, or a loader yields another number of batches than its `len()`.
        """
        loaders = self._loaders(loader)
        if self.strategy.synchronous:
            found = batches.synchronous_batches(loaders, self._context, self._uneven)
        else:
            found = self._asynchronous_batches.batches(loaders, steps)
        return step_trace.trace_steps(found, self.model, self.world.tracer) if self.world.tracer.on else found

    def _loaders(self, loader: Any) -> list[Iterable[Any]]:
        each = self._context.peers.per_rank
        if each == 1:
            return [loader]
        if not isinstance(loader, list | tuple) or len(loader) != each:
            raise BadOption(
                "virtual nodes need a loader each",
                expected=f"a list of {each} loaders, for peers {self.peers[0]} to {self.peers[-1]}",
                got=f"{type(loader).__name__}" + (f" of {len(loader)}" if hasattr(loader, "__len__") else ""),
                do="call run.batches([loader, ...]), one loader for each of run.peers",
                everywhere=True,
            )
        return list(loader)

    def accumulate(self) -> Any:
        """Context manager for all backward passes of a step but the last: gradients add up locally."""
        return self.strategy.accumulate()

    def synchronize(self) -> None:
        """Complete the reduction of the gradients; needed before they are clipped or read."""
        self.strategy.synchronize()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Call `zero_grad` of the optimizer."""
        self.optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        """Take one training step with the current peer."""
        context, number = self._context, self._context.step
        self.strategy.check_memory()
        self.strategy.step(self._update)
        if self.strategy.synchronous:
            self._virtual_nodes.select_peer((context.current_peer_index + 1) % context.peers.per_rank)
            if context.current_peer_index == 0:
                self._set_steps(context.step + 1)
        context.step_taken = True
        context.begin_step()
        self.world.activity.step = context.step
        self.world.tracer.end_step(number)

    def _set_steps(self, steps: int) -> None:
        self._context.step = self.world.activity.step = steps

    def _update(self) -> None:
        if self._unscale():
            with self.world.tracer.span("update", "compute"):
                self.optimizer.step()

    def _unscale(self) -> bool:
        # GradScaler sets these two attributes on its "optimizer" during the call of step().
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
        """Put the consensus model in place for evaluation, then restore the own one; collective."""
        self.strategy.check_memory()
        self._virtual_nodes.select_peer(0)
        self._synchronize_buffers()
        with self.strategy.averaged():
            yield

    def consensus_distance(self) -> float:
        """Root mean square over peers of ||x_i - mean x||; collective."""
        self.strategy.check_memory()
        self._virtual_nodes.select_peer(0)
        return self.strategy.consensus_distance()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank: model, optimizer, strategy, number of steps."""
        self.strategy.check_memory()
        state = {"steps": self.steps, **self._peer_state(), "strategy": self.strategy.state_dict()}
        state["model_step"] = self.strategy.model_step()
        if len(self.peers) > 1:
            state["peers"] = [
                {**copy.deepcopy(self._peer_state()), "generators": rng_state.state()}
                for _ in self.each_peer()
            ]
        return state

    def _peer_state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned on this rank; collective.

        Raises
        ------
        Disagreement
            The states of the ranks are of different steps.
        """
        self.world.check_consistent({"number of steps in the state": state["steps"]})
        self.world.progress.drain()
        for saved, _ in zip(state.get("peers", [state]), self.each_peer(), strict=True):
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            if "generators" in saved:
                rng_state.restore(saved["generators"])
        self._set_steps(int(state["steps"]))
        self.strategy.load_state_dict(state["strategy"])

    def close(self) -> None:
        """Finish all communication and give the model memory of its own; collective, idempotent."""
        if self._closed:
            return
        self._closed = True
        self.world.progress.drain()
        self.strategy.check_memory()
        self._virtual_nodes.select_peer(0)
        self.strategy.detach()
        if self._owns_world:
            self.world.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an exception the other ranks do not close: a collective call would wait for them.
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
            self._virtual_nodes.average_buffers()
            floating = [(n, b) for n, b in tensors if b.dtype in SUMMABLE]
            group = TensorGroup(self.world, floating)
            for name, buffer in floating:
                group.views[name].copy_(buffer)
            collectives.allreduce(group)
            for name, buffer in floating:
                buffer.copy_(group.views[name])
            tensors = [(n, b) for n, b in tensors if b.dtype not in SUMMABLE]
        self._copy_from_rank_0(tensors)
        self._virtual_nodes.broadcast_buffers()


def _check(option: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise BadOption(f"unknown {option} {value!r}", do="use one of: " + ", ".join(valid))


def _device_of(parameters: list[tuple[str, nn.Parameter]]) -> torch.device:
    return parameters[0][1].device if parameters else torch.device("cpu")
