"""One process without mpiexec: imports, training, and a launcher of another MPI."""

from __future__ import annotations

import pytest

from tests.support.launch import launch, run_alone


def test_importing_needs_neither_mpi_nor_numba_and_training_no_mpiexec() -> None:
    code = (
        "import sys, hpcsgd, hpcsgd.collectives, hpcsgd.strategies\n"
        "print(sorted({'mpi4py.MPI', 'numba', 'llvmlite', 'matplotlib'} & {*sys.modules}))\n"
        "import torch\n"
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
    assert done.stdout.split() == ["[]", *["0", "1", "4"] * 2]


def test_a_launcher_of_another_mpi_is_an_error() -> None:
    variables = ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS"]
    code = (
        "import os\n"
        "from mpi4py import MPI\n"  # initialised first, for it also reads these variables
        "import hpcsgd\n"
        f"for variable in {variables}:\n"
        "    os.environ[variable] = '4'\n"
        "    try:\n"
        "        hpcsgd.World()\n"
        "    except hpcsgd.HpcsgdError as error:\n"
        "        print(error)\n"
        "    if variable != 'SLURM_STEP_NUM_TASKS': del os.environ[variable]\n"
        "hpcsgd.World()\n"
    )
    done = run_alone(code)
    assert done.returncode != 0
    for output, number in ((done.stdout, 4), (done.stderr, 1)):
        assert output.count("each process is rank 0 of 1 to MPI, but more ranks were started") == number
    assert all(done.stdout.count(f"4 ranks ({variable}=4)") == 1 for variable in variables)


@pytest.mark.parametrize("ranks", [1, 2])
def test_mpi_that_the_program_leaves_to_others_is_initialised_and_finalised(ranks: int) -> None:
    """By mpi4py it is not, where `mpi4py.rc.initialize` is False."""
    code = (
        "import mpi4py\n"
        "mpi4py.rc.initialize = False\n"
        "from mpi4py import MPI\n"
        "import hpcsgd\n"
        "assert not MPI.Is_initialized()\n"
        "world = hpcsgd.World()\n"
        "several = MPI.Query_thread() == MPI.THREAD_MULTIPLE\n"
        "print(f'{sum(world.gather(1))} {several}\\n', end='', flush=True)\n"  # in one piece
    )
    job = launch(code, ranks, timeout=40)
    assert job.returncode == 0 and not job.stderr and not job.left and not job.files, job
    assert job.stdout.split() == [str(ranks), "True"] * ranks, job
