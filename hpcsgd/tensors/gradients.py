"""The gradients of a model as a tensor group, which backward fills."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpcsgd.mpi.world import World
from hpcsgd.tensors import misuse
from hpcsgd.tensors.backward_pass import BackwardPass, LastHooks
from hpcsgd.tensors.gradient_values import WithValue, is_not_plus_zero
from hpcsgd.tensors.group import DEFAULT_BUCKET_MIB, Bucket, TensorGroup

Named = Sequence[tuple[str, nn.Parameter]]


class Gradients:
    """Collects gradients in a tensor group and reports each bucket when it is complete.

    Buckets are filled from the last parameter to the first, the order of backward, and are reported strictly
    in that order, which is thus equal on all ranks, in whatever order autograd computes gradients. They are
    reported while backward runs, except for those of the first pass, and of parameters that get several
    gradients in one pass (re-entrant checkpointing), which are reported at its end.

    Parameters
    ----------
    world
        The ranks.
    parameters
        (name, parameter) pairs, without duplicates; those that require no gradient are ignored.
    on_ready
        Called with each bucket when its gradients are complete, from within backward or `finish`.
    on_end
        Called at the end of a backward pass, before `backward()` returns; not while `accumulating`.
    bucket_mib
        Size of a bucket in MiB. Default 4.
    rows
        Names of parameters with sparse gradients, which are not part of the group. Default: none.
    model
        The module whose outputs show the begin of a pass; default: none.

    Attributes
    ----------
    group
        The gradients.
    accumulating
        While True, gradients are added up, and buckets are not reported.
    overlap
        Whether buckets are reported while backward runs. Default True.
    pending
        Whether gradients have been computed that no `finish` has reported yet.
    on_discard
        Called at the begin and the end of a pass with the indices of the gradients that the loop has removed,
        replaced or zeroed since the last one. Default: none.
    sparse
        The parameters with sparse gradients.
    """

    def __init__(
        self,
        world: World,
        parameters: Named,
        on_ready: Callable[[Bucket], None],
        on_end: Callable[[], None] = lambda: None,
        bucket_mib: float = DEFAULT_BUCKET_MIB,
        *,
        rows: Collection[str] = (),
        model: nn.Module | None = None,
    ) -> None:
        trained = [(name, p) for name, p in reversed(parameters) if p.requires_grad]
        dense = [(name, p) for name, p in trained if name not in rows]
        self.sparse = [(name, p) for name, p in trained if name in rows]
        self.group = TensorGroup(world, [(name, _template(p)) for name, p in dense], bucket_mib)
        self._rank = world.global_rank
        self.accumulating, self.overlap, self.pending = False, True, False
        self._on_ready, self._on_end = on_ready, on_end
        self.on_discard: Callable[[list[int]], None] | None = None
        self._names, self._parameters = [name for name, _ in dense], [p for _, p in dense]
        self._all = [*self._parameters, *(p for _, p in self.sparse)]
        self._views = [self.group.views[name] for name in self._names]
        self._addresses = [view.data_ptr() for view in self._views]
        self._aliases = [view.data for view in self._views]
        buckets = {name: bucket.index for bucket in self.group for name in bucket.names}
        self._bucket_of = [buckets[name] for name in self._names]
        positions = {name: index for index, name in enumerate(self._names)}
        self._members = [[positions[name] for name in bucket.names] for bucket in self.group]
        self._versions = [-1] * len(dense)
        #: Gradients of `backward(create_graph=True)`, which further passes differentiate.
        self._with_graph: dict[int, Tensor] = {}
        #: Parameters with several gradients in one pass.
        self._repeated: set[int] = set()
        self._used, self._has_fired = (np.zeros(len(dense), np.bool_) for _ in range(2))
        self._first, self._next, self._running, self._overlapped = True, 0, False, False
        self._fired, self._has_warned = [0] * len(self._parameters), False
        self._pass = BackwardPass(self._end, self._check_ended)
        hooks = [(p, self._make_hook(index)) for index, p in enumerate(self._parameters)]
        hooks += [(p, self._on_rows) for _, p in self.sparse]
        self._own_hooks = LastHooks(hooks)
        self._hooks: list[Any] = [self._own_hooks]
        if trained and model is not None:
            self._hooks += self._pass.watch(model)

    def _begin(self, first: int | None) -> None:
        """Begin a pass, in which a parameter has got its gradient."""
        self.report_discarded(first)
        self.group.world.calls.begin_step()
        self._running = True
        self._look_for_views(first)
        # A hook of the user behind ours changes the gradient after ours has seen it.
        self._overlapped = self.overlap and not self._first and self._own_hooks.are_last()
        self._fired = [0] * len(self._parameters)
        self._missing_counts = [len(bucket.names) for bucket in self.group]

    def _look_for_views(self, first: int | None) -> None:
        """Warn of views that were gradients before the pass, which has begun with that of `first`."""
        for index, (parameter, alias) in enumerate(zip(self._parameters, self._aliases, strict=True)):
            gradient = parameter.grad
            if gradient is not None and gradient is not alias and index != first and gradient._is_view():
                if not self._has_warned:
                    misuse.warn_of_view(self._names[index], self._rank)
                self._has_warned = True
                return

    def _make_hook(self, index: int) -> Callable[[Tensor], None]:
        def on_gradient(parameter: Tensor) -> None:
            nested = self._enter(index)
            self._fired[index] += 1
            self._has_fired[index] = True
            repeated = nested or self._fired[index] > 1
            if repeated:
                self._check_not_reported(index)
                self._repeated.add(index)
            self._bind(index, parameter)
            if self._overlapped and not self.accumulating and index not in self._repeated:
                self._mark_complete(index)

        return on_gradient

    def _on_rows(self, parameter: Tensor) -> None:
        self._enter()

    def _enter(self, index: int | None = None) -> bool:
        """Begin a pass with its first gradient; return whether it is inside another pass."""
        nested = self._pass.enter()
        if not self._running:
            self._check_ended()
            self._begin(index)
        self.pending = True
        return nested

    def _check_ended(self) -> None:
        """Check, before a new pass, that the last one has left no bucket between report and `finish`."""
        if self._next:
            raise misuse.not_finished(self._rank)
        self._running = False

    def _end(self) -> None:
        # Without a gradient of a parameter it was a call of torch.autograd.grad.
        found, self._running = self._running, False
        if not self._overlapped:
            self._own_hooks.move_to_end()
        if found and not self.accumulating:
            self._on_end()

    def _check_not_reported(self, index: int) -> None:
        if self._bucket_of[index] < self._next:
            raise misuse.late_gradient(self._names[index], self._rank)

    def _bind(self, index: int, parameter: Tensor) -> None:
        """Move the parameter's gradient into the group, if it is not there."""
        gradient = parameter.grad
        if gradient is None:
            return
        alias = self._alias(index)
        if gradient is not alias:
            self._copy(index, alias, gradient)
            if gradient.requires_grad:
                self._with_graph[index] = gradient
                return
            parameter.grad = alias
        self._versions[index] = alias._version

    def _copy(self, index: int, alias: Tensor, gradient: Tensor) -> None:
        if gradient.dtype != alias.dtype:
            raise misuse.other_dtype(self._names[index], alias.dtype, gradient.dtype, self._rank)
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        alias.copy_(gradient.detach() if gradient.requires_grad else gradient)

    def _alias(self, index: int) -> Tensor:
        """A tensor over the memory of a view, with a version of its own.

        The view itself is never handed out, for its `data` may be replaced.
        """
        address = self._addresses[index]
        if self._aliases[index].data_ptr() != address:
            if self._views[index].data_ptr() != address:  # `model.share_memory()` moves storages
                self._views[index] = self.group.renew(self._names[index])
            self._aliases[index] = self._views[index].data
        return self._aliases[index]

    def _mark_complete(self, index: int) -> None:
        self._missing_counts[self._bucket_of[index]] -= 1
        while self._next < len(self._missing_counts) and self._missing_counts[self._next] == 0:
            self._on_ready(self.group.buckets[self._next])
            self._next += 1

    def finish(self, *, late: bool = False) -> None:
        """Move all gradients into the group and report the remaining buckets; one without counts as zeros.

        Parameters
        ----------
        late
            Whether the user's code has run since the end of backward: gradients that it has zeroed or removed
            are discarded. Default False.

        Raises
        ------
        HpcsgdError
            A gradient was changed between backward and a `late` call; or it was removed within backward.
        """
        self._running = self.pending = self._first = False
        self.report_discarded()
        self.on_discard = None
        present = [parameter.grad is not None for parameter in self._parameters]
        self._used |= np.array(present, np.bool_)
        for index, fired in enumerate(self._fired):
            if fired and (late or not present[index]):
                self._check_unchanged(index, self._parameters[index].grad, late)
        for index in itertools.chain.from_iterable(self._members[self._next :]):
            if present[index]:
                self._bind(index, self._parameters[index])
            else:
                self._alias(index).zero_()
        reported, self._next = self._next, 0
        self._fired = [0] * len(self._parameters)
        for bucket in self.group.buckets[reported:]:
            self._on_ready(bucket)

    @property
    def is_reporting(self) -> bool:
        """Whether buckets have been reported of a pass that no `finish` has completed yet."""
        return self._next > 0

    def deliver(self, chosen: np.ndarray | None = None) -> None:
        """Make the group's values the gradients of all or chosen parameters, also of those that had none."""
        for index, (parameter, alias) in enumerate(zip(self._parameters, self._aliases, strict=True)):
            if parameter.grad is not alias and (chosen is None or chosen[index]):
                self._deliver(index, parameter)
        self._with_graph.clear()

    def _deliver(self, index: int, parameter: Tensor) -> None:
        graph = self._with_graph.get(index)
        if graph is None:
            parameter.grad = alias = self._alias(index)
            self._versions[index] = alias._version
        elif parameter.grad is graph:
            # The value is the group's, the derivative this rank's: a further pass averages it.
            parameter.grad = WithValue.apply(graph, self._alias(index))  # type: ignore[no-untyped-call]

    def copies(self) -> list[Tensor | None]:
        """Return copies of all gradients, dense and sparse ones."""
        return [None if p.grad is None else p.grad.detach().clone() for p in self._all]

    def begin_again(self) -> None:
        """Begin with zeros in place of all gradients; the parameters count as used."""
        present = [index for index, p in enumerate(self._parameters) if p.grad is not None]
        self.zero()
        for index in present:
            self._used[index] = True
            self._alias(index).fill_(-0.0)  # changes no sum, and is not what `zero_grad` leaves
            self._deliver(index, self._parameters[index])
        self.pending = False

    def report_discarded(self, first: int | None = None) -> None:
        """Call `on_discard` now, in a pass that has begun with the gradient of parameter `first`."""
        if self.on_discard is not None:
            indices = range(len(self._parameters))
            self.on_discard([index for index in indices if self._is_discarded(index, index == first)])

    def _is_discarded(self, index: int, has_added: bool) -> bool:
        """Whether the loop has thrown a gradient away, to which this pass may have added already."""
        gradient, alias = self._parameters[index].grad, self._aliases[index]
        if gradient is not alias:
            has_graph = gradient is not None and gradient.requires_grad
            return not (has_graph and (has_added or gradient is self._with_graph.get(index)))
        if alias._version <= self._versions[index] + has_added:
            return False
        return has_added or not is_not_plus_zero(alias)

    def add(self, bucket: Bucket, other: Sequence[Tensor | None], factor: float) -> None:
        """Add a multiple of other gradients, from `copies`, to a bucket that is ready."""
        for index in self._members[bucket.index]:
            if (gradient := other[index]) is not None:
                self._views[index].add_(gradient, alpha=factor)  # not the alias, whose version counts changes

    def put_back(self, other: Sequence[Tensor | None]) -> None:
        """Add other gradients, from `copies`, to the present ones."""
        for parameter, gradient in zip(self._all, other, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._fired = [0] * len(self._parameters)
        self.pending = True

    def restore(self, copies: list[Tensor | None]) -> None:
        """Replace all gradients by those of `copies`; an error if one was changed since `deliver`."""
        for index, parameter in enumerate(self._parameters):
            self._check_unchanged(index, parameter.grad, late=True)
        for parameter, gradient in zip(self._all, copies, strict=True):
            parameter.grad = gradient

    def are_replaced(self) -> bool:
        """Return whether a parameter has a gradient that is not part of the group, set without backward."""
        entries = zip(self._parameters, self._aliases, strict=True)
        return any(p.grad is not None and p.grad is not alias for p, alias in entries)

    def used(self) -> np.ndarray:
        """Return whether each parameter has had a gradient since the last `settle`."""
        return self._used.copy()

    def unused(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that have had no gradient before this pass since the last `settle`."""
        rows = zip(self._names, self._parameters, self._used, strict=True)
        yield from ((name, p) for name, p, used in rows if not used)

    def set_by_hand(self) -> np.ndarray:
        """Return for each parameter whether its gradient is from no backward pass since the last `settle`."""
        found = np.zeros(len(self._parameters), np.bool_)
        for index in np.flatnonzero(~self._has_fired).tolist():
            gradient = self._parameters[index].grad
            is_same = gradient is self._aliases[index] and gradient._version == self._versions[index]
            if gradient is not None and not is_same and index not in self._with_graph:
                found[index] = bool(gradient.any())  # clipping changes zeros too
        return found

    def settle(self, used: np.ndarray) -> None:
        """Remove the gradients of parameters that no rank has `used`: optimizers leave these as they are."""
        for index in np.flatnonzero(~used):
            self._parameters[index].grad = None
        self._used[:] = self._has_fired[:] = False

    def zero(self) -> None:
        """Discard all gradients of this rank: they count as zeros."""
        for index, parameter in enumerate(self._parameters):
            parameter.grad = None
            if self._bucket_of[index] >= self._next:
                self._alias(index).zero_()
        for _, parameter in self.sparse:
            parameter.grad = None
        self._fired = [0] * len(self._parameters)
        self._with_graph.clear()

    def collect(self, chosen: np.ndarray | None = None) -> list[Bucket]:
        """Move gradients set since `deliver` into the group, all or those chosen; return their buckets."""
        indices = np.flatnonzero(np.ones(len(self._parameters)) if chosen is None else chosen).tolist()
        for index in indices:
            if self._parameters[index].grad is None:
                self._alias(index).zero_()
            else:
                self._bind(index, self._parameters[index])
        return [self.group.buckets[number] for number in sorted({self._bucket_of[i] for i in indices})]

    def release(self) -> None:
        """Remove the hooks and copy every gradient to memory of its own."""
        self.disconnect()
        for index, parameter in enumerate(self._parameters):
            if parameter.grad is not None and parameter.grad.data_ptr() == self._addresses[index]:
                parameter.grad = parameter.grad.detach().clone()

    def disconnect(self) -> None:
        """Remove the hooks; gradients and buckets stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        # They refer to the strategy, which refers to this object and its memory.
        self._on_ready = self._on_end = self._pass = self.on_discard = None  # type: ignore[assignment]

    def _check_unchanged(self, index: int, gradient: Tensor | None, late: bool) -> None:
        """Check that a gradient is the one that backward has left."""
        if gradient is None and not late:
            raise misuse.removed_gradient(self._names[index], self._rank)
        if not late or gradient is None or index in self._with_graph:
            return
        if gradient is self._aliases[index] and gradient._version == self._versions[index]:
            return
        if bool(gradient.any()):
            raise misuse.changed_gradient(self._names[index], self._rank)


def _template(parameter: nn.Parameter) -> Tensor:
    """A tensor of the shape, strides and dtype of a parameter's gradient."""
    dtype = parameter.grad_dtype or parameter.dtype
    return parameter if dtype == parameter.dtype else torch.empty_like(parameter, dtype=dtype, device="meta")
