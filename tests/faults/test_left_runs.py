"""A rank that leaves a run which others continue: they get an error within seconds."""

from __future__ import annotations

import pytest

from tests.support.failing_jobs import BEGIN, SECONDS, check_end
from tests.support.launch import launch

pytestmark = pytest.mark.timeout(100)

TRAIN = """
world = World()
rank = world.rank
started = time.monotonic()
def body(run, model, steps):
    for step in range(steps):
        if step == 3 and rank == 1: raise KeyError("a missing key")
        run.zero_grad()
        model(torch.ones(2, 300)).sum().backward()
        run.step()
def fold(strategy, steps):
    model = torch.nn.Linear(300, 300)
    with Run(model, torch.optim.SGD(model.parameters(), 0.01), strategy) as run:
        body(run, model, steps)
"""


def test_an_exception_that_is_caught_on_one_rank() -> None:
    """The others raise too; both go on with a new run, twice."""
    script = (
        BEGIN
        + TRAIN
        + (
            "from hpcsgd.errors import RankLeft\n"
            "for strategy in (AllReduce(), LocalSGD(1)):\n"
            "    try: fold(strategy, 10**9)\n"
            "    except (KeyError, RankLeft) as error: print(type(error).__name__, error, flush=True)\n"
            "    started = time.monotonic()\n"
            "fold(AllReduce(), 3)\n"
            "world.close()\n"
            "print('done', flush=True)\n"
        )
    )
    job = launch(script, 2, timeout=SECONDS + 30)
    check_end(job, 0)
    assert job.stdout.count("KeyError 'a missing key'") == 2 and job.stdout.count("done") == 2, job
    assert job.stdout.count("RankLeft rank 0: this rank waits for rank 1, and the run was left after") == 2, (
        job
    )


def test_a_program_that_ends_on_one_rank() -> None:
    script = BEGIN + TRAIN + "try: fold(AllReduce(), 10**9)\nexcept KeyError: sys.exit(0)\n"
    job = launch(script, 2, timeout=SECONDS + 30)
    check_end(job)
    assert "RankLeft: rank 0: this rank waits for rank 1" in job.stderr, job
    assert "KeyError: 'a missing key'" in job.stderr, job
