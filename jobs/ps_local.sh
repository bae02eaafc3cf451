#!/usr/bin/env bash
# A parameter server and groups of two workers on this machine, each a separate job; all end together.
#   jobs/ps_local.sh [mode [groups [options of hpcsgd train]]]
set -euo pipefail
cd "$(dirname "$0")/.."

mode=${1:-elastic}
groups=${2:-2}
shift $(($# < 2 ? $# : 2))
out=runs/ps-local-$(date +%Y%m%d-%H%M%S)
mkdir -p "$out"
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT

mpiexec -n 1 hpcsgd serve --listen "$out/servers" --mode "$mode" --linger 10 &
for seed in $(seq "$groups"); do
    mpiexec -n 2 hpcsgd train --strategy "ps:mode=$mode" --connect "$out/servers" --seed "$seed" \
        --out "$out" --name "group-$seed" "$@" >"$out/group-$seed.txt" &
done
for _ in $(jobs -p); do
    wait -n # the first job that fails ends all
done
hpcsgd report "$out"/group-*/ --out "$out/report"
