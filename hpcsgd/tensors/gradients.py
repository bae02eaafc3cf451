"""The gradients of a model as a tensor group, which backward fills."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.world import World
from hpcsgd.tensors.group import DEFAULT_BUCKET_MIB, Bucket, TensorGroup

Named = Sequence[tuple[str, nn.Parameter]]


class Gradients:
    """Collects gradients in a tensor group and reports each bucket when it is complete.

    Buckets are filled from the last parameter to the first, the order of backward, and are reported strictly
    in that order, which is thus equal on all ranks, in whatever order autograd computes gradients.

    Parameters
    ----------
    world
        The ranks.
    parameters
        (name, parameter) pairs, without duplicates; those that require no gradient are ignored.
    on_ready
        Called with each bucket when its gradients are complete, from within backward or `finish`.
    bucket_mib
        Size of a bucket in MiB. Default 4.
    unused
        Treatment of a parameter without a gradient: "zeros" (default), or "error".

    Attributes
    ----------
    group
        The gradients.
    accumulating
        While True, gradients are added up, and buckets are not reported.
    """

    def __init__(
        self,
        world: World,
        parameters: Named,
        on_ready: Callable[[Bucket], None],
        bucket_mib: float = DEFAULT_BUCKET_MIB,
        unused: str = "zeros",
    ) -> None:
        trainable = [(name, p) for name, p in reversed(parameters) if p.requires_grad]
        self.group = TensorGroup(world, trainable, bucket_mib)
        self.accumulating = False
        self._parameters = trainable
        self._on_ready = on_ready
        self._unused = unused
        self._bucket_of = {n: bucket for bucket in self.group for n in bucket.names}
        self._finished = False
        self._next = 0
        self._complete = set[str]()
        self._hooks: list[RemovableHandle] = []
        self._missing_counts: list[int] = []
        self.reset()
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._make_hook(name))  # type: ignore[no-untyped-call]
            for name, p in trainable
        ]

    def finish(self) -> None:
        """Report the remaining buckets; a parameter without a gradient contributes zeros.

        From here on until `reset`, further gradients are an error, and this method does nothing.

        Raises
        ------
        HpcsgdError
            A parameter has no gradient, and `unused` is "error".
        """
        if self._finished:
            return
        self._finished = True
        missing = [name for name, p in self._parameters if p.grad is None]
        if missing and self._unused == "error":
            raise HpcsgdError(
                f"parameters without a gradient: {', '.join(missing)}",
                rank=self.group.world.global_rank,
                got="unused='error'",
                do="use them in the loss, freeze them, or let them contribute zeros (unused='zeros')",
            )
        for name, p in self._parameters:
            # On a single rank, a parameter without a gradient keeps none, so the optimizer skips it.
            if p.grad is not None or self.group.world.size > 1:
                self._bind(name, p)
        for bucket in self.group.buckets[self._next :]:
            self._on_ready(bucket)

    def reset(self) -> None:
        """Prepare for the gradients of the next step."""
        self._finished = False
        self._next = 0
        self._complete.clear()
        self._missing_counts = [len(bucket.names) for bucket in self.group]

    def release(self) -> None:
        """Remove the hooks and copy every gradient to memory of its own."""
        self.disconnect()
        for _, p in self._parameters:
            if p.grad is not None:
                p.grad = p.grad.clone()

    def disconnect(self) -> None:
        """Remove the hooks; gradients and buckets stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._on_ready = _ignore  # refers to the strategy, which refers to this object and its memory

    def _make_hook(self, name: str) -> Callable[[Tensor], None]:
        def on_gradient(parameter: Tensor) -> None:
            self._check_expected(name)
            self._bind(name, parameter)
            if not self.accumulating:
                self._mark_complete(name)

        return on_gradient

    def _bind(self, name: str, parameter: Tensor) -> None:
        """Replace the parameter's gradient by the view of the group, with the accumulated values."""
        view, gradient = self.group.views[name], parameter.grad
        if gradient is view:
            return
        if gradient is None:
            view.zero_()
        elif gradient.is_sparse:
            raise HpcsgdError(
                f"the gradient of {name} is sparse",
                rank=self.group.world.global_rank,
                expected="a dense gradient",
                do="build the embedding with sparse=False",
            )
        else:
            view.copy_(gradient)
        parameter.grad = view

    def _check_expected(self, name: str) -> None:
        if name in self._complete or self._finished:
            raise HpcsgdError(
                f"a second gradient for {name} before step()",
                rank=self.group.world.global_rank,
                do="call run.step() after each backward(); to add up several, run all but the last "
                "inside `with run.accumulate():`",
            )

    def _mark_complete(self, name: str) -> None:
        self._complete.add(name)
        self._missing_counts[self._bucket_of[name].index] -= 1
        while self._next < len(self._missing_counts) and self._missing_counts[self._next] == 0:
            self._on_ready(self.group.buckets[self._next])
            self._next += 1


def _ignore(bucket: Bucket) -> None:
    """Take no notice of a bucket."""
