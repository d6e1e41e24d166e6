#!/usr/bin/env bash
# A scaling law from nothing on one machine: text, shards, a plan, the runs, the law and what it says of a larger budget.
# From the top of a checkout: bash launch/sweep.sh. The same command goes on after any kill; it keeps what is there.
set -euo pipefail

python=${PYTHON:-python}
sweep=${SWEEP:-configs/sweeps/laptop.yaml}
shards=shards/laptop
say() { printf '\n\033[1m==> %s\033[0m\n' "$*"; }

if [ ! -e "$shards/train/index.json" ]; then
    say "Packing the source of Python's standard library into WebDataset shards, a token a byte"
    library=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
    rm -rf "$shards"
    mkdir -p shards
    find "$library" -name '*.py' -size +0 -not -path '*/site-packages/*' -not -path '*/test/*' -not -path '*/tests/*' \
        -not -path '*/lib2to3/*' -not -path '*/idlelib/*' -print0 | sort -z |
        xargs -0 sh -c 'bigtrain data pack "$@" --out shards/laptop --tokenizer bytes --validation 4%' pack
fi

say "The plan: the grid, its cost in FLOPs and time, the interval to expect"
bigtrain sweep plan "$sweep"

say "The runs, side by side; Ctrl-C stops them cleanly, and this command goes on"
bigtrain sweep run "$sweep"

say "What the law says of ten times the largest run"
name=$("$python" -c 'import sys; from pathlib import Path; from bigtrain.sweeps.load import load_sweep
print(load_sweep(Path(sys.argv[1])).config.name)' "$sweep")
flops=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["target_flops"])' "runs/$name/law/law.json")
bigtrain scaling predict "runs/$name/law" --flops "$flops"
