#!/usr/bin/env bash
# The tables and the plot of parameter servers in RESULTS.md: digits, and a small GPT on the source of Python's library;
# eight workers and a server, on one node, and over four hosts (network namespaces on this machine, real TCP) with
# links of 100 Mbit/s, two workers a host and the server on the last; the first two workers four times slower, or
# none (simulated); one seed, to which the same command with --seeds 3 adds two.
# Needs root, iproute2 and MPICH.
#
#     jobs/ps.sh [folder [options of hpcsgd bench ps]]
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-runs/ps}
shift || true
for data in digits text; do
    mpiexec -n 9 hpcsgd bench ps --data "$data" --seeds 1 --out "$out" "$@"
    python tests/lab/hosts.py --hosts 4 --ppn 2 --extra 1 --rate 100mbit -- \
        "$(command -v hpcsgd)" bench ps --data "$data" --link 100mbit --seeds 1 --out "$out" "$@"
done
