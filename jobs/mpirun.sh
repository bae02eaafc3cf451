#!/usr/bin/env bash
# Training on hosts without a batch system.
#   HOSTS=node1:4,node2:4 jobs/mpirun.sh --data text --strategy local:period=8
# HOSTS lists the hosts and the ranks on each; without it, 4 ranks start on this one. All hosts must see
# the same working folder and Python environment.
set -euo pipefail

hosts=${HOSTS:-localhost:4}
ranks=$(tr ',' '\n' <<<"$hosts" | awk -F: '{ n += ($2 ? $2 : 1) } END { print n }')

if mpiexec --version 2>&1 | grep -q 'Open MPI'; then
    # Two threads a rank compute and communicate: do not bind a rank to one core.
    exec mpiexec -n "$ranks" --host "$hosts" --bind-to none hpcsgd train "$@"
fi
# MPICH and Intel MPI
exec mpiexec -n "$ranks" -hosts "$hosts" hpcsgd train "$@"
