"""Ranks that leave a loop alone or call what the others do not, and errors of a part of the job."""

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
for step, x in enumerate(run.batches([torch.ones(1, 2)] * 100)):
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
        ("LASGD(2)", "run.close()", "rank 1: the loop over run.batches() was left for run.close()"),
        (
            "hpcsgd.ADPSGD('star')",
            "run.close()",
            "rank 1: the loop over run.batches() was left for run.close()",
        ),
        (
            "hpcsgd.BackupWorkers()",
            "run.close()",
            "rank 1: the loop over run.batches() was left for run.close()",
        ),
    ],
)
def test_a_rank_that_leaves_the_loop_alone_is_named(strategy: str, then: str, text: str) -> None:
    job = launch(_LOOP.format(strategy=strategy, then=then), 3, timeout=SECONDS)
    check_end(job)
    assert text in job.stderr and "run.any(flag)" in job.stderr, job


def test_unequal_numbers_of_backward_passes_are_named() -> None:
    script = BEGIN + (
        "model = torch.nn.Linear(2, 2)\n"
        "run = Run(model, torch.optim.SGD(model.parameters(), 0.1))\n"
        "for step in range(4):\n"
        "    for _ in range(2 if step == 2 and run.world.rank == 0 else 1):\n"
        "        model(torch.ones(1, 2)).sum().backward()\n"
        "    run.step()\n"
    )
    job = launch(script, 2, timeout=SECONDS)
    check_end(job)
    text = "rank 1: step 3 has more backward passes on other ranks than on this one"
    assert text in job.stderr and "run.accumulate()" in job.stderr, job


def test_an_error_in_a_part_of_the_job_is_printed_there() -> None:
    script = BEGIN + (
        "from mpi4py import MPI\n"
        "part = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank > 0)\n"
        "if MPI.COMM_WORLD.rank == 0: time.sleep(600)\n"
        "model = torch.nn.Linear(2 + part.rank, 2)\n"
        "Run(model, torch.optim.SGD(model.parameters(), 0.1), comm=part)\n"
    )
    job = launch(script, 3, timeout=SECONDS)
    check_end(job)
    assert job.stderr.count("Disagreement: ") == 1 and "rank 1 ends the job" in job.stderr, job
