#!/usr/bin/env bash
# The plot at the top of the README: a small GPT on the source of Python's library over four hosts (network namespaces
# on this machine, real TCP) with links of 100 Mbit/s, by all-reduce in every step and by local SGD.
# Needs root, iproute2 and MPICH; about three minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-runs/slow-link}
for strategy in allreduce local:period=8; do
    python tests/lab/hosts.py --hosts 4 --rate 100mbit -- "$(command -v hpcsgd)" train \
        --data text:limit=1 --model gpt:layers=2 --strategy "$strategy" \
        --optimizer adamw --learning-rate 0.003 --warmup 0.05 --batch 8 --epochs 0.5 \
        --evaluate-every 0.1 --checkpoint-every 0 --threads 1 --out "$out" --name "${strategy%%:*}"
done
hpcsgd report "$out"/allreduce "$out"/local --out "$out/report"
