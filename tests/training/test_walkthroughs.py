"""From files as they lie around to a model that is trained, evaluated, exported and read by transformers."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
import yaml
from PIL import Image

from bigtrain import load
from bigtrain.data.encoding.learned import train_bpe
from bigtrain.data.formats.documents import documents
from tests.data.chats import CONVERSATIONS, write_tokenizer
from tests.in_process import run_here

SAME = 1e-4
"""Relative, of a loss by `evaluate` and by transformers."""
Files = Callable[[Path], list[Any]]
STORIES = [f"{name} went to the {place}. It was {kind} there." for name in ("Ann", "Bo", "Cy", "Di")
           for place in ("sea", "wood", "town") for kind in ("cold", "quiet", "new")]  # fmt: skip


def command(*arguments: Any) -> Any:
    """What a command prints as JSON, run in this process."""
    done = run_here(*arguments, "--json", cwd=Path.cwd())
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def bpe_of(texts: list[str], place: Path) -> Path:
    """A directory of a Hugging Face tokenizer."""
    place.mkdir()
    (place.parent / "all.txt").write_text("\n".join(texts))
    train_bpe(documents([place.parent / "all.txt"]), 300, place / "tokenizer.json")
    names = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (place / "tokenizer_config.json").write_text(json.dumps(names))
    return place


def nested(root: Path) -> list[Any]:
    """JSON lines whose text lies in an object."""
    rows = [{"id": number, "data": {"text": text}} for number, text in enumerate(STORIES)]
    (root / "dump.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [root / "dump.jsonl", "--key", "data.text", "--tokenizer", bpe_of(STORIES, root / "tokenizer")]


def responses(root: Path) -> list[Any]:
    """Parquet with the columns prompt and response."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    asked = {"prompt": [f"{text} Where?" for text in STORIES], "response": [" " + text.split()[4] for text in STORIES]}
    parquet.write_table(pyarrow.table({**asked, "id": list(range(len(STORIES)))}), root / "pairs.parquet")
    return [root / "pairs.parquet", "--kind", "supervised", "--tokenizer", bpe_of(STORIES, root / "tokenizer")]


def conversations(root: Path) -> list[Any]:
    """Conversations, and a tokenizer whose template lies in a file of its own."""
    (root / "chat.jsonl").write_text("\n".join(json.dumps({"messages": one}) for one in CONVERSATIONS * 4))
    tokenizer = write_tokenizer("llama3", root / "tokenizer")
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (root / "template.jinja").write_text(config.pop("chat_template"))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    template = ["--chat-template", root / "template.jinja"]
    return [root / "chat.jsonl", "--kind", "supervised", "--tokenizer", tokenizer, *template]


def tokenizer_directory(root: Path) -> list[Any]:
    """Text files, and a Hugging Face tokenizer that begins each text with a token of its own."""
    (root / "text").mkdir()
    for number, text in enumerate(STORIES):
        (root / "text" / f"{number}.md").write_text(text)
    return [root / "text", "--tokenizer", write_tokenizer("gemma", root / "tokenizer"), "--bos", "yes"]


def characters(root: Path) -> list[Any]:
    """One text file, and its characters."""
    (root / "stories.txt").write_text("\n".join(STORIES))
    out = root / "characters.json"
    assert command("data", "tokenizer", root / "stories.txt", "--kind", "characters", "--out", out)["vocab_size"] > 20
    return [root / "stories.txt", "--tokenizer", out]


WALKS = [
    nested,
    conversations,
    pytest.param(responses, marks=pytest.mark.exhaustive),
    pytest.param(tokenizer_directory, marks=pytest.mark.exhaustive),
    pytest.param(characters, marks=pytest.mark.exhaustive),
]


