#!/usr/bin/env bash
# The table and the plot of compression in RESULTS.md: digits on one node, and a small GPT on the source of Python's
# library over four hosts (network namespaces on this machine, real TCP) with links of 1 Gbit/s; three seeds each.
# Needs root, iproute2 and MPICH; about fifteen minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-runs/compress}
for seed in 0 1 2; do
    for scheme in none bf16 maxnorm:bits=4 multiscale ef+maxnorm:bits=2 ef+powersgd; do
        mpiexec -n 4 hpcsgd train --compress "$scheme" --seed "$seed" --evaluate-every 4 \
            --checkpoint-every 0 --threads 1 --out "$out/digits" --name "${scheme//[:=]/-}-$seed"
    done
    for scheme in none maxnorm:bits=4 multiscale ef+maxnorm:bits=2; do
        python tests/lab/hosts.py --hosts 4 --rate 1gbit -- "$(command -v hpcsgd)" train \
            --data text:limit=0.5 --model gpt:layers=2,width=256 --compress "$scheme" --seed "$seed" \
            --optimizer adamw --learning-rate 0.002 --warmup 0.05 --batch 2 --epochs 0.2 \
            --evaluate-every 0.04 --checkpoint-every 0 --threads 1 --out "$out/text" --name "${scheme//[:=]/-}-$seed"
    done
done
for data in digits text; do
    hpcsgd report "$out/$data"/* --over seed
    hpcsgd report "$out/$data"/*-0 --out "$out/report-$data"
done
