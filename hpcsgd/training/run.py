"""`Run`: trains one model with an optimizer and a strategy on all ranks of a job."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hpcsgd.compress import build
from hpcsgd.compress.base import Compressor
from hpcsgd.mpi.world import World
from hpcsgd.registry.limits import BucketMib, Count, Natural, PeerCount, Seed
from hpcsgd.strategies import attach
from hpcsgd.strategies.allreduce import AllReduce
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.tensors.fingerprint import describe_tensor, package_versions
from hpcsgd.tensors.group import DEFAULT_BUCKET_MIB
from hpcsgd.training import choices
from hpcsgd.training.buffers import Buffers, named_buffers
from hpcsgd.training.lifetime import Lifetime, starting, world_of_run
from hpcsgd.training.loops import Batches, Loops
from hpcsgd.training.model_copy import check_trainable, copy_from_rank_0
from hpcsgd.training.optimizer_state import copy_optimizer_state, group_sizes
from hpcsgd.training.optimizers import as_optimizer
from hpcsgd.training.run_state import load_peer_state, peer_state, peer_states
from hpcsgd.training.scalars import Scalars
from hpcsgd.training.stepping import Stepping
from hpcsgd.training.sync_batchnorm import SyncBatchNorms
from hpcsgd.training.threads import ComputeThreads
from hpcsgd.training.trained_parameters import TrainedParameters
from hpcsgd.training.virtual_nodes import VirtualNodes


class Run(Scalars):
    """Trains one model on all ranks.

    The model of rank 0 is copied to all ranks, and its optimizer's state where they differ. Call `run.step()`
    instead of `optimizer.step()` and iterate over `run.batches(loader)` instead of `loader`. With a strategy
    that averages gradients, those are the mean when `backward()` returns. With one rank this is plain
    training, bit for bit.

    Parameters
    ----------
    model
        Any module; its parameters and buffers remain the same objects.
    optimizer
        An optimizer of `torch.optim`, one of your own with its usual methods, or a list of such. Parameters
        that the model does not have, for example of a loss, are trained as the model's.
    strategy
        The method of distributed SGD. Default `AllReduce()`.
    comm
        An mpi4py communicator, which is duplicated, or a `World`. Default `MPI.COMM_WORLD`.
    bucket_mib
        Size of a bucket, the unit of communication, in MiB. Default 4.
    algorithm
        The all-reduce algorithm, see `hpcsgd.collectives.iallreduce`. Default "auto".
    buffers
        Treatment of buffers such as BatchNorm's running statistics by `averaged()`: "broadcast" those of
        rank 0 (default), "average" the floating-point ones, or leave them "local".
    buffer_period
        Steps between two synchronisations of the buffers in training; synchronous strategies only.
    unused
        Treatment of a parameter without gradient: it contributes "zeros" (default) or is an "error". One that
        no rank uses keeps no gradient.
    uneven
        Treatment of loaders of different lengths: ranks with fewer batches "join" the remaining steps of
        the others with weight 0 (default), or all "stop" at the end of the shortest.
    compress
        Compression scheme of the strategy's reductions, or its spec, see `hpcsgd.compress`. Default: none.
    seed
        Seed of the random numbers of compression and strategy. Default 0.
    nonfinite
        With compression, NaN or infinity in a gradient is an "error" that names parameter, rank and step
        (default), or all ranks "skip" the step, as GradScaler needs.
    virtual_nodes
        Total number of peers of a gossip strategy, a multiple of the number of ranks. Default: one a rank.
    local
        Patterns of names, such as "head.*", of parameters and buffers that each rank has by itself.
    sparse
        Sparse gradients, where gradients are averaged, are gathered as "rows" (default) or become "dense".
    wait
        When gradients are the mean: after each "backward" pass (default), or from `synchronize` or "step" on.
    check_every
        Steps between two comparisons of the ranks: of the parameters, if these must be equal, and of learning
        rates, steps and batches; 0: none. Default 50.

    Raises
    ------
    Disagreement
        On all ranks, if their models, options or versions differ.
    BadOption
        An option has a value beyond its limits, or that the strategy does not support.
    """

    #: Makes torch's GradScaler leave unscaling and skipping to `step`, which runs on every rank.
    _step_supports_amp_scaling = True

    @starting
    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        strategy: Strategy | None = None,
        *,
        comm: Any = None,
        bucket_mib: BucketMib = DEFAULT_BUCKET_MIB,
        algorithm: choices.Algorithm = "auto",
        buffers: choices.Buffers = "broadcast",
        buffer_period: Count | None = None,
        unused: choices.Unused = "zeros",
        uneven: choices.Uneven = "join",
        compress: Compressor | str | None = None,
        seed: Seed = 0,
        nonfinite: choices.Nonfinite = "error",
        virtual_nodes: PeerCount | None = None,
        local: Sequence[str] = (),
        sparse: choices.Sparse = "rows",
        wait: choices.Wait = "backward",
        check_every: Natural = 50,
    ) -> None:
        self.model = model
        self.optimizer = as_optimizer(optimizer)
        self._trained = TrainedParameters(model, self.optimizer, local)
        parameters = self._trained.named
        self.strategy = strategy or AllReduce()
        compress = build(compress) if isinstance(compress, str) else compress
        self.world: World = world_of_run(comm, str(parameters[0][1].device if parameters else "cpu"))
        self._owns_world = self.world is not comm
        self._lifetime = Lifetime(self, self.strategy, self.world, self._owns_world, parameters)
        self._closed = False
        self._threads = ComputeThreads(self.world)
        common: dict[str, Any] = {
            "bucket_mib": bucket_mib,
            "algorithm": algorithm,
            "unused": unused,
            "seed": seed,
            "nonfinite": nonfinite,
            "virtual_nodes": virtual_nodes,
            "wait": wait,
        }
        common_buffers = named_buffers(model, local)
        check_trainable(model, [*parameters, *common_buffers], self.world.size)
        self.world.check_consistent(
            {
                **package_versions(),
                "strategy": type(self.strategy).__name__,
                **{f"strategy option {k}": v for k, v in self.strategy.options().items()},
                "optimizer": type(optimizer).__name__,
                "list of sizes of parameter groups": group_sizes(self.optimizer, parameters),
                **common,
                "buffers": buffers,
                "buffer_period": buffer_period,
                "uneven": uneven,
                "compress": str(compress),
                "local": list(local),
                "sparse": sparse,
                "check_every": check_every,
                "list of parameters": [describe_tensor(n, p) for n, p in parameters],
                "list of buffers": [describe_tensor(n, b) for n, b in common_buffers],
            }
        )
        copy_from_rank_0(self.world, [*parameters, *common_buffers], bucket_mib)
        copy_optimizer_state(self.world, self.optimizer, parameters, self.strategy, bucket_mib)
        self._context = StrategyContext(
            world=self.world,
            parameters=parameters,
            compress=compress,
            optimizer=self.optimizer,
            model=model,
            sparse_rows=self._trained.with_sparse_gradients() if sparse == "rows" else (),
            **common,
        )
        self._stepping = Stepping(self.strategy, self._context, self._trained, check_every)
        self._stepping.set_steps(0)
        attach(self.strategy, self._context)
        self._batchnorms = SyncBatchNorms(model, self._context, self.strategy)
        self._virtual_nodes = nodes = VirtualNodes(model, self.optimizer, self.strategy, self._context)
        self._buffers = Buffers(nodes, self.strategy, self._context, self._trained, buffers, buffer_period)
        self._stepping.watch(self._buffers)
        self._loops = Loops(self._context, self.strategy, model, nodes, uneven)

    @property
    def steps(self) -> int:
        """Steps taken so far; of an asynchronous strategy the iterations of all peers together."""
        return self._context.step

    @property
    def workers(self) -> int:
        """Number of data shards: of ranks that compute gradients (all but parameter servers)."""
        return self.strategy.workers(self.world.size)

    @property
    def worker(self) -> int:
        """Index of this rank's data shard; the loader of a server is never used."""
        return self.world.rank % self.workers

    @property
    def peers(self) -> range:
        """The peers of this rank: its own number, or with virtual nodes several."""
        return self._context.peers.local

    @property
    def weight(self) -> int:
        """1 if the current batch is a new one, 0 if it repeats the last one because others have more."""
        return self._context.batch_weight

    def each_peer(self) -> Iterator[int]:
        """Put every peer of this rank in place, one after the other, for example to seed its generators."""
        return self._virtual_nodes.each()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups with synchronised gradients, for `GradScaler` and clipping."""
        self.synchronize()
        return self.optimizer.param_groups  # type: ignore[no-any-return]

    def batches(
        self,
        loader: Iterable[Any] | Sequence[Iterable[Any]],
        steps: int | None = None,
        *,
        shard: bool | None = None,
    ) -> Batches:
        """Yield the loader's batches, equally many on every rank: no rank waits for one that has finished.

        The result may be kept: each loop over it begins anew, as one over a DataLoader. With an asynchronous
        strategy a rank gets a batch whenever one of its peers is scheduled, until `steps` more steps have
        been taken; at its end the loader is started again.

        Parameters
        ----------
        loader
            This rank's batches, or a torch DataLoader to be sharded; with virtual nodes one for each peer.
        steps
            Number of steps; at most, with a synchronous strategy. Default: the batches of the longest loader
            of all ranks; of loaders without a length, until each has been at its end.
        shard
            True: each rank takes its part of the batches of a DataLoader; False: all of the loader. Default:
            its part, if the loader has no sampler of the user's own and the ranks have the same data set, as
            its length and some samples show.

        Raises
        ------
        HpcsgdError
            A rank has no batch at all, a loader yields another number of batches than its `len()`, or a batch
            is followed by no gradient, step or `skip`, in a loop with steps.
        """
        return self._loops.batches(loader, steps, shard)

    def accumulate(self) -> Any:
        """Context manager for all backward passes of a step but the last: gradients add up locally."""
        return self._stepping.accumulate()

    def synchronize(self, weight: float | None = None) -> None:
        """Complete the average of the gradients.

        Needed before they are read or changed with `wait="step"`, and with weights, which are known only
        after `backward()`.

        Parameters
        ----------
        weight
            As for `step`.
        """
        self._stepping.check_weight(weight)
        self.strategy.synchronize(weight)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Call `zero_grad` of the optimizer."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], Any] | None = None, *, weight: float | None = None) -> Any:
        """Take one training step with the current peer.

        Parameters
        ----------
        closure
            Computes the loss and its gradients and returns the loss, for optimizers such as L-BFGS. Where
            gradients are averaged, so is the loss: all ranks make the same decisions.
        weight
            Weight of this rank in the mean, for example its number of samples or tokens, on all ranks or on
            none. With `AllReduce` of the gradients of this step, which are then averaged in the step, and are
            this rank's until then; with `LocalSGD` of the models. Default: equal weights.

        Returns
        -------
        object
            The result of the optimizer with a closure; else None.

        Raises
        ------
        HpcsgdError
            Parameters are trained that were not when the run started, and the strategy cannot take them in;
            the ranks are not in the same step; or gradients were changed before they were averaged.
        """
        # A GradScaler sets these attributes on its "optimizer" during the call of step().
        self._stepping.scaling = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        return self._stepping.step(self._virtual_nodes, closure, weight)

    def skip(self) -> None:
        """Leave out one step, in place of `step`: for a batch whose loss is not finite, or without samples.

        Where gradients are averaged, all ranks leave the step out; else only this rank's model stays as it
        is. A schedule must advance all the same, so that learning rates stay equal.
        """
        self._stepping.skip(self._virtual_nodes)

    def check(self) -> None:
        """Compare the ranks now, as every `check_every` steps; collective.

        Raises
        ------
        Disagreement
            On all ranks, with the first parameter or number that differs.
        """
        self._meet_quiescent("run.check()")
        self._stepping.check()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the consensus model in place for evaluation, then restore the own one; collective."""
        self.strategy.check_consensus()
        self._meet_quiescent("run.averaged()")
        with self.strategy.taken_in():
            self._virtual_nodes.select_peer(0)
            with self._buffers.common(), self.strategy.averaged():
                self._stepping.check(equal=True)
                yield

    def consensus_distance(self) -> float:
        """Root mean square over peers of ||x_i - mean x||; collective."""
        self.strategy.check_consensus()
        self._meet_quiescent("run.consensus_distance()")
        with self.strategy.taken_in():
            self._virtual_nodes.select_peer(0)
            return self.strategy.consensus_distance()

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state: model, optimizer, strategy, steps; collective with LASGD and AD-PSGD."""
        if self.strategy.averages_in_background:
            self._meet_quiescent("run.state_dict()")
        trained = self.model, self.optimizer, self._trained
        state = {"steps": self.steps, **peer_state(*trained), "strategy": self.strategy.state_dict()}
        state["model_step"] = self.strategy.model_step()
        if len(self.peers) > 1:
            with self.strategy.taken_in():
                state["peers"] = peer_states(self.each_peer(), *trained)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned on this rank; collective.

        Raises
        ------
        Disagreement
            The states of the ranks are of different steps.
        """
        self._meet_quiescent("run.load_state_dict()")
        self.world.check_consistent({"number of steps in the state": state["steps"]})
        self.world.progress.drain()
        for saved, _ in zip(state.get("peers", [state]), self.each_peer(), strict=True):
            load_peer_state(saved, self.model, self.optimizer, self._trained)
        self._stepping.set_steps(int(state["steps"]))
        self.strategy.load_state_dict(state["strategy"])

    def close(self) -> None:
        """Finish all communication and give the model memory of its own; collective, idempotent."""
        if self._closed or not self._lifetime.is_open:
            return  # not open: left by an exception
        self._closed = True
        self.world.meet("run.close()")
        self._lifetime.close()
        self._batchnorms.detach()
        self.strategy.quiesce()
        self.world.progress.drain()
        self.strategy.check_memory()
        self._virtual_nodes.select_peer(0)
        self._stepping.check(ending=True)
        self._buffers.close()
        self.strategy.detach()
        self._stepping.close()
        self._threads.restore()
        if self._owns_world:
            self.world.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        # After an exception the others do not close: a collective call would wait for them.
        if kind is None:
            self.close()
        else:
            self._lifetime.leave_after(error)
            self._stepping.close()
            self._batchnorms.detach()
