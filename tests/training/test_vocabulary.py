"""Weights of a vocabulary of another size: kept rows, new rows, at one rank and at two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from bigtrain.checkpoint.huggingface import import_hf
from bigtrain.config import UserError
from bigtrain.parallel.mesh import Ranks
from bigtrain.run import RunDirectory, load_config
from bigtrain.testing.equivalence import gather
from bigtrain.testing.ranks import RankPool
from bigtrain.training.config import InitConfig
from bigtrain.training.restoring import Restoring

STORED = 97
MODEL = {
    "arch": "llama", "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "context": 32,
    "norm_eps": 1e-5,
}  # fmt: skip


def begun(config_path: str, rows: int) -> dict[str, Tensor]:
    """All weights with which a run of a vocabulary of so many rows begins."""
    config = load_config(Path(config_path))
    engine = config.engine.build(
        config.model, rows, config.optimizer, layout=config.layout, precision="fp32", seed=config.seed,
        ranks=Ranks.from_environment(),
    )  # fmt: skip
    Restoring(engine, config, RunDirectory(f"{config_path}.run"), lambda event, **fields: None).start()
    state = engine.state()
    found = gather({name: state[name] for name in state if name.startswith("model.")})
    engine.close()
    return {name.removeprefix("model."): tensor for name, tensor in found.items()}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        vocab_size=STORED, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=32, rms_norm_eps=1e-5,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("weights") / "hf"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def written(place: Path, name: str, **sections: Any) -> str:
    path = place / f"{name}.yaml"
    text = {"name": name, "model": MODEL, "data": {"train": "shards"}, "batch": {"size": 2}, "duration": "1 steps"}
    path.write_text(yaml.safe_dump({**text, **sections}))
    return str(path)


def check(found: dict[str, Tensor], rows: int, stored: dict[str, Tensor], fresh: dict[str, Tensor] | None) -> None:
    """Kept rows to the bit; new ones the mean, or to the bit those of the seed."""
    for name, hf_name in (("embedding.weight", "model.embed_tokens.weight"), ("head.weight", "lm_head.weight")):
        kept, source = min(rows, STORED), stored[hf_name]
        assert found[name].shape == (rows, 32)
        assert torch.equal(found[name][:kept], source[:kept])
        if fresh is not None:
            assert torch.equal(found[name][kept:], fresh[name][kept:])
        else:
            expected = source.double().mean(0).float().expand(rows - kept, -1)
            torch.testing.assert_close(found[name][kept:], expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(found["norm.weight"], stored["model.norm.weight"])


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2, "micro_size": 1}),
}


@pytest.mark.parametrize("how", [how if how == "one" else pytest.param(how, marks=pytest.mark.slow) for how in LAYOUTS])
def test_rows_are_kept_by_their_ids_and_new_ones_begin_by_the_rule(
    how: str, weights: Path, tmp_path: Path, ranks: RankPool
) -> None:
    ranks_of, layout = LAYOUTS[how]
    stored = load_file(weights / "model.safetensors")
    import_hf(weights, tmp_path / "imported")
    sources = {"hf": str(weights), "imported": f"{tmp_path / 'imported'}@0"}
    for rows in (131, 61) if ranks_of == 1 else (131,):
        [fresh] = ranks.run(begun, written(tmp_path, "fresh"), rows, ranks=1)
        for kind, source in sources.items():
            for rule in ("mean", "seed"):
                init = {"source": source, "new_rows": rule}
                path = written(tmp_path, f"{kind}-{rule}-{rows}", init=init, layout=layout)
                found = ranks.run(begun, path, rows, ranks=ranks_of)[0]
                check(found, rows, stored, fresh if rule == "seed" else None)


def test_a_rule_for_new_rows_goes_with_weights_alone() -> None:
    with pytest.raises(ValidationError, match="new rows have no optimizer state"):
        InitConfig(source="run@1", state="all", new_rows="mean")


def test_without_a_rule_rows_that_do_not_fit_are_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"embedding\.weight is \(97, 32\) in the weights and \(131, 32\) here"):
        begun(written(tmp_path, "refused", init={"source": str(weights)}), 131)
