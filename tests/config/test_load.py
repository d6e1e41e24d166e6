"""From YAML and overrides to a run's config: every mistake has its line, and the nearest key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bigtrain.config import UserError
from bigtrain.run import RunConfig, load_config

MINIMAL = """\
name: small
model:
  arch: llama
  layers: 2
  width: 32
  heads: 4
  context: 16
data:
  train: shards/train
batch:
  size: 4
duration: 8 steps
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def refusal(file: Path, added: str = "", *overrides: str, instead: str = MINIMAL) -> UserError:
    file.write_text(instead + added)
    with pytest.raises(UserError) as caught:
        load_config(file, list(overrides))
    assert caught.value.exit_code == 2
    return caught.value


def line(file: Path, number: int) -> str:
    return f"{file}, line {number}"


@pytest.mark.parametrize(
    ("added", "number", "key", "near"),
    [
        ("optimzer: {lr: 1}\n", 13, "optimzer", "optimizer"),
        ("optimizer:\n  name: sgd\n  momentun: 0.9\n", 15, "optimizer.momentun", "momentum"),
        ("optimizer:\n  bettas: [0.9, 0.99]\n", 14, "optimizer.bettas", "betas"),
        ("optimizer:\n  groups:\n  - pattern: '*'\n    lr_scal: 1\n", 16, "optimizer.groups.0.lr_scal", "lr_scale"),
        ("schedule:\n  name: wsd\n  shap: linear\n", 15, "schedule.shap", "shape"),
        ("schedule: {warmupp: 1 step}\n", 13, "schedule.warmupp", "warmup"),
        ("job:\n  limits:\n\n    stap: 3\n", 16, "job.limits.stap", "step"),
        ("checkpoint:\n  keeplast: 3\n", 14, "checkpoint.keeplast", "keep_last"),
    ],
)
def test_an_unknown_key_is_named_with_its_line_and_the_nearest(
    file: Path, added: str, number: int, key: str, near: str
) -> None:
    error = refusal(file, added)
    assert (error.what, error.where) == (f"Unknown key '{key}'", line(file, number))
    assert error.fix == f"Did you mean '{near}'?"


@pytest.mark.parametrize(
    ("before", "after", "key", "near", "number"),
    [
        ("  heads: 4\n", "  heds: 4\n  heads: 4\n", "model.heds", "heads", 6),
        ("  arch: llama\n", "  arch: llama\n  kv_head: 2\n", "model.kv_head", "kv_heads", 4),
        ("  heads: 4\n", "  heads: 4\n  rope_scaling:\n    facto: 2.0\n", "model.rope_scaling.facto", "factor", 8),
        ("  train:", "  trian: x\n  train:", "data.trian", "train", 9),
    ],
)
def test_an_unknown_key_of_a_family_or_a_section_is_named_too(
    file: Path, before: str, after: str, key: str, near: str, number: int
) -> None:
    error = refusal(file, instead=MINIMAL.replace(before, after))
    assert (error.what, error.where, error.fix) == (
        f"Unknown key '{key}'",
        line(file, number),
        f"Did you mean '{near}'?",
    )


def test_each_family_has_its_own_keys(file: Path) -> None:
    vit = MINIMAL.replace("arch: llama", "arch: vit\n  image_size: 28").replace("  context: 16\n", "")
    file.write_text(vit)
    assert load_config(file).model.arch == "vit"
    error = refusal(file, instead=vit.replace("image_size", "imagesize"))
    assert "'model.imagesize'" in error.what or "'model.image_size' is missing" in error.what
    assert "image_size" in str(error)


def test_a_key_far_from_all_others_gets_the_list_of_them(file: Path) -> None:
    error = refusal(file, "batch2: {}\n", instead=MINIMAL.replace("  size: 4\n", "  size: 4\n  zzzz: 1\n"))
    assert "Known keys: size." in str(error)


@pytest.mark.parametrize(
    ("added", "number", "what", "near"),
    [
        ("optimizer:\n  lr: 1.0\n  name: adamww\n", 15, "Unknown optimizer 'adamww'", "adamw"),
        ("schedule: {name: cosin}\n", 13, "Unknown schedule 'cosin'", "cosine"),
    ],
)
def test_an_unknown_choice_of_a_union_is_named_with_the_nearest(
    file: Path, added: str, number: int, what: str, near: str
) -> None:
    error = refusal(file, added)
    assert (error.what, error.where) == (what, line(file, number))
    assert (error.fix or "").startswith(f"Did you mean '{near}'? Known: ")


@pytest.mark.parametrize(
    ("instead", "says"),
    [
        (MINIMAL.replace("arch: llama", "arch: lama"), "Did you mean 'llama'"),
        (MINIMAL.replace("arch: llama", "preset: lama3-8b"), "Did you mean 'llama3-8b'"),
        (MINIMAL.replace("arch: llama", "layers: 1").replace("  layers: 2\n", ""), "'model.arch' is missing"),
        (MINIMAL.replace("arch: llama", "arch: [llama]"), "Unknown model family"),
    ],
)
def test_the_model_is_a_known_family_or_preset(file: Path, instead: str, says: str) -> None:
    error = refusal(file, instead=instead)
    assert says in str(error)
    assert error.where in (line(file, 2), line(file, 3))


