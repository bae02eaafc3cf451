#!/usr/bin/env bash
# The tests and the benchmark of the kernels, for a machine with a GPU, torch, CuPy, mpi4py, numba and pytest.
# Downloads nothing and writes no file.
#
#     jobs/gpu_check.sh [python]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1

"$python" - <<'PY'
import sys

import torch

if not torch.cuda.is_available():
    sys.exit("no GPU that torch can use: nothing to check here")
try:
    import cupy
except ImportError as error:
    sys.exit(f"CuPy cannot be imported ({error}): pip install '.[gpu]'")
major, minor = torch.cuda.get_device_capability()
print(f"{torch.cuda.get_device_name()}, sm_{major}{minor}, torch {torch.__version__}, CuPy {cupy.__version__}")
PY

"$python" -m pytest -q tests/kernels
"$python" -m hpcsgd bench compress --device cuda
