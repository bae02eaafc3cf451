"""Ranks that leave a loop alone, or make a call that the others do not: an error within seconds."""

from __future__ import annotations

import pytest

from tests.support.failing_jobs import BEGIN, SECONDS, check_end
from tests.support.launch import launch

pytestmark = pytest.mark.timeout(150)

_LOOP = (
    BEGIN
    + """
model = torch.nn.Linear(2, 2)
run = Run(model, torch.optim.SGD(model.parameters(), 0.1), {strategy})
for step, x in enumerate(run.batches([torch.ones(1, 2)] * 9)):
    if step == 4 and run.world.rank == 1: break
    run.zero_grad(); model(x).sum().backward(); run.step()
{then}
"""
)


@pytest.mark.parametrize(
    ("strategy", "then", "text"),
    [
        ("AllReduce()", "time.sleep(600)", "rank 1: the loop over run.batches() was left after 4 steps"),
        ("LocalSGD(1)", "run.close()", "rank 1: run.close() was called after 4 steps"),
    ],
)
def test_a_rank_that_leaves_the_loop_alone_is_named(strategy: str, then: str, text: str) -> None:
    job = launch(_LOOP.format(strategy=strategy, then=then), 3, timeout=SECONDS)
    check_end(job)
    assert text in job.stderr and "run.any(flag)" in job.stderr, job
