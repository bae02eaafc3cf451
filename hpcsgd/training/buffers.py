"""Buffers such as BatchNorm's running statistics: common to all ranks, or each rank's own."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from hpcsgd.collectives import allreduce
from hpcsgd.errors import BadOption, HpcsgdError
from hpcsgd.mpi.world import World
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.tensors.group import SUMMABLE, TensorGroup
from hpcsgd.tensors.memory import overwrite, without_repetition
from hpcsgd.training.drift import checksum
from hpcsgd.training.model_copy import RootCopy
from hpcsgd.training.trained_parameters import TrainedParameters
from hpcsgd.training.virtual_nodes import VirtualNodes

Named = list[tuple[str, Tensor]]


def named_buffers(model: nn.Module, local: Sequence[str] = ()) -> Named:
    """Return the (name, buffer) pairs of a model, without those whose names match a pattern of `local`."""
    return [
        (name, buffer)
        for name, buffer in model.named_buffers()
        if not any(fnmatchcase(name.replace("_orig_mod.", ""), pattern) for pattern in local)
    ]


def has_equal_frozen(strategy: Strategy, world: World) -> bool:
    """Return whether frozen parameters must be equal on all ranks, as the models that train are."""
    return strategy.averages_gradients and strategy.workers(world.size) == world.size


class Buffers:
    """Makes the buffers of all ranks equal: for an evaluation, every few steps, and at the end.

    Buffers are found by name at each use, so a module may replace them. Frozen parameters that a loop changes
    differently on each rank, as those of a target network that follows the rank's model, are treated as
    buffers in an evaluation and at the end.

    Parameters
    ----------
    nodes, strategy, context, trained
        Those of the run; buffers that a pattern of `trained` names are left alone.
    treatment
        "broadcast" those of rank 0, "average" the floating-point and complex ones, or leave them "local".
    period
        Steps between two synchronisations during training; None: none.

    Raises
    ------
    BadOption
        A period below 1, or one that the treatment or the strategy does not allow.
    """

    def __init__(
        self,
        nodes: VirtualNodes,
        strategy: Strategy,
        context: StrategyContext,
        trained: TrainedParameters,
        treatment: str,
        period: int | None = None,
    ) -> None:
        _check_period(period, treatment, strategy)
        assert context.model is not None
        self._model, self._nodes, self._context = context.model, nodes, context
        self._workers = strategy.workers(context.world.size)
        self._treatment, self._period, self._local = treatment, period, trained.patterns
        self._trained, self._strategy = trained, strategy
        self._root_copy = RootCopy(context.world, context.bucket_mib)
        self._mean: tuple[int, TensorGroup] | None = None

    @property
    def _is_inactive(self) -> bool:
        return self._treatment == "local" or self._context.peers.size == 1

    def of_training(self) -> Named:
        """Return the buffers that training may use, and that nothing makes equal until its end.

        There are none with a period. Statistics of normalisation, which training does not use, are left out.
        """
        if self._is_inactive or self._period is not None or not self._strategy.averages_gradients:
            return []
        statistics = {
            id(buffer)
            for module in self._model.modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            for buffer in module.buffers(recurse=False)
        }
        named = self._of_model()
        return [(name, b) for name, b in named if id(b) not in statistics and _is_dense_layout(b)]

    @contextmanager
    def common(self) -> Iterator[None]:
        """Context with common buffers, at the end of which each rank has its own back; collective."""
        if self._is_inactive:
            yield
            return
        frozen = self._unequal_frozen()
        saved = [
            (name, b, without_repetition(b).clone())
            for name, b in [*self._of_model(), *frozen]
            if _is_dense_layout(b)
        ]
        try:
            self.synchronize(frozen)
            yield
        finally:
            self._restore(saved)

    def after_step(self) -> None:
        """Synchronise the buffers of all peers if it is time to, at the end of a step; collective."""
        if self._period and self._context.step % self._period == 0:
            self.synchronize(all_peers=True)

    @torch.no_grad()
    def synchronize(self, frozen: Sequence[tuple[str, Tensor]] = (), *, all_peers: bool = False) -> None:
        """Make the buffers of the peer in place equal on all ranks; collective.

        Parameters
        ----------
        frozen
            Frozen parameters that are treated as buffers. Default: none.
        all_peers
            Whether all peers of a rank get them. Default False.

        Raises
        ------
        HpcsgdError
            On all ranks, if names, shapes or dtypes differ.
        """
        if self._is_inactive:
            return
        peers = [[*self._shared(each), *frozen] for each in self._nodes.buffers()]
        number = self._check_equal_lists(peers)
        first = peers[self._context.current_peer_index]
        averaged = [self._treatment == "average" and _can_be_averaged(b) for _, b in first]
        if any(averaged):
            self._average(number, peers, averaged)
        self._root_copy.copy([each for each, is_mean in zip(first, averaged, strict=True) if not is_mean])
        for peer in peers if all_peers else ():
            for (_, target), (_, source) in zip(peer, first, strict=True):
                if target is not source and _is_dense_layout(target):
                    _overwrite(target, without_repetition(source))

    def close(self) -> None:
        """Leave common buffers; collective."""
        if not self._is_inactive:
            self.synchronize(self._unequal_frozen())
        # The last views of the shared memory.
        self._mean = None
        self._root_copy = RootCopy(self._context.world)

    def _unequal_frozen(self) -> Named:
        """The frozen parameters that differ between ranks and may; collective."""
        world = self._context.world
        if has_equal_frozen(self._strategy, world):
            return []
        frozen = self._trained.frozen()
        rows = world.gather([checksum(p) for _, p in frozen], "the comparison of frozen parameters")
        return [each for each, *sums in zip(frozen, *rows, strict=True) if len({*sums}) > 1]

    def _of_model(self) -> Named:
        return self._shared(list(self._model.named_buffers()))

    def _shared(self, buffers: Named) -> Named:
        names = {name for name, _ in named_buffers(self._model, self._local)}
        return [(name, buffer) for name, buffer in buffers if name in names]

    def _check_equal_lists(self, peers: list[Named]) -> int:
        """Check that all peers have equal lists of buffers, and return a checksum of the list."""
        world, lists = self._context.world, [[_describe(*each) for each in peer] for peer in peers]
        number = zlib.crc32(repr(lists).encode())
        # Checksums first: lists are long, and nearly always equal.
        numbers = world.gather((number, all(each == lists[0] for each in lists)), "the comparison of buffers")
        if any(each != (number, True) for each in numbers):
            found = [
                (r, each)
                for r, of_rank in enumerate(world.gather(lists, "the lists of buffers"))
                for each in of_rank
            ]
            raise _unequal_error(found)
        return number

    def _average(self, number: int, peers: list[Named], averaged: list[bool]) -> None:
        first = peers[self._context.current_peer_index]
        if self._mean is None or self._mean[0] != number:
            self._mean = None  # the old one is freed first
            templates = [
                (name, without_repetition(b))
                for (name, b), is_mean in zip(first, averaged, strict=True)
                if is_mean
            ]
            self._mean = number, TensorGroup(self._context.world, templates, self._context.bucket_mib)
        group = self._mean[1]
        for index, (name, _) in enumerate(first):
            if averaged[index]:
                values = [without_repetition(peer[index][1]) for peer in peers]
                group.views[name].copy_(values[0] if len(values) == 1 else torch.stack(values).mean(0))
        if self._context.world.rank >= self._workers:  # a server's rank, which has run no batch
            for bucket in group:
                bucket.flat.zero_()
        allreduce(group, 1.0 / self._workers, self._context.algorithm)
        for name, buffer in first:
            if name in group.views:
                _overwrite(buffer, group.views[name])
        if self._period is None:
            self._mean = None

    @torch.no_grad()
    def _restore(self, saved: list[tuple[str, Tensor, Tensor]]) -> None:
        present = dict(self._model.named_buffers())
        for name, buffer, value in saved:
            _overwrite(buffer, value)
            if present.get(name) is not buffer and not isinstance(buffer, nn.Parameter):
                path, _, key = name.rpartition(".")
                self._model.get_submodule(path)._buffers[key] = buffer


def _overwrite(buffer: Tensor, value: Tensor) -> None:
    overwrite([without_repetition(buffer)], [value])


def _is_dense_layout(buffer: Tensor) -> bool:
    return buffer.layout == torch.strided and not buffer.is_quantized


def _can_be_averaged(buffer: Tensor) -> bool:
    return _is_dense_layout(buffer) and (buffer.dtype in SUMMABLE or buffer.is_complex())


def _describe(name: str, buffer: Tensor) -> tuple[str, str]:
    text = f"{str(buffer.dtype).removeprefix('torch.')} of shape {tuple(buffer.shape)}"
    if not _is_dense_layout(buffer):
        return name, f"{buffer.layout} {text}"
    stored = tuple(without_repetition(buffer).shape)
    return name, text if stored == tuple(buffer.shape) else f"{text}, expanded from {stored}"


def _unequal_error(found: list[tuple[int, list[tuple[str, str]]]]) -> HpcsgdError:
    """Return the error for lists of (name, description), each with its rank, that differ."""
    tables = [(rank, dict(each)) for rank, each in found]
    expected = tables[0][1]
    names = [*expected, *(name for _, table in tables for name in table)]
    name = next((n for n in names if any(table.get(n) != expected.get(n) for _, table in tables)), names[0])
    ranks = sorted({rank for rank, table in tables if table.get(name) != expected.get(name)})
    got = next((table.get(name) for rank, table in tables if rank in ranks), None)
    return HpcsgdError(
        f"buffer {name} differs from that of rank 0",
        rank=ranks,
        expected=f"{expected.get(name, 'no such buffer')} (rank 0)",
        got=got or "no such buffer",
        do=f"leave it to each rank: Run(..., local=[{name!r}]), or all buffers: Run(..., buffers='local')",
        everywhere=True,
    )


def _check_period(period: int | None, treatment: str, strategy: Strategy) -> None:
    if period is None:
        return
    if treatment == "local":
        raise BadOption(
            "buffer_period synchronises buffers, which buffers='local' leaves alone",
            do="set buffers to 'broadcast' or 'average', or leave buffer_period out",
            everywhere=True,
        )
    if not strategy.synchronous:
        raise BadOption(
            f"{type(strategy).__name__} has no steps that all ranks take together, as buffer_period needs",
            do="leave buffer_period out: buffers are synchronised by averaged() and close()",
            everywhere=True,
        )
