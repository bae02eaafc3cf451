"""The parameters of a model as a tensor group, written by both the optimizer and the collectives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hpcsgd.errors import BadOption, HpcsgdError
from hpcsgd.mpi.world import World
from hpcsgd.tensors.gradients import Named
from hpcsgd.tensors.group import DEFAULT_BUCKET_MIB, TensorGroup
from hpcsgd.tensors.memory import overlapping, place

#: (name in the group, own name, parameter); the names differ if the parameter is the memory of another one.
Bound = tuple[str, str, nn.Parameter]


class Parameters:
    """Moves the trained parameters into a tensor group; module and optimizer keep the same parameter objects.

    Parameters that are the same memory stay so, in the groups and after `release`.

    Parameters
    ----------
    world
        The ranks.
    parameters
        (name, parameter) pairs, without duplicates; those that require no gradient are not moved.
    bucket_mib
        Size of a bucket in MiB. Default 4.
    copies
        Number of groups, with equal initial values; the module uses one at a time. Default 1.
    alone
        Whether no other peer has a model: then nothing is moved, and the groups are empty. Default False.

    Attributes
    ----------
    templates
        The (name, parameter) pairs of a group: the first of those that are the same memory.
    groups
        All groups.
    group
        The group that the module uses; initially the first.

    Raises
    ------
    BadOption
        Parameters share only some of their elements.
    """

    def __init__(
        self,
        world: World,
        parameters: Named,
        bucket_mib: float = DEFAULT_BUCKET_MIB,
        copies: int = 1,
        *,
        alone: bool = False,
    ) -> None:
        self._world = world
        trained = [(name, p) for name, p in parameters if p.requires_grad]
        overlap, self._same_memory = overlapping(trained), grouped_by_memory(trained)
        ties = [[name for name, _ in same] for same in self._same_memory if len(same) > 1]
        world.check_consistent({"list of parameters that share memory": [*ties, overlap or ()]})
        if alone:
            self._same_memory = []  # plain training: they stay where they are
        elif overlap is not None:
            raise _overlap_error(*overlap)
        self.templates = [same[0] for same in self._same_memory]
        self._bound: list[Bound] = [(same[0][0], name, p) for same in self._same_memory for name, p in same]
        self._objects = [p for _, _, p in self._bound]
        self._addresses: list[int] = []
        self.groups = [TensorGroup(world, self.templates, bucket_mib) for _ in range(copies)]
        for group in self.groups:
            for name, parameter in self.templates:
                group.views[name].copy_(parameter.data)
        self._put_in_place(0)

    def select(self, index: int) -> None:
        """Make the module use group number `index`."""
        self.adopt()
        self._put_in_place(index)

    def adopt(self, *, in_update: bool = False) -> None:
        """Take in the values of parameters that have been moved to other memory since, and move them back.

        Compares addresses, and copies nothing if none has moved.

        Parameters
        ----------
        in_update
            Whether an optimizer has just moved them, which might have written to the group as well: then no
            exchange in flight is waited for. Default False.

        Raises
        ------
        HpcsgdError
            A parameter has another shape, dtype or device, or is now the memory of another one.
        """
        if not self._is_in_place():
            if not in_update:
                self._world.progress.drain()  # an exchange in flight reads the group
            moved = self._moved()
            self._check_moved(moved)
            for name, _, parameter in moved:
                self.group.renew(name).copy_(parameter.data)
            self._bind()

    @contextmanager
    def taken_in(self) -> Iterator[None]:
        """Context in which moved parameters are adopted; afterwards they and the group are as before."""
        if self._is_in_place():
            yield
            return
        self._world.progress.drain()
        group, values = self.group, self.copy()
        moved = [(p, p.data) for p in self._objects]
        self.adopt()
        try:
            yield
        finally:
            for bucket, value in zip(group, values, strict=True):
                bucket.flat.copy_(value)
            for parameter, data in moved:
                parameter.data = data

    def release(self) -> None:
        """Copy every parameter to memory of its own."""
        copies = {name: self.group.views[name].clone() for name, _ in self.templates}
        for name, _, parameter in self._bound:
            parameter.data = copies[name]

    def copy(self) -> list[Tensor]:
        """Return a copy of the values, one flat tensor a bucket."""
        return [bucket.flat.clone() for bucket in self.group]

    def restore(self, values: list[Tensor]) -> None:
        """Restore the values of `copy`, and move back parameters that have been moved to other memory."""
        for bucket, value in zip(self.group, values, strict=True):
            bucket.flat.copy_(value)
        if not self._is_in_place():
            for name, _, _ in self._moved():
                self.group.renew(name)
            self._bind()

    def squared_distance(self, values: list[Tensor]) -> float:
        """Return the squared 2-norm, in float64, of the difference between the model and `values`."""
        pairs = zip(self.group, values, strict=True)
        return sum(float(torch.linalg.vector_norm((b.flat - v).double()) ** 2) for b, v in pairs)

    def _put_in_place(self, index: int) -> None:
        self.group = self.groups[index]
        self._bind()

    def _bind(self) -> None:
        views = self.group.views
        for name, _, parameter in self._bound:
            parameter.data = views[name]
        self._addresses = [p.data_ptr() for p in self._objects]

    def _is_in_place(self) -> bool:
        # Numbers, not storages: these may move as a whole, to memory that processes share.
        return [p.data_ptr() for p in self._objects] == self._addresses

    def _moved(self) -> list[Bound]:
        entries = zip(self._bound, self._addresses, strict=True)
        return [entry for entry, address in entries if entry[2].data_ptr() != address]

    def _check_moved(self, moved: Sequence[Bound]) -> None:
        at: dict[int, Bound] = {}
        for bound in moved:
            self._check_form(bound)
            name, own_name, parameter = bound
            other = self._owner(parameter) or at.setdefault(parameter.data_ptr(), bound)
            if parameter.numel() and other[0] != name:
                raise self._error(
                    own_name,
                    expected="memory of its own, as when the run started",
                    got=f"the memory of {other[1]}",
                    do="tie parameters before Run",
                )
        names = {name for name, _, _ in moved}
        for same in self._same_memory if len(self._bound) > len(self.templates) else ():
            if same[0][0] in names:
                self._check_tie(same)

    def _check_form(self, bound: Bound) -> None:
        name, own_name, parameter = bound
        expected, got = _form(self.group.views[name]), _form(parameter)
        if got != expected:
            raise self._error(
                own_name,
                expected=f"{expected}, as when the run started",
                got=got,
                do="convert or move the model before Run; for another use of it, take copy.deepcopy(model)",
            )

    def _check_tie(self, same: Sequence[tuple[str, nn.Parameter]]) -> None:
        (first_name, first), *others = same
        for name, parameter in others:
            if not torch.equal(parameter.data, first.data):
                raise self._error(
                    name,
                    expected=f"the memory of {first_name}, as when the run started",
                    got="memory of its own, with other values",
                    do="change the values of both in place: parameter.data.copy_(values)",
                )

    def _owner(self, parameter: nn.Parameter) -> Bound | None:
        """Return the parameter of a group in whose memory another one lies now."""
        address = parameter.data_ptr()
        for group in self.groups:
            for bucket in group:
                if 0 <= address - bucket.flat.data_ptr() < bucket.nbytes:
                    before = [
                        n for n, v in zip(bucket.names, bucket.views, strict=True) if v.data_ptr() <= address
                    ]
                    return next(bound for bound in self._bound if bound[0] == before[-1])
        return None

    def _error(self, name: str, *, expected: str, got: str, do: str) -> HpcsgdError:
        what = f"parameter {name} has been replaced by another tensor since the run started"
        return HpcsgdError(what, rank=self._world.global_rank, expected=expected, got=got, do=do)


def grouped_by_memory(parameters: Named) -> list[list[tuple[str, nn.Parameter]]]:
    """Return the (name, parameter) pairs in order, those together that are the same memory."""
    found: dict[object, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in parameters:
        found.setdefault(place(parameter) if parameter.numel() else name, []).append((name, parameter))
    return list(found.values())


def _overlap_error(first: str, second: str) -> BadOption:
    if first == second:
        what, do = f"elements of parameter {first} share memory, as those of an expanded tensor", "clone it"
    else:
        what, do = f"parameters {first} and {second} share some of their memory", "clone one of them"
    return BadOption(
        f"{what}: their models cannot be averaged",
        do=f"{do} before Run (parameter.data = parameter.data.clone()), or use AllReduce",
        everywhere=True,
    )


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)} on {tensor.device}"
