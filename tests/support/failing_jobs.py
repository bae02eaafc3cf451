"""Scripts of training jobs that fail, and the check of their end."""

from __future__ import annotations

from tests.support.launch import Finished

SECONDS = 45.0  # for a job with its imports, on a busy machine
BEGIN = """
import gc, os, sys, time
import torch, hpcsgd
from hpcsgd import LASGD, AllReduce, LocalSGD, Run, TensorGroup, World, collectives
def train(strategy, steps, pause=lambda step: None, **options):
    model = torch.nn.Linear(300, 300)
    run = Run(model, torch.optim.SGD(model.parameters(), 0.01), strategy, **options)
    for step in range(steps):
        pause(step)
        run.zero_grad()
        model(torch.ones(2, 300)).sum().backward()
        run.step()
    return run
"""
#: For jobs with a short HPCSGD_TIMEOUT: on a busy machine the ranks end their imports at different times.
IMPORTED = "World(timeout=60).close()\n"


def check_end(job: Finished, code: int | None = None) -> None:
    """Check that a job has ended by itself, with nothing left; `code` is its status, None for any failure."""
    assert not job.timed_out, job
    assert (job.returncode != 0) if code is None else (job.returncode == code), job
    assert not job.left and not job.files, job
