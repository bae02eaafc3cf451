"""The training loader of one rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from hpcsgd.errors import BadOption, HpcsgdError
from hpcsgd.training.data.base import Augment, Source
from hpcsgd.training.data.partition import partition, shuffled, skewed
from hpcsgd.training.data.rng_streams import torch_stream


class Loader:
    """Batches of this rank's samples; every iteration is the next epoch, in a new order.

    An iteration that is left early ends its epoch: the next one starts the epoch after it. After
    `load_state_dict` the next iteration goes on inside the epoch, with the same bits.

    Parameters
    ----------
    source
        The training samples.
    batch
        Samples a batch, on this rank; the last batch of an epoch may be smaller.
    rank, ranks
        This rank and how many there are; default 0 of 1.
    alpha
        None (default): IID; a number: Dirichlet(alpha), see `partition`.
    seed
        Of order, skew and augmentation: all a function of it and of the position; default 0.
    augment
        Applied to the inputs of each batch; default None.
    drop_last
        Leave out the smaller last batch; default False.

    Attributes
    ----------
    epoch
        The epoch, from 0, of the next batch.

    Raises
    ------
    BadOption
        A value out of its range, or more ranks or larger batches than there are samples.
    """

    def __init__(
        self,
        source: Source,
        batch: int,
        rank: int = 0,
        ranks: int = 1,
        alpha: float | None = None,
        seed: int = 0,
        augment: Augment | None = None,
        drop_last: bool = False,
    ) -> None:
        if batch < 1:
            raise BadOption("a batch needs a sample", expected="1 or more", got=batch)
        if not 0 <= rank < ranks:
            raise BadOption("no such rank", expected=f"0 to {ranks - 1}", got=rank)
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
        # Many loaders of one process would else divide the samples again and again.
        self._own: Tensor | None = None
        if alpha is not None and source.labels is not None:
            self._own = skewed(source.labels, ranks, alpha, seed)[rank]
        self._batches = counts[rank]
        self._longest = max(counts)
        self.epoch = self._next = self._first = 0
        self._inside = False

    def __len__(self) -> int:
        """Batches that the current iteration, or else the next one, yields in all."""
        return max(0, self._batches - self._first)

    def filler(self) -> tuple[Tensor, Tensor]:
        """The last batch of the current epoch, for who has run out of them and must keep step."""
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
        """The position after the last batch handed out: ``epoch``, and ``batch`` within it."""
        return {"epoch": self.epoch, "batch": self._next}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Let the next iteration start at a saved position.

        It may be beyond this rank's last batch, while other ranks have more in the same epoch: the
        iteration then is empty.

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
        """Stand before a batch, outside any iteration."""
        self.epoch, self._next, self._first, self._inside = epoch, batch, batch, False

    def _shards(self, epoch: int) -> list[Tensor]:
        labels = None if self.alpha is None else self.source.labels
        return partition(labels, len(self.source), self.ranks, self.alpha, self.seed, epoch)

    def _shard(self, epoch: int) -> Tensor:
        if self._own is None:
            return self._shards(epoch)[self.rank]
        return shuffled(self._own, self.rank, self.seed, epoch)

    def _load(self, shard: Tensor, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        generator = torch_stream("augment", self.seed, epoch, self.rank, index)
        x, y = self.source.batch(shard[index * self.batch :][: self.batch], generator)
        return (x if self.augment is None else self.augment(x, generator)), y
