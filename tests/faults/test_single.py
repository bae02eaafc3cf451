"""One process without mpiexec: importing, training, and a launcher of another MPI."""

from __future__ import annotations

import pytest
from launch import run_alone


def test_importing_needs_neither_mpi_nor_numba() -> None:
    code = (
        "import sys, hpcsgd, hpcsgd.collectives, hpcsgd.strategies;"
        "print(sorted({'mpi4py.MPI', 'numba', 'llvmlite', 'matplotlib'} & {*sys.modules}))"
    )
    done = run_alone(code)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_training_without_mpiexec() -> None:
    code = (
        "import torch, hpcsgd\n"
        "model = torch.nn.Linear(3, 3)\n"
        "for strategy in (hpcsgd.AllReduce(), hpcsgd.LocalSGD(2)):\n"
        "    optimizer = torch.optim.SGD(model.parameters(), 0.1)\n"
        "    with hpcsgd.Run(model, optimizer, strategy) as run:\n"
        "        for x in run.batches([torch.ones(2, 3)] * 4):\n"
        "            run.zero_grad(); model(x).sum().backward(); run.step()\n"
        "        print(run.world.rank, run.world.size, run.steps)\n"
    )
    done = run_alone(code)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.split() == ["0", "1", "4"] * 2


@pytest.mark.parametrize(
    "variable", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS"]
)
def test_a_launcher_that_mpi_does_not_know_is_an_error(variable: str) -> None:
    code = (
        "import os\n"
        "from mpi4py import MPI\n"  # initialised first: it would itself look for its launcher
        f"os.environ['{variable}'] = '4'\n"
        "import hpcsgd\n"
        "hpcsgd.World()\n"
    )
    done = run_alone(code)
    assert done.returncode != 0
    assert "MPI sees one rank, but more were started" in done.stderr
    assert f"4 ranks ({variable}=4)" in done.stderr
