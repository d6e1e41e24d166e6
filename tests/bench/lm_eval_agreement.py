"""Whether lm-evaluation-harness scores exported models as bigtrain scores them, in a run and after it.

    python -m tests.bench.lm_eval_agreement --python VENV/bin/python > tests/bench/results/lm_eval_agreement.txt

VENV has lm_eval and transformers; nothing is downloaded. A tiny GPT-2 and a tiny Llama are trained on modules of the
standard library, with the evaluator `tasks`, and exported after half of the steps and after the last. Both sides score
four tasks of local files: accuracies must be equal, log-likelihoods within 1e-4 nats. It exits with 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from bigtrain.data.config import StreamingConfig
from bigtrain.data.packing.documents import pack
from bigtrain.data.streaming.store import open_index
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.models.hf_files import HfFiles
from bigtrain.parallel.mesh import Ranks
from bigtrain.run import RunDirectory
from bigtrain.storage import read_lines
from bigtrain.training.evaluate import of_weights
from bigtrain.training.prepare import pass_context
from bigtrain.training.requests import read_requests
from bigtrain.training.restoring import Restoring
from bigtrain.training.tasks import encode_pair, log_likelihoods
from bigtrain.training.weights import Weights

CLOSE = 1e-4
"""Nats."""
STEPS, HALF, CONTEXT, REQUESTS = 60, 30, 96, 40
MODULES = ("abc", "bisect", "colorsys", "copy", "heapq", "keyword", "queue", "sched", "stat", "textwrap", "string")
SHAPE = {"layers": 2, "width": 64, "heads": 4, "context": CONTEXT}
MODELS: dict[str, dict[str, Any]] = {"gpt2": {"arch": "gpt2", **SHAPE}, "llama": {"arch": "llama", **SHAPE}}


def requests(task: str, lines: list[str], draw: random.Random) -> Iterator[dict[str, Any]]:
    """Lines that are cut, and the end of the line among ends of others: in a word, at a space, or with no context."""
    for _ in range(REQUESTS):
        line, *others = draw.sample(lines, 4)
        if task == "lines":
            context, ends = "", [line, *others]
        else:
            cuts = [line.index(" ", len(line) // 3) if " " in line[len(line) // 3 :] else len(line) // 2 for line in
                    (line, *others)]  # fmt: skip
            shift = {"words": 0, "spaces": 1, "letters": 2}[task]
            context = line[: cuts[0] + shift]
            ends = [one[cut + shift :] or "." for one, cut in zip((line, *others), cuts, strict=True)]
        right, choices = ends[0], sorted({end for end in ends if end})
        yield {"context": context, "continuations": choices, "gold": choices.index(right), "task": task}


TASKS = ("words", "spaces", "letters", "lines")


def write_tasks(place: Path, text: str) -> list[Path]:
    """The files of requests, and what lm_eval reads them by."""
    draw = random.Random(7)
    lines = sorted({line.strip() for line in text.splitlines() if 20 < len(line.strip()) < 70})
    files = []
    for task in TASKS:
        files.append(place / f"{task}.jsonl")
        files[-1].write_text("".join(json.dumps(one) + "\n" for one in requests(task, lines, draw)))
        description = {
            "task": f"local_{task}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(files[-1])}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{continuations}}",
            "doc_to_target": "{{gold}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        (place / f"local_{task}.yaml").write_text(yaml.safe_dump(description))
    return files


def harness(python: str, model: Path, tasks: Path, out: Path) -> dict[str, tuple[float, list[float]]]:
    """Accuracy and log-likelihoods by task, as lm-evaluation-harness finds them.

    One task at a time: it takes requests of equal tokens for one, although their boundaries differ, as they do between
    these tasks; transformers itself gives what bigtrain does.
    """
    whole = [
        python, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32",
        "--include_path", str(tasks), "--output_path", str(out), "--log_samples", "--device", "cpu",
        "--batch_size", "8", "--tasks",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "home")}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | offline
    found = {}
    for task in TASKS:
        done = subprocess.run([*whole, f"local_{task}"], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"lm_eval failed:\n{done.stderr[-3000:]}")
        (file,) = out.rglob(f"samples_local_{task}_*.jsonl")
        rows = sorted(read_lines(file), key=lambda row: row["doc_id"])
        values = [float(answer[0]) for row in rows for answer in row["filtered_resps"]]
        found[task] = sum(row["acc"] for row in rows) / len(rows), values
    return found


def own(model: Path, shards: Path, files: list[Path]) -> dict[str, list[float]]:
    """Log-likelihoods by task of an exported model, as bigtrain finds them."""
    index = open_index(str(shards), StreamingConfig())
    config, rows = of_weights(Weights.of(HfFiles.open(model)), [], {"held out": index})
    engine = config.engine.build(
        config.model, rows, config.optimizer, layout=config.layout, precision="fp32", seed=0,
        ranks=Ranks.from_environment(),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as nothing:
        Restoring(engine, config, RunDirectory(nothing), lambda event, **fields: None).start()
    place, tokenizer = pass_context(config, engine, 8, index), index.load_tokenizer()
    found = {}
    for task, file in zip(TASKS, files, strict=True):
        pairs = [(one.context, text) for one in read_requests(file) for text in one.continuations]
        found[task] = log_likelihoods(place, [encode_pair(tokenizer, *pair) for pair in pairs])
    engine.close()
    return found


def command(place: Path, *arguments: str) -> None:
    """Run a `bigtrain` command in a directory."""
    whole = [sys.executable, "-m", "bigtrain.cli", *arguments]
    done = subprocess.run(whole, cwd=place, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")


def trained(place: Path, name: str, files: list[Path]) -> dict[int, dict[str, float]]:
    """Train a model with tasks in the run; its accuracies by step and task."""
    config = {
        "name": name, "model": MODELS[name], "data": {"train": "shards/train"}, "batch": {"size": 8},
        "duration": f"{STEPS} steps", "optimizer": {"lr": 3e-3}, "precision": "fp32",
        "checkpoint": {"at": [f"{HALF} steps"]}, "tracking": {"wandb": "disabled"},
        "evaluation": {"every": f"{HALF} steps", "evaluators": [{"name": "tasks", "files": list(map(str, files))}]},
    }  # fmt: skip
    (place / f"{name}.yaml").write_text(yaml.safe_dump(config))
    command(place, "train", f"{name}.yaml")
    rows = {row["step"]: row for row in read_lines(place / "runs" / name / "metrics.jsonl")}
    return {step: {task: rows[step][f"val_task/{task}/accuracy"] for task in TASKS} for step in (HALF, STEPS)}


def main() -> int:
    """Print a line for each model, step and task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of an environment with lm_eval")
    python = parser.parse_args().python
    torch.set_num_threads(1)
    version = [python, "-c", "import importlib.metadata as m; print(m.version('lm_eval'), m.version('transformers'))"]
    lm_eval, transformers = subprocess.run(version, capture_output=True, text=True, check=True).stdout.split()
    print(f"lm_eval {lm_eval}, transformers {transformers}, {REQUESTS} requests a task, FP32")
    print(f"{'model':<6} {'step':>4}  {'task':<8} {'lm_eval':>8} {'in run':>7} {'apart, nats':>12}")
    wrong = 0
    with tempfile.TemporaryDirectory() as text_place:
        place = Path(text_place)
        sources = [Path(os.__file__).parent / f"{name}.py" for name in MODULES]
        text = "".join(source.read_text() for source in sources)
        tokenizer = place / "bpe.json"
        command(place, "data", "tokenizer", *map(str, sources), "--vocab", "400", "--out", str(tokenizer))
        pack(sources, place / "shards", Tokenizer.open(str(tokenizer)), validation="10%")
        files = write_tasks(place, text)
        for name in MODELS:
            in_run = trained(place, name, files)
            for step, accuracies in in_run.items():
                out = place / f"{name}-{step}"
                export = [sys.executable, "-m", "bigtrain.cli", "checkpoint", "export", f"{name}@{step}"]
                subprocess.run(
                    [*export, "--format", "hf", "--out", str(out)], cwd=place, check=True, stdout=subprocess.DEVNULL
                )
                by_harness, native = (
                    harness(python, out, place, place / f"{out.name}-eval"),
                    own(out, place / "shards/train", files),
                )
                for task in TASKS:
                    accuracy, values = by_harness[task]
                    apart = max(abs(a - b) for a, b in zip(values, native[task], strict=True))
                    wrong += accuracy != accuracies[task] or apart > CLOSE
                    print(
                        f"{name:<6} {step:>4}  {task:<8} {accuracy:>8.4f} {accuracies[task]:>7.4f} {apart:>12.2e}",
                        flush=True,
                    )
    print("all agree" if not wrong else f"{wrong} lines do not agree")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
