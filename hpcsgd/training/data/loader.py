"""The training loader of one rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from hpcsgd.errors import BadOption, HpcsgdError
from hpcsgd.registry import checked
from hpcsgd.registry.limits import Count, Seed, Skew
from hpcsgd.training.data.base import Augment, Source
from hpcsgd.training.data.partition import dirichlet_shards, partition, shuffled
from hpcsgd.training.data.rng_streams import torch_stream


class Loader:
    """Yields batches of this rank's samples; every iteration is the next epoch, in a new order.

    An iteration that is broken off ends its epoch: the next one starts the following epoch. After
    `load_state_dict` the next iteration continues inside the epoch, bit for bit.

    Parameters
    ----------
    source
        The training samples.
    batch
        Samples a batch on this rank; the last batch of an epoch may be smaller.
    rank, ranks
        This rank, and the number of ranks; default 0 of 1.
    alpha
        None (default): IID; a number: Dirichlet(alpha), see `partition`.
    seed
        Seed of order, skew and augmentation, all functions of it and of the position; default 0.
    augment
        Augmentation of the inputs of each batch; default None.
    drop_last
        Drop the smaller last batch; default False.

    Attributes
    ----------
    epoch
        The epoch, from 0, of the next batch.

    Raises
    ------
    BadOption
        More ranks or larger batches than there are samples.
    """

    @checked
    def __init__(
        self,
        source: Source,
        batch: Count,
        rank: int = 0,
        ranks: int = 1,
        alpha: Skew | None = None,
        seed: Seed = 0,
        augment: Augment | None = None,
        drop_last: bool = False,
    ) -> None:
        if not 0 <= rank < ranks:
            raise BadOption(
                "option rank of the loader is out of range", expected=f"0 to {ranks - 1}", got=rank
            )
        self.source, self.batch, self.rank, self.ranks = source, batch, rank, ranks
        self.alpha, self.seed, self.augment = alpha, seed, augment
        sizes = [len(shard) for shard in self._shards(0)]
        counts = [size // batch if drop_last else -(-size // batch) for size in sizes]
        if drop_last and min(sizes) < batch:
            raise BadOption(
                "drop_last leaves a rank without a batch",
                expected=f"batches of at most {min(sizes)}",
                got=batch,
                everywhere=True,
            )
        # Once: a process with many loaders would otherwise partition the samples in each epoch.
        self._skewed_shard: Tensor | None = None
        if alpha is not None and source.labels is not None:
            self._skewed_shard = dirichlet_shards(source.labels, ranks, alpha, seed)[rank]
        self._batches = counts[rank]
        self._longest = max(counts)
        self.epoch = self._next = self._first = 0
        self._inside = False

    def __len__(self) -> int:
        """Return the number of batches that the current, or else the next, iteration yields in all."""
        return max(0, self._batches - self._first)

    def filler(self) -> tuple[Tensor, Tensor]:
        """Return the last batch of the epoch, for ranks that have no more batches and must take part."""
        shard = self._shard(self.epoch)
        return self._load(shard, self.epoch, self._batches - 1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._inside:
            self._go_to(self.epoch + 1, 0)
        epoch, shard = self.epoch, self._shard(self.epoch)
        if self._next >= self._batches:
            self._go_to(epoch + 1, 0)
            return
        try:
            for index in range(self._next, self._batches):
                pair = self._load(shard, epoch, index)
                if index + 1 == self._batches:
                    self._go_to(epoch + 1, 0)
                else:
                    self._next, self._inside = index + 1, True
                yield pair
        finally:
            if self._inside and self.epoch == epoch:
                self._first = 0

    def state_dict(self) -> dict[str, int]:
        """Return the position after the last batch yielded: ``epoch``, and ``batch`` within it."""
        return {"epoch": self.epoch, "batch": self._next}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Start the next iteration at a saved position.

        It may be beyond this rank's last batch, if other ranks have more batches in the epoch: then the
        iteration is empty.

        Raises
        ------
        HpcsgdError
            The position does not exist: it was saved with other data, batch size or ranks.
        """
        epoch, batch = state["epoch"], state["batch"]
        if epoch < 0 or not 0 <= batch < self._longest:
            raise HpcsgdError(
                "the saved position is not in this loader's epoch",
                rank=self.rank,
                expected=f"batch 0 to {self._longest - 1}",
                got=f"epoch {epoch}, batch {batch}",
                do="resume with the data, batch size and number of ranks of the checkpoint",
            )
        self._go_to(epoch, batch)

    def _go_to(self, epoch: int, batch: int) -> None:
        """Set the position to a batch, outside any iteration."""
        self.epoch, self._next, self._first, self._inside = epoch, batch, batch, False

    def _shards(self, epoch: int) -> list[Tensor]:
        labels = None if self.alpha is None else self.source.labels
        return partition(labels, len(self.source), self.ranks, self.alpha, self.seed, epoch)

    def _shard(self, epoch: int) -> Tensor:
        if self._skewed_shard is None:
            return self._shards(epoch)[self.rank]
        return shuffled(self._skewed_shard, self.rank, self.seed, epoch)

    def _load(self, shard: Tensor, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        generator = torch_stream("augment", self.seed, epoch, self.rank, index)
        x, y = self.source.batch(shard[index * self.batch :][: self.batch], generator)
        return (x if self.augment is None else self.augment(x, generator)), y