@pytest.mark.parametrize(
    "override",
    [
        "seed=true", "seed='3'", "seed=1.5", "seed=1.0", "seed=[1]", "seed=null", "model.layers='2'", "model.tied=1",
        "model.tied=no", "checkpoint.asynchronous=off", "optimizer.lr='1e-3'", "optimizer.lr=true", "optimizer=3",
        "optimizer.betas=3", "optimizer.betas=[0.9]", "optimizer.betas=[0.9, 0.9, 0.9]", "optimizer.betas={a: 1}",
        "optimizer.lr=.nan", "optimizer.lr=.inf", "optimizer.groups={pattern: x}", "data=x", "data.train=3",
        "data.train=null", "data.train=[a]", "data.train='ftp://x'", "batch=4", "batch.size=4.5", "duration=8",
        "duration=8 min", "duration=0 epochs", "precision=fp8", "name=12",
        "name=a/b", "name=..", "job.procs_per_node=two",
        "engine.deterministic=maybe", "layout.micro_size=0", "layout.dp_shard=0", "checkpoint.keep_last=1",
        "schedule.warmup=5 min", "schedule={name: wsd, decay: 1 h}", "schedule={name: wsd, decay: 120%}",
        "evaluation.every=5 min", "evaluation.every=0 steps", "tracking.every=10 tokens", "job.limits.step=5 steps",
        "model.dropout=1.0", "model.heads=5", "model.max_positions=8",
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_its_key_and_place(file: Path, override: str) -> None:
    error = refusal(file, "", override)
    key = override.partition("=")[0]
    section_of_all = ("model.heads", "model.max_positions")
    assert (key.partition(".")[0] if key in section_of_all else key) in error.what
    assert key in section_of_all or error.where == "command line"
    assert "\n" not in error.what


def test_a_value_that_fails_all_of_its_choices_is_one_problem(file: Path) -> None:
    error = refusal(file, "job: {procs_per_node: two}\n")
    assert error.where == line(file, 13)
    assert "'auto'" in error.what
    assert "integer" in error.what


@pytest.mark.parametrize("key", ["name", "model", "data", "batch", "duration"])
def test_a_missing_key_is_named(file: Path, key: str) -> None:
    document = yaml.safe_load(MINIMAL)
    del document[key]
    error = refusal(file, instead=yaml.safe_dump(document))
    assert error.what == f"The key '{key}' is missing"
    assert error.where == str(file)
    assert error.fix


def test_a_missing_key_inside_a_section_is_named_with_the_sections_line(file: Path) -> None:
    error = refusal(file, instead=MINIMAL.replace("  train: shards/train\n", "  validation: x\n"))
    assert (error.what, error.where) == ("The key 'data.train' is missing", line(file, 8))
    error = refusal(file, instead=MINIMAL.replace("  layers: 2\n", ""))
    assert (error.what, error.where) == ("The key 'model.layers' is missing", line(file, 2))


def test_all_problems_are_reported_at_once(file: Path) -> None:
    error = refusal(file, "seed: x\noptimzer: {}\nprecision: fp8\nschedule: {name: wsdd}\n", "batch.size=0")
    text = str(error)
    assert "5 problems" in text
    for part in (
        "seed",
        "'optimzer'",
        "precision",
        "'wsdd'",
        "batch.size",
        "line 13",
        "line 14",
        "line 15",
        "command line",
    ):
        assert part in text


def test_overrides_are_laid_over_the_file_and_checked_like_it(file: Path) -> None:
    config = load_config(file, ["optimizer.lr=3e-3", "schedule={name: cosine, warmup: 2 steps}", "model.layers=3"])
    assert (config.optimizer.lr, config.schedule.name, config.model.layers) == (3e-3, "cosine", 3)
    error = refusal(file, "", "optimizer={lx: 1}")
    assert (error.what, error.where) == ("Unknown key 'optimizer.lx'", "command line")
    for wrong in ("optimizer.lr", "=3", "optimizer..lr=3", ".lr=1"):
        assert "is not an override" in refusal(file, "", wrong).what
    assert "data.train" in refusal(file, "", "data.train.x=1").what
    assert "not YAML" in refusal(file, "", "optimizer.betas=[1").what


def test_the_name_of_the_command_line_stands_before_the_files_and_may_be_digits(file: Path) -> None:
    assert load_config(file, name="12").name == "12"
    with pytest.raises(UserError) as caught:
        load_config(file, name="a b")
    assert caught.value.where == "command line"


def test_a_preset_is_a_shape_whose_keys_can_be_overridden(file: Path) -> None:
    file.write_text(MINIMAL.replace("arch: llama", "preset: llama3-8b\n  kv_heads: 2"))
    model = load_config(file).model
    assert (model.arch, model.layers, model.kv_heads, model.mlp_width) == ("llama", 2, 2, 14336)
    error = refusal(file, instead=MINIMAL.replace("arch: llama", "preset: gpt2-124m\n  widht: 3"))
    assert (error.what, error.where) == ("Unknown key 'model.widht'", line(file, 4))


def test_files_that_cannot_be_read_are_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"name: \xff\n")
    for name, says in (("absent.yaml", "There is no file"), ("latin", "utf-8"), (".", "Is a directory")):
        with pytest.raises(UserError, match=says):
            load_config(tmp_path / name)


def test_defaults_fill_everything_but_five_keys(file: Path) -> None:
    config = load_config(file)
    assert isinstance(config, RunConfig)
    required = {name for name, field in RunConfig.model_fields.items() if field.is_required()}
    assert required == {"name", "model", "data", "batch", "duration"}
    assert Path(config.data.train).is_absolute()
