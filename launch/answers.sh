#!/usr/bin/env bash
# From a base model of novels to one that answers: pack, train, make questions and answers, fine-tune with the loss on
# the answers alone, and count the exactly right answers before and after. From the top of a checkout:
#     TEXT=DIRECTORY bash launch/answers.sh
# TEXT is a folder of plain text, such as novels. It keeps what is already there.
set -euo pipefail

text=${TEXT:?name a folder of plain text: TEXT=DIRECTORY bash launch/answers.sh}
base_steps=${BASE_STEPS:-300}
answer_steps=${ANSWER_STEPS:-500}
python=${PYTHON:-python}
here=$(dirname "$0")
say() { printf '\n==> %s\n' "$*"; }

if [ ! -e shards/novels/train/index.json ]; then
    say "Packing $text as bytes"
    bigtrain data pack "$text" --tokenizer bytes --validation 1% --out shards/novels
fi

say "A base model"
bigtrain train "$here/../configs/answers-base.yaml" "duration=$base_steps steps"

if [ ! -e shards/answers/train/index.json ]; then
    say "Questions and answers"
    "$python" "$here/answers.py" make shards/pairs
    bigtrain data pack shards/pairs/train.jsonl --kind supervised --tokenizer bytes --out shards/answers
fi

say "Fine-tuning on the answers"
bigtrain train "$here/../configs/answers.yaml" "duration=$answer_steps steps"

for run in answers-base answers; do
    bigtrain sample "$run" --prompts shards/pairs/questions.jsonl --tokens 8 --temperature 0 --stop $'\n' --json \
        > "runs/$run/texts.json"
    say "Exactly right answers of $run"
    "$python" "$here/answers.py" score shards/pairs/questions.jsonl "runs/$run/texts.json"
done
