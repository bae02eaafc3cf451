"""Sums of codes at a server: the bits of an all-reduce, also when clients leave during a sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hpcsgd.compress import build
from hpcsgd.compress.base import RandomKey, Segment
from hpcsgd.compress.point_to_point import PointToPointCodec
from hpcsgd.server.code_sum import CodeSumClient, CodeSumServer
from tests.support import compressor_rows as c
from tests.support.simulated_codecs import Lockstep

pytestmark = pytest.mark.host("codes of a server")
ROWS = [row for row in [*c.ROWS, c.with_feedback(c.randk())] if row.name != "powersgd"]
each_row = pytest.mark.parametrize("row", ROWS, ids=str)
NUMEL = 900


class Job:
    """Clients and a server that keep their state between two sums."""

    def __init__(self, row: c.Row, clients: int, numel: int = NUMEL) -> None:
        compressor = build(row.spec)
        assert compressor is not None
        half = numel // 2
        tensors = ((0, (half,)), (half, (numel - half,)))
        coder = PointToPointCodec(compressor, Segment(numel, 1, tensors=tensors), torch.float32)
        self.lockstep = Lockstep(compressor, Segment(numel, clients, tensors=tensors), row.feedback)
        self.residuals = [torch.zeros(numel) if row.feedback else None for _ in range(clients)]
        self.clients = [CodeSumClient(coder, residual) for residual in self.residuals]
        self.server = CodeSumServer(coder)
        self.gone: set[int] = set()

    def add_up(self, rows: Tensor, step: int, leaves_after: int | None = None) -> Tensor:
        """Return the mean; the last client leaves before part `leaves_after`."""
        everyone = list(enumerate(self.clients))
        parts = {
            i: client.begin(rows[i].clone(), RandomKey(0, step, 0, i), len(rows)) for i, client in everyone
        }
        self.server.begin([str(i) for i in parts], RandomKey(0, step, 0, 0))
        while True:
            if leaves_after == self.server.part:
                del parts[len(rows) - 1]
            present = [part for part in parts.values() if part is not None]
            assert len(present) == len(parts)
            sizes = self.server.part_sizes(len(rows))
            assert all(part.nbytes == sizes[self.server.part] for part in present)
            number = self.server.part
            combination = self.server.combine(present)
            last = [self.clients[i].combined_bytes for i in parts]
            if combination is None:
                assert set(last) == {0}
                break
            assert self.server.part == number + 1 and set(last) == {combination.nbytes}
            parts = {i: self.clients[i].next_part(combination) for i in parts}
        for i, client in everyone:
            client.end(i in parts)
        return self.server.end(float(len(parts)))


def random_rows(clients: int, seed: int, numel: int = NUMEL) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((clients, numel))).float()


@each_row
@pytest.mark.parametrize("clients", [1, 2, 5])
def test_the_sum_has_the_bits_of_an_allreduce(row: c.Row, clients: int) -> None:
    for numel in (NUMEL, 1):
        job = Job(row, clients, numel)
        for step in range(3):
            rows = random_rows(clients, step, numel)
            expected = job.lockstep.reduce(rows, step, 1 / clients)[0]
            assert torch.equal(job.add_up(rows, step), expected)
            for residual, expected_residual in zip(job.residuals, job.lockstep.residuals, strict=True):
                assert residual is expected_residual is None or torch.equal(residual, expected_residual)


@pytest.mark.parametrize("row", [row for row in ROWS if not row.rotated], ids=str)
def test_client_that_leaves_a_sum_adds_nothing_and_keeps_its_residual(row: c.Row) -> None:
    """Sum and residuals of the remaining clients add up to their gradients, for a loss after each part."""
    row = row if row.feedback else c.with_feedback(row)
    for after in range(len(Job(row, 3).server.part_sizes(3))):
        job = Job(row, 3)
        job.add_up(random_rows(3, 7), 0)
        before = [residual.clone() for residual in job.residuals if residual is not None]
        rows = random_rows(3, 1)
        total = 2 * job.add_up(rows, 1, leaves_after=after)
        left = [residual for residual in job.residuals if residual is not None]
        had = rows[:2].sum(0) + before[0] + before[1]
        torch.testing.assert_close(
            total + left[0] + left[1], had, rtol=0, atol=1e-2 if "16" in row.spec else 1e-4
        )
        assert torch.equal(left[2], before[2])


@each_row
def test_push_that_is_not_finite_is_not_begun(row: c.Row) -> None:
    job = Job(row, 1)
    bad = random_rows(1, 1)
    bad[0, 5] = torch.nan
    assert job.clients[0].begin(bad[0], RandomKey(0, 0, 0, 0), 1) is None
    job.clients[0].end(False)
    rows = random_rows(1, 2)
    assert torch.equal(job.add_up(rows, 1), job.lockstep.reduce(rows, 1)[0])
