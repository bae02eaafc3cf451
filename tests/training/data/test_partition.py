from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsgd.errors import BadOption
from hpcsgd.training.data.partition import evaluation_shard, partition

LABELS = torch.arange(1000) % 10


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 300),
    ranks=st.integers(1, 12),
    alpha=st.sampled_from([None, 1e-6, 0.01, 0.3, 1.0, 1e6]),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
)
def test_every_sample_belongs_to_one_rank_and_every_rank_has_one(
    samples: int, ranks: int, alpha: float | None, seed: int, epoch: int
) -> None:
    ranks = min(ranks, samples)
    shards = partition(torch.arange(samples) % 7, samples, ranks, alpha, seed, epoch)
    assert len(shards) == ranks
    assert all(len(shard) and shard.dtype == torch.int64 for shard in shards)
    assert torch.equal(torch.cat(shards).sort().values, torch.arange(samples))


def test_batches_of_all_ranks_are_the_batch_of_one_rank() -> None:
    (whole,) = partition(None, 997, 1, None, 3, 5)
    shards = partition(None, 997, 4, None, 3, 5)
    for step in range(997 // 32 + 1):
        parts = torch.cat([shard[step * 8 : step * 8 + 8] for shard in shards])
        assert set(parts.tolist()) == set(whole[step * 32 : step * 32 + 32].tolist())


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_order_is_a_function_of_seed_and_epoch(alpha: float | None) -> None:
    def orders(seed: int, epoch: int) -> list[list[int]]:
        return [shard.tolist() for shard in partition(LABELS, 1000, 3, alpha, seed, epoch)]

    assert orders(1, 2) == orders(1, 2)
    assert all(a != b for a, b in zip(orders(1, 2), orders(1, 3), strict=True))
    assert all(a != b for a, b in zip(orders(1, 2), orders(2, 2), strict=True))
    assert orders(1, 0) != orders(0, 1)


def test_skewed_ranks_keep_their_samples_across_epochs() -> None:
    first, later = (partition(LABELS, 1000, 5, 0.2, 7, epoch) for epoch in (0, 9))
    assert [set(s.tolist()) for s in first] == [set(s.tolist()) for s in later]


def test_alpha_sets_the_skew() -> None:
    def share_of_largest_class(alpha: float) -> float:
        shards = partition(LABELS, 1000, 5, alpha, 0, 0)
        shares = [LABELS[s].bincount().max() / len(s) for s in shards]
        return float(torch.stack(shares).mean())

    even, mild, strong = (share_of_largest_class(alpha) for alpha in (1e5, 1.0, 0.05))
    assert 0.1 <= even < 0.12 < mild < strong


def test_bad_partitions_are_refused() -> None:
    with pytest.raises(BadOption, match="no classes"):
        partition(None, 10, 2, 0.5, 0, 0)
    with pytest.raises(BadOption, match="1 to 3 ranks"):
        partition(None, 3, 4, None, 0, 0)


@pytest.mark.parametrize(("samples", "ranks"), [(0, 2), (1, 4), (10, 3), (355, 4), (12, 12)])
def test_evaluation_covers_every_sample_once(samples: int, ranks: int) -> None:
    shards = [evaluation_shard(samples, rank, ranks) for rank in range(ranks)]
    assert torch.equal(torch.cat(shards), torch.arange(samples))
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
