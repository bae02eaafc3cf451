"""A gradient that is not finite, with compression: an error that names its place, and the end of the job."""

from __future__ import annotations

import re

import pytest

from tests.support.launch import launch

BEGIN = """
import torch
from hpcsgd import LASGD, AllReduce, LocalSGD, Run, World
from hpcsgd.compress import build
def train(spec, strategy, bad_step, half=False):
    world = World()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Linear(20, 20))
    if half:
        model.half()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    run = Run(model, optimizer, strategy, comm=world, compress=build(spec), bucket_mib=1e-9)
    for step in range(10**9):
        run.zero_grad()
        model(torch.ones(2, 30, dtype=model[0].weight.dtype)).sum().backward()
        if half and step == bad_step:
            for p in model.parameters():
                p.grad.fill_(3e4)
        elif step == bad_step and world.rank == 1:
            model[1].weight.data[3, 4] = float('nan')
        run.step()
"""
pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize(
    ("ranks", "per_node", "call", "text"),
    [
        (
            2,
            0,
            "train('ef+maxnorm', AllReduce(), 2)",
            "rank 1: the gradient of 0.bias is not finite at step 3",
        ),
        (3, 2, "train('maxnorm', LocalSGD(2), 3)", "rank 1: the change of 1.weight is not finite at step 3"),
        # The average may begin a step later, when all parameters are NaN.
        (2, 0, "train('maxnorm', LASGD(1, max_lag=1), 3)", r"rank 1: the change of \S+ is not finite"),
    ],
)
def test_the_error_names_parameter_rank_and_step(ranks: int, per_node: int, call: str, text: str) -> None:
    job = launch(BEGIN + call, ranks, timeout=45, env={"HPCSGD_RANKS_PER_NODE": str(per_node)})
    assert not job.timed_out and job.returncode != 0, job
    assert not job.left and not job.files, job
    assert job.stderr.count("HpcsgdError: ") == 1 and len(re.findall(text, job.stderr)) == 1, job
    assert "nonfinite='skip'" in job.stderr, job
    frames = re.findall('File "(.*?)"', job.stderr)
    assert "<string>" in frames and not any("/hpcsgd/" in each for each in frames), job  # it explains itself


def test_values_that_the_codes_take_beyond_float16_are_an_error() -> None:
    call = "train('maxnorm:bits=2,norm=euclidean', AllReduce(), 2, half=True)"
    job = launch(BEGIN + call, 2, timeout=45)
    assert not job.timed_out and job.returncode != 0 and not job.left and not job.files, job
    assert "cannot represent the mean gradient of bucket" in job.stderr and "at step 3" in job.stderr, job
    assert "decoded values up to 65504, the largest of float16" in job.stderr, job
