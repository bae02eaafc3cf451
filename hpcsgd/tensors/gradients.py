"""The gradients of a model as a tensor group that backward fills."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.world import World
from hpcsgd.tensors.group import DEFAULT_BUCKET_MIB, Bucket, TensorGroup

Named = Sequence[tuple[str, nn.Parameter]]


class Gradients:
    """Collects gradients in a tensor group and says, bucket by bucket, when they are complete.

    Buckets are filled from the last parameter to the first, the order in which backward finds them,
    and are reported strictly in that order: it is the same on every rank, whatever order autograd takes.

    Parameters
    ----------
    world
        The ranks.
    parameters
        (name, parameter) pairs, without duplicates; those that require no gradient are left out.
    ready
        Called with each bucket when its gradients are complete, from within backward, or from `finish`.
    bucket_mib
        Size of a bucket in MiB.
    unused
        What a parameter that got no gradient contributes: "zeros", or "error".
    """

    def __init__(
        self,
        world: World,
        parameters: Named,
        ready: Callable[[Bucket], None],
        bucket_mib: float = DEFAULT_BUCKET_MIB,
        unused: str = "zeros",
    ) -> None:
        trainable = [(name, p) for name, p in reversed(parameters) if p.requires_grad]
        self.group = TensorGroup(world, trainable, bucket_mib)
        self.accumulating = False
        self._parameters = trainable
        self._ready = ready
        self._unused = unused
        self._bucket_of = {n: bucket for bucket in self.group for n in bucket.names}
        self._finished = False
        self._next = 0
        self._arrived: set[str] = set()
        self._lacking: list[int] = []
        self.start_over()
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._hook(name))  # type: ignore[no-untyped-call]
            for name, p in trainable
        ]

    def finish(self) -> None:
        """Report the buckets that are left; a parameter without a gradient contributes zeros.

        From here on to `start_over` further gradients are an error, and this does nothing.
        """
        if self._finished:
            return
        self._finished = True
        missing = [name for name, p in self._parameters if p.grad is None]
        if missing and self._unused == "error":
            raise HpcsgdError(
                f"parameters without a gradient: {', '.join(missing)}",
                rank=self.group.world.name,
                got="unused='error'",
                do="use them in the loss, freeze them, or let them count as zeros (unused='zeros')",
            )
        for name, p in self._parameters:
            # Alone, a parameter without a gradient stays without: the optimizer then leaves it be.
            if p.grad is not None or self.group.world.size > 1:
                self._take(name, p)
        for bucket in self.group.buckets[self._next :]:
            self._ready(bucket)

    def start_over(self) -> None:
        """Expect the gradients of the next step."""
        self._finished = False
        self._next = 0
        self._arrived.clear()
        self._lacking = [len(bucket.names) for bucket in self.group]

    def release(self) -> None:
        """Remove the hooks and give every gradient memory of its own."""
        for hook in self._hooks:
            hook.remove()
        for _, p in self._parameters:
            if p.grad is not None:
                p.grad = p.grad.clone()

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def on_gradient(parameter: Tensor) -> None:
            self._check_expected(name)
            self._take(name, parameter)
            if not self.accumulating:
                self._arrive(name)

        return on_gradient

    def _take(self, name: str, parameter: Tensor) -> None:
        """Make the parameter's gradient the view of the group, with what has been accumulated."""
        view, gradient = self.group.views[name], parameter.grad
        if gradient is view:
            return
        if gradient is None:
            view.zero_()
        elif gradient.is_sparse:
            raise HpcsgdError(
                f"the gradient of {name} is sparse",
                rank=self.group.world.name,
                expected="a dense gradient",
                do="build the embedding with sparse=False",
            )
        else:
            view.copy_(gradient)
        parameter.grad = view

    def _check_expected(self, name: str) -> None:
        if name in self._arrived or self._finished:
            raise HpcsgdError(
                f"a second gradient for {name} before step()",
                rank=self.group.world.name,
                do="call run.step() after each backward(); to add up several, run all but the last "
                "inside `with run.accumulate():`",
            )

    def _arrive(self, name: str) -> None:
        self._arrived.add(name)
        self._lacking[self._bucket_of[name].index] -= 1
        while self._next < len(self._lacking) and self._lacking[self._next] == 0:
            self._ready(self.group.buckets[self._next])
            self._next += 1
