#!/usr/bin/env bash
# The whole life of a run on one machine: text, shards, training, a kill, a resume, a sample, a report.
# `make train` runs it from the top of a checkout; it keeps what is already there.
set -euo pipefail

python=${PYTHON:-python}
shards=shards/quickstart
run=runs/quickstart
say() { printf '\n\033[1m==> %s\033[0m\n' "$*"; }

if [ ! -e "$shards/train/index.json" ]; then
    say "Packing the source of Python's standard library into WebDataset shards"
    # Without the modules that begin with "_": tables that nobody wrote.
    library=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
    rm -rf "$shards"
    mkdir -p shards
    bigtrain data tokenizer "$library"/[a-z]*.py --vocab 2048 --out shards/quickstart.json
    bigtrain data pack "$library"/[a-z]*.py --out "$shards" --tokenizer shards/quickstart.json --validation 5%
fi

say "Training configs/quickstart.yaml on two processes; the run will be killed in the middle"
bigtrain train configs/quickstart.yaml &
training=$!
while kill -0 "$training" 2>/dev/null && [ ! -e "$run/checkpoints/step_00000150/manifest.json" ]; do
    sleep 0.2
done
if kill -0 "$training" 2>/dev/null; then
    say "kill -9 $training: the launcher is gone, and every process of the run with it"
    kill -KILL "$training"
    wait "$training" 2>/dev/null || true

    say "The same command again: it resumes from the last checkpoint"
    bigtrain train configs/quickstart.yaml
else
    wait "$training"
fi

say "A sample of what it has learned"
bigtrain sample quickstart --prompt '    def __init__(self' --tokens 160 --temperature 0.6 --seed 1 | tee "$run/sample.txt"

say "A report to open in a browser"
bigtrain report quickstart
bigtrain status quickstart
