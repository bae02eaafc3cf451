#!/usr/bin/env bash
# Everything that only a machine with a GPU can test and measure, in at most 8 minutes: kernels, devices' suites,
# benchmarks and compute-sanitizer. Needs torch, CuPy, mpi4py, numba and pytest there; downloads nothing. PYTHON is
# the interpreter; --help lists the options, and jobs/README.md describes the report.
#   jobs/gpu_check.sh [--dry-run] [--output FOLDER] [--wheels FOLDER] [--only STEPS] [--budget SECONDS]
set -euo pipefail
cd "$(dirname "$0")/.."

exec "${PYTHON:-python3}" -m jobs.gpu_check "$@"
