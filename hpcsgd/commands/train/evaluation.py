"""Loss and accuracy of a model on a batch, and of the consensus model on a whole source."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpcsgd.commands.train.metrics import Sums
from hpcsgd.mpi.world import World
from hpcsgd.training.data.base import Source
from hpcsgd.training.run import Run

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_BATCH = 256


class Objective:
    """Mean cross-entropy of a model's logits, (..., classes), with the sums for loss and accuracy.

    Batches are moved to the device; `autocast` is "off" or the dtype of the forward pass.
    """

    def __init__(self, model: nn.Module, device: torch.device, autocast: str) -> None:
        self.model, self._device = model, device
        self._dtype = _DTYPES.get(autocast)

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Sums]:
        """Return the mean loss over the targets `y`, for backward, and the sums over the batch."""
        x, y = x.to(self._device), y.to(self._device)
        with self._autocast():
            logits = self.model(x)
            logits, targets = logits.reshape(-1, logits.shape[-1]), y.reshape(-1)
            loss = F.cross_entropy(logits, targets)
        hits = int((logits.argmax(1) == targets).sum())
        return loss, Sums(float(loss.detach()) * len(targets), hits, len(targets), len(x))

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, self._dtype) if self._dtype else nullcontext()


@torch.no_grad()
def evaluate(run: Run, objective: Objective, source: Source, shard: Tensor, world: World) -> Sums:
    """Evaluate the consensus model on a source, each sample counted once; collective, equal on all ranks.

    The ranks' shards, indices of samples of shape (n,), int64, are disjoint.
    """
    objective.model.eval()
    with run.averaged():
        sums = Sums()
        for indices in torch.split(shard, _BATCH):
            sums = sums + objective(*source.batch(indices))[1]
    objective.model.train()
    return sum(world.gather(sums), Sums())
