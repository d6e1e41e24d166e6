"""A run that begins with Hugging Face weights and is exported to them again, through the commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from bigtrain.checkpoint.huggingface import import_hf
from bigtrain.checkpoint.loader import read_tensors
from bigtrain.run import ExitCode, RunDirectory, load_config
from bigtrain.training.export import _copy_generation, export_run
from tests.data.chats import TURN_ENDS, write_tokenizer

BYTES = 257
LOGITS = 1e-5


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=BYTES, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=32, rms_norm_eps=1e-5,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "weights", max_shard_size="60KB")
    return tmp_path / "weights"


MODEL = {
    "arch": "llama", "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "context": 32,
    "max_positions": 32,
}  # fmt: skip


def test_a_run_begins_with_weights_trains_a_part_and_goes_back(
    write_config: Callable, bigtrain: Callable, weights: Path, tmp_path: Path
) -> None:
    config = write_config(
        model=MODEL, duration="3 steps", init={"source": str(weights), "fresh": ["head.*"]},
        optimizer={"frozen": ["embedding.*", "layers.0.*"]},
    )  # fmt: skip
    result = bigtrain("train", config)
    assert result.returncode == ExitCode.FINISHED, result.stderr
    run = RunDirectory(tmp_path / "runs" / "tiny")
    step, keys = import_hf(weights, tmp_path / "imported")
    assert keys == {**MODEL, "norm_eps": 1e-5, "rope_theta": 1e4, "tied": False, "head_width": 8}
    begun, ended = read_tensors(tmp_path / "imported" / "checkpoints", step), read_tensors(run.checkpoints, 3)
    same = {name for name in begun if torch.equal(begun[name], ended[name])}
    assert same == {name for name in begun if name.startswith(("embedding.", "layers.0."))}
    assert (begun["head.weight"] - ended["head.weight"]).abs().mean() > 0.01, "the head was not initialized again"
    assert (begun["norm.weight"] - ended["norm.weight"]).abs().mean() < 0.01

    export_run(run, 3, tmp_path / "out")
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    native = load_config(run.config).model.build(BYTES)
    native.load_state_dict(ended)
    tokens = torch.randint(BYTES, (2, 32))
    with torch.no_grad():
        assert (hf_model(tokens).logits - native.logits({"tokens": tokens})).abs().max() < LOGITS


@pytest.mark.slow
def test_a_run_that_has_begun_goes_on_without_its_source(
    write_config: Callable, bigtrain: Callable, weights: Path, tmp_path: Path
) -> None:
    result = bigtrain("checkpoint", "import", weights, "--out", tmp_path / "imported", "--json")
    model = json.loads(result.stdout)["model"]
    for name, source in (("tiny", f"{tmp_path / 'imported'}@0"), ("direct", str(weights))):
        config = write_config(model=model, duration="2 steps", init={"source": source}, name=name)
        assert bigtrain("train", config).returncode == ExitCode.FINISHED
    first, second = (read_tensors(tmp_path / "runs" / name / "checkpoints", 2) for name in ("tiny", "direct"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    shutil.rmtree(weights)
    assert bigtrain("train", config, "duration=3 steps").returncode == ExitCode.FINISHED
    exported = bigtrain("checkpoint", "export", "direct@3", "--format", "hf", "--out", tmp_path / "out")
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["init.state=all"], "holds only weights"),
        (["init.fresh=[haed.weight]"], "nearest name is 'head.weight'"),
        (["init.hash=sha256:0"], "does not hold the weights that this run started from"),
    ],
)
def test_weights_that_a_run_cannot_begin_with_are_refused(
    write_config: Callable, bigtrain_here: Callable, weights: Path, overrides: list[str], said: str
) -> None:
    config = write_config(model=MODEL, duration="3 steps", init={"source": str(weights)})
    result = bigtrain_here("train", config, *overrides)
    assert result.returncode == ExitCode.USER
    assert said in result.stderr


@pytest.mark.slow
def test_deepspeed_begins_with_the_same_weights(
    write_config: Callable, bigtrain: Callable, weights: Path, tmp_path: Path
) -> None:
    config = write_config(model=MODEL, duration="3 steps", init={"source": str(weights)})
    for name, more in (("alone", []), ("spread", ["engine.name=deepspeed", "engine.zero=3", "--nproc", "2"])):
        result = bigtrain("train", config, *more, "--name", name)
        assert result.returncode == ExitCode.FINISHED, result.stderr
    rows = [
        [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("alone", "spread")
    ]
    losses, expected = ([row["loss"] for row in side] for side in rows)
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_tokenizer_that_transformers_reads_comes_along(
    bigtrain: Callable, write_config: Callable, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(json.__file__).read_text())
    own = write_tokenizer("gemma", tmp_path / "tokenizer")
    packed = bigtrain("data", "pack", text, "--out", tmp_path / "shards", "--tokenizer", own)
    assert packed.returncode == 0, packed.stderr
    config = write_config(model=MODEL, duration="1 steps", data={"train": str(tmp_path / "shards" / "train")})
    assert bigtrain("train", config).returncode == ExitCode.FINISHED
    result = bigtrain("checkpoint", "export", "tiny", "--format", "hf", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    from bigtrain.data.tokenizers import Tokenizer

    native = Tokenizer.open(str(own))
    assert tokenizer("def loads(s):")["input_ids"] == native.encode("def loads(s):").tolist()
    assert native.eot == tokenizer.eos_token_id
    turn = native.special_tokens[TURN_ENDS["gemma"]]
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == [native.eot, turn]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == [native.eot, turn]


@pytest.mark.parametrize(
    ("stops", "written"), [(7, [7, 3]), ([7, 3], [7, 3]), (3, 3), (None, None)], ids=["one", "both", "same", "none"]
)
def test_a_generation_config_stops_at_the_tokens_of_the_run_too(
    weights: Path, tmp_path: Path, stops: object, written: object
) -> None:
    settings = {"do_sample": True} if stops is None else {"do_sample": True, "eos_token_id": stops}
    (weights / "generation_config.json").write_text(json.dumps(settings))
    config = SimpleNamespace(model=SimpleNamespace(hf=str(weights)), init=None)
    _copy_generation(config, tmp_path, [3])  # type: ignore[arg-type]
    found = json.loads((tmp_path / "generation_config.json").read_text())
    assert found == {"do_sample": True} | ({} if written is None else {"eos_token_id": written})


@pytest.mark.slow
def test_a_model_of_transformers_is_exported_as_it_came_with_its_generation_config(
    bigtrain: Callable, write_config: Callable, weights: Path, tmp_path: Path
) -> None:
    generation = '{\n  "do_sample": true,\n  "temperature": 0.7\n}\n'
    (weights / "generation_config.json").write_text(generation)
    config = write_config(
        model={"arch": "hf", "hf": str(weights), "context": 32}, engine={"name": "accelerate"}, duration="2 steps"
    )
    done = bigtrain("train", config)
    assert done.returncode == ExitCode.FINISHED, done.stderr
    done = bigtrain("checkpoint", "export", "tiny", "--format", "hf", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "generation_config.json").read_text() == generation
    begun, written = (json.loads((place / "config.json").read_text()) for place in (weights, tmp_path / "out"))
    assert {**written, "dtype": begun["dtype"]} == begun
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    state = read_tensors(tmp_path / "runs" / "tiny" / "checkpoints", 2)
    assert state.keys() <= exported.keys()
    assert [name for name in state if not torch.equal(state[name], exported[name])] == []
    first = transformers.AutoModelForCausalLM.from_pretrained(weights).state_dict()
    assert [name for name in state if torch.equal(state[name], first[name])] == []
