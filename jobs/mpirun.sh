#!/usr/bin/env bash
# Training on hosts without a batch system. Arguments are options of `hpcsgd train`.
#   HOSTS=node1:4,node2:4 jobs/mpirun.sh --data text --strategy local:period=8
#   HOSTS=hosts.txt RESTARTS=5 NAME=text jobs/mpirun.sh --data text
# HOSTS lists the hosts and the ranks on each, or is a file with one line a host, such as node1:4; default: 4 ranks
# on this host. All hosts must see the same working folder and Python environment, and the mpiexec on PATH (MPICH,
# Open MPI, Intel MPI) must be that of mpi4py.
# RESTARTS=n: if a rank or a host fails, restart from the last checkpoint, at most n times, and never twice from
# the same checkpoint. The file of hosts is read again at each restart: replace broken hosts there, with the same
# number of ranks. With --on-failure restart the run continues with any number of ranks, on the hosts that still
# answer to ssh.
set -euo pipefail

# The hosts of a list that answer to ssh.
answering() {
    local host
    tr ',' '\n' <<<"$1" | while read -r host; do
        [ "${host%:*}" = localhost ] || ssh -n -o BatchMode=yes -o ConnectTimeout=10 "${host%:*}" true || continue
        echo "$host"
    done | paste -sd,
}

start() {
    local hosts=${HOSTS:-localhost:4} ranks
    [ ! -f "$hosts" ] || hosts=$(grep -o '^[^# ]*' "$hosts" | paste -sd,)
    [ "$left" = "$restarts" ] || [[ " $* " != *" --on-failure restart "* ]] || hosts=$(answering "$hosts")
    ranks=$(tr ',' '\n' <<<"$hosts" | awk -F: '{ n += ($2 ? $2 : 1) } END { print n }')
    if mpiexec --version 2>&1 | grep -q 'Open MPI'; then
        # Two threads a rank compute and communicate: do not bind a rank to one core.
        mpiexec -n "$ranks" --host "$hosts" --bind-to none hpcsgd train "$@"
    else
        # MPICH and Intel MPI
        mpiexec -n "$ranks" -hosts "$hosts" hpcsgd train "$@"
    fi
}

restarts=${RESTARTS:-0}
runs=${RUNS:-runs}
name=${NAME:-$(date +%Y%m%d-%H%M%S)}
[ "$restarts" = 0 ] || set -- --out "$runs" --name "$name" --resume auto "$@"

newest() {
    set -- "$runs/$name"/checkpoints/step-*
    echo "${!#}"
}

for ((left = restarts; ; left--)); do
    before=$(newest)
    status=0
    start "$@" || status=$?
    if [ "$status" = 0 ] || [ "$left" = 0 ] || [ "$(newest)" = "$before" ]; then
        exit "$status"
    fi
    echo "mpirun.sh: exit status $status; restart from $(newest), $((left - 1)) restarts left" >&2
done
