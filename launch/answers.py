"""Questions with answers, made on the spot, and the share of a model's answers that are exactly right.

python launch/answers.py make DIRECTORY           train.jsonl and questions.jsonl: other names, other sums
python launch/answers.py score QUESTIONS TEXTS    TEXTS: what `bigtrain sample --prompts QUESTIONS --json` prints
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

TRAINING, QUESTIONS = 4000, 100
SYLLABLES = ("ka", "ri", "mo", "ne", "tu", "sa", "lo", "vi", "da", "pe", "gu", "fi", "ho", "be")
Pair = dict[str, str]


def pair(question: str, answer: str) -> Pair:
    """A question as the model reads it, and the answer that it is to learn."""
    return {"prompt": f"Q: {question}\nA:", "completion": f" {answer}"}


def names(count: int, draw: random.Random) -> list[str]:
    """Different names."""
    found: set[str] = set()
    while len(found) < count:
        found.add("".join(draw.choices(SYLLABLES, k=draw.randint(2, 4))).capitalize())
    return sorted(found)


def make(directory: Path) -> None:
    """Write the pairs for training, and questions about names and sums that are not among them."""
    draw = random.Random(0)
    known = names(TRAINING // 2 + QUESTIONS // 2, draw)
    draw.shuffle(known)
    sums = [(one, other) for one in range(10) for other in range(10)]
    draw.shuffle(sums)
    kept, held = sums[QUESTIONS // 10 :], sums[: QUESTIONS // 10]

    def about_name(name: str) -> Pair:
        return pair(f"What does {name} begin with?", name[0])

    def about_sum(one: int, other: int) -> Pair:
        return pair(f"What is {one} + {other}?", str(one + other))

    training = [about_name(name) for name in known[: TRAINING // 2]]
    training += [about_sum(*draw.choice(kept)) for _ in range(TRAINING // 2)]
    draw.shuffle(training)
    questions = [about_name(name) for name in known[TRAINING // 2 :]] + [about_sum(*one) for one in held]
    directory.mkdir(parents=True, exist_ok=True)
    for name, pairs in (("train", training), ("questions", questions)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in pairs))


def score(questions: Path, texts: Path) -> dict[str, str]:
    """Exactly right answers: of all questions, about names, about sums."""
    pairs = [json.loads(line) for line in questions.read_text().splitlines()]
    given = json.loads(texts.read_text())["texts"]
    right: dict[str, list[bool]] = {"all": [], "names": [], "sums": []}
    for one, found in zip(pairs, given, strict=True):
        answer = found["text"].removeprefix(one["prompt"]).partition("\n")[0]
        is_right = answer.strip() == one["completion"].strip()
        for kind in ("all", "sums" if "+" in one["prompt"] else "names"):
            right[kind].append(is_right)
    return {kind: f"{sum(values)} of {len(values)}" for kind, values in right.items()}


if __name__ == "__main__":
    command, *places = sys.argv[1:]
    if command == "make":
        make(Path(places[0]))
    else:
        print(json.dumps(score(Path(places[0]), Path(places[1]))))