@pytest.mark.slow
@pytest.mark.parametrize("files", WALKS)
def test_from_files_to_an_exported_model(
    files: Files, bigtrain: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command("data", "pack", *files(tmp_path), "--out", "shards", "--validation", "20%")
    is_supervised = json.loads(Path("shards/train/index.json").read_text())["kind"] == "supervised"
    config = {
        "name": "walk",
        "model": {"arch": "llama", "layers": 1, "width": 32, "heads": 2, "context": 128},
        "data": {"train": "shards/train", "validation": "shards/validation", "document_mask": is_supervised},
        "batch": {"size": 2},
        "duration": "12 steps",
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "precision": "fp32",
        "evaluation": {"every": "12 steps"},
        "tracking": {"wandb": "disabled"},
    }
    Path("walk.yaml").write_text(yaml.safe_dump(config))
    assert bigtrain("train", "walk.yaml").returncode == 0
    losses = [json.loads(line) for line in Path("runs/walk/metrics.jsonl").read_text().splitlines()]
    values = [row["loss"] for row in losses if "loss" in row]
    assert values[-1] < values[0]
    command("checkpoint", "export", "walk", "--format", "hf", "--out", "exported")
    found = bigtrain("evaluate", "walk", "--data", "shards/validation", "--json")
    assert found.returncode == 0, found.stderr
    (row,) = json.loads(found.stdout)["checkpoints"]
    assert row["sets"]["all"]["loss"] == pytest.approx(loss_by_transformers(is_supervised), rel=SAME)


def loss_by_transformers(is_supervised: bool) -> float:
    """The held-out loss of the exported model, of sequences as the loader gives them without a document mask."""
    from bigtrain.data.loader import EvaluationLoader

    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained("exported")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained("exported")
    assert tokenizer.decode(tokenizer("sea")["input_ids"], skip_special_tokens=True) == "sea"
    if os.path.exists("chat.jsonl"):
        assert tokenizer.apply_chat_template(CONVERSATIONS[0], tokenize=False).count("<|eot_id|>") == 2
    total = count = 0.0
    options: dict[str, Any] = {"batch_size": 4, "context": 128, "dp_rank": 0, "dp_size": 1, "seed": 0}
    with EvaluationLoader("shards/validation", batches=1 << 40, **options) as loader, torch.no_grad():
        for batch in loader:
            for micro in batch.micro_batches:
                tokens, targets, weights = (torch.as_tensor(micro[key]) for key in ("tokens", "targets", "weights"))
                losses = torch.nn.functional.cross_entropy(
                    model(tokens).logits.transpose(1, 2), targets, reduction="none"
                )
                total += float((losses.double() * weights).sum())
                count += float(weights.sum())
    return total / count


@pytest.mark.exhaustive
def test_a_directory_of_qwen_2_learns_on_and_goes_back(
    bigtrain: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128, "use_sliding_window": False,
    }  # fmt: skip
    qwen = bpe_of(STORIES, tmp_path / "qwen")
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape)).save_pretrained(qwen)
    Path("stories.txt").write_text("\n".join(STORIES))
    command("data", "pack", "stories.txt", "--tokenizer", "qwen", "--out", "shards")
    taken = command("checkpoint", "import", "qwen", "--out", "taken")
    config = {
        "name": "on",
        "model": taken["model"],
        "init": {"source": "qwen"},
        "data": {"train": "shards/train"},
        "batch": {"size": 2},
        "duration": "6 steps",
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "precision": "fp32",
        "tracking": {"wandb": "disabled"},
    }
    Path("on.yaml").write_text(yaml.safe_dump(config))
    done = bigtrain("train", "on.yaml", "--nproc", 2)
    assert done.returncode == 0, done.stderr
    command("checkpoint", "export", "on", "--format", "hf", "--out", "exported")
    found = bigtrain("evaluate", "qwen", "on", "exported", "--data", "shards/train", "--json")
    assert found.returncode == 0, found.stderr
    before, after, exported = (row["sets"]["all"]["loss"] for row in json.loads(found.stdout)["checkpoints"])
    assert after < before - 0.1
    assert exported == pytest.approx(after, rel=1e-6)
    assert transformers.AutoModelForCausalLM.from_pretrained("exported").config.model_type == "qwen2"


@pytest.mark.exhaustive
def test_pictures_of_several_sizes_in_a_tar_become_a_classifier(
    bigtrain: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    with tarfile.open("pictures.tar", "w") as tar:
        for number in range(80):
            label, (height, width) = number % 2, draw.integers(20, 60, 2)
            pixels = draw.integers(0, 40, (height, width, 3), dtype=np.uint8)
            pixels[:, : width // 2] += np.uint8(180 * label)  # the left half is bright in one class
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, ("PNG", "JPEG")[number % 3 > 0])
            add(tar, f"{number:03d}.{('png', 'jpg')[number % 3 > 0]}", file.getvalue())
            add(tar, f"{number:03d}.cls", str(label).encode())
            add(tar, f"{number:03d}.json", b'{"camera": "x"}')
    command("data", "pack", "pictures.tar", "--images", "--image-size", 16, "--validation", "20%", "--out", "shards")
    config = {
        "name": "bright",
        "model": {"arch": "vit", "image_size": 16, "patch": 8, "layers": 1, "width": 16, "heads": 2},
        "data": {"train": "shards/train", "validation": "shards/validation"},
        "batch": {"size": 16},
        "duration": "20 epochs",
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "precision": "fp32",
        "evaluation": {"every": "20 epochs", "evaluators": [{"name": "loss"}, {"name": "accuracy"}]},
        "tracking": {"wandb": "disabled"},
    }
    Path("bright.yaml").write_text(yaml.safe_dump(config))
    done = bigtrain("train", "bright.yaml")
    assert done.returncode == 0, done.stderr
    found = bigtrain("evaluate", "bright", "--data", "shards/validation", "--json")
    assert found.returncode == 0, found.stderr
    command("checkpoint", "export", "bright", "--out", "exported")
    weights = safetensors.torch.load_file(next(Path("exported").glob("*.safetensors")))
    loaded = load("bright", runs_dir="runs")
    assert all(torch.equal(weights[name], value) for name, value in loaded.named_parameters())
    bright = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    bright[1, :, :8] = 200
    assert loaded.logits({"images": bright}).argmax(1).tolist() == [0, 1]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member of a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.mark.exhaustive
def test_the_script_of_answers_runs_in_small(tmp_path: Path) -> None:
    import subprocess
    import sys

    root = Path(__file__).parents[2]
    text = tmp_path / "novels"
    text.mkdir()
    (text / "a.txt").write_text("\n".join(STORIES) * 40)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "bigtrain").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m bigtrain.cli "$@"\n')
    (tools / "bigtrain").chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": sys.executable, "TEXT": str(text),
        "BASE_STEPS": "32", "ANSWER_STEPS": "44",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(root / "launch" / "answers.sh")], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [one["all"].endswith(" of 60") for one in counts] == [True, True]
