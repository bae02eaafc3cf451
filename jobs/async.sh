#!/usr/bin/env bash
# The tables and the plot of asynchrony in RESULTS.md: digits, and a small GPT on the source of Python's library; on
# one node, and over four hosts (network namespaces on this machine, real TCP) with links of 100 Mbit/s; one rank
# four times slower, or none (simulated); three seeds each.
# Needs root, iproute2 and MPICH; about half an hour on two cores.
#
#     jobs/async.sh [folder [options of hpcsgd bench async]]
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-runs/async}
shift || true
for data in digits text; do
    mpiexec -n 4 hpcsgd bench async --data "$data" --out "$out" "$@"
    python tests/lab/hosts.py --hosts 4 --rate 100mbit -- \
        "$(command -v hpcsgd)" bench async --data "$data" --link 100mbit --out "$out" "$@"
done
