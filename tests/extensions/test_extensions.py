"""Every registered implementation, and a user's own in one file each, through what bigtrain does with it."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import BaseModel

import bigtrain
from bigtrain.config import REGISTRIES
from bigtrain.config.plugin import load_plugin
from bigtrain.config.registry import Registry
from bigtrain.optim.config import OPTIMIZERS, SCHEDULES
from bigtrain.run import config_schema
from bigtrain.storage import read_lines
from bigtrain.testing.equivalence import OF_NUMBERS, How, What
from bigtrain.testing.ranks import RankPool
from tests.equivalence.test_moves import resume, save

PLUGINS = Path(__file__).parent / "plugins"
SHAPE = {"arch": "llama", "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 56}
RELATIVE = 1e-5

for module in pkgutil.walk_packages(bigtrain.__path__, "bigtrain."):
    # An extension point comes into being where its base is defined: beside a room's contract or config.
    if module.name.rpartition(".")[2] in ("config", "contract", "registry"):
        importlib.import_module(module.name)
IMPLEMENTATIONS = [(point, name) for point, registry in REGISTRIES.items() for name in registry.builtin()]


@pytest.mark.parametrize(("point", "name"), IMPLEMENTATIONS)
def test_an_implementation_bears_its_file_s_name_and_is_documented(point: str, name: str) -> None:
    registry: Registry[object] = REGISTRIES[point]
    value = registry[name]
    assert registry.has_name(value)
    assert registry.get(value) is value
    assert issubclass(value, registry.base)
    assert value.__doc__
    if issubclass(value, BaseModel):
        undocumented = [key for key, field in value.model_fields.items() if not field.description]
        assert set(undocumented) <= {registry.tag, "context", *value.__bases__[0].model_fields}, undocumented


@pytest.mark.parametrize("point", ["optimizer", "schedule", "engine"])
def test_the_schema_and_the_errors_name_every_implementation(point: str) -> None:
    schema, registry = config_schema(), REGISTRIES[point]
    choices = schema["properties"][point]["anyOf"]
    named = [schema["$defs"].get(choice.get("$ref", "").rpartition("/")[2], choice) for choice in choices]
    assert sorted(choice["properties"]["name"]["const"] for choice in named) == sorted(registry)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_every_optimizer_moves_to_another_layout(ranks: RankPool, tmp_path: Path, name: str) -> None:
    what = What(SHAPE, optimizer={"name": name, **({"momentum": 0.9} if name in ("sgd", "rmsprop") else {})})
    losses = ranks.run(save, what, How(2), tmp_path, ranks=2)[0]
    continued = ranks.run(resume, what, How(1), tmp_path, ranks=1)[0]
    assert not continued.different
    assert continued.losses == pytest.approx(losses, rel=OF_NUMBERS)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [How(2, {"tp": 2}), How(2, {"pp": 2})], ids=["tp2", "pp2"])
def test_a_user_s_family_and_optimizer_move_between_layouts(ranks: RankPool, tmp_path: Path, layout: How) -> None:
    what = What(
        SHAPE | {"arch": "squared", "layers": 4},
        plugin=f"{PLUGINS / 'squared.py'}:{PLUGINS / 'nadam.py'}",
        optimizer={"name": "nadam", "eps": 1e-6},
    )
    losses = ranks.run(save, what, layout, tmp_path, ranks=2)[0]
    continued = ranks.run(resume, replace(what), How(1), tmp_path, ranks=1)[0]
    assert not continued.different
    assert continued.losses == pytest.approx(losses, rel=OF_NUMBERS)


@pytest.mark.slow
def test_a_user_s_optimizer_schedule_and_family_train_and_resume_at_another_layout(
    bigtrain: Callable, write_config: Callable, tmp_path: Path
) -> None:
    plugins = [part for name in ("nadam", "inverse_sqrt", "squared") for part in ("--plugin", PLUGINS / f"{name}.py")]
    sections = {
        "model": {"arch": "squared", "layers": 2, "width": 32, "heads": 4, "context": 32},
        "optimizer": {"name": "nadam", "lr": 1e-3, "eps": 1e-6},
        "schedule": {"name": "inverse-sqrt", "warmup": "2 steps"},
    }
    first = bigtrain("train", write_config(**sections, duration="4 steps"), *plugins, "layout.tp=2", "--nproc", 2)
    assert first.returncode == 0, first.stderr
    config = write_config(**sections)
    second = bigtrain("train", config, *plugins)
    assert second.returncode == 0, second.stderr
    assert "resuming after step 4" in second.stderr
    assert bigtrain("train", config, *plugins, "--name", "alone").returncode == 0
    runs = tmp_path / "runs"
    moved, alone = ([row["loss"] for row in read_lines(runs / name / "metrics.jsonl")] for name in ("tiny", "alone"))
    assert len(alone) == 8
    assert moved == pytest.approx(alone, rel=RELATIVE)
    record = json.loads((runs / "tiny" / "run.json").read_text())
    assert all(record["what"][key]["plugin"] for key in ("model", "optimizer", "schedule"))
    without = bigtrain("train", config, *plugins[2:])
    assert "Add --plugin" in without.stderr or "Unknown optimizer 'nadam'" in without.stderr


def test_a_name_of_bigtrain_s_own_and_a_name_given_twice_are_refused(tmp_path: Path) -> None:
    text = (PLUGINS / "nadam.py").read_text()
    (tmp_path / "taken.py").write_text(text.replace('Literal["nadam"] = "nadam"', 'Literal["adam"] = "adam"'))
    (tmp_path / "twice.py").write_text(text)
    for place, says in (
        (str(tmp_path / "taken.py"), "is already used by one of bigtrain's own"),
        (f"{PLUGINS / 'nadam.py'}:{tmp_path / 'twice.py'}", "Two plugins register the optimizer 'nadam'"),
    ):
        with pytest.raises(Exception, match=says):
            load_plugin(place)


def test_what_is_registered_is_known_by_its_name_alone() -> None:
    assert "nadam" not in OPTIMIZERS
    load_plugin(str(PLUGINS / "nadam.py"))
    assert OPTIMIZERS.read({"name": "nadam"}).name == "nadam"
    assert "inverse-sqrt" not in SCHEDULES


def test_the_example_of_the_readme_is_a_schedule(tmp_path: Path) -> None:
    readme = (Path(bigtrain.__file__).parent / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "my_schedule.py").write_text(code)
    load_plugin(str(tmp_path / "my_schedule.py"))
    schedule = SCHEDULES.read({"name": "straight", "warmup": "2 steps"}).build(
        1.0, 10, lambda length: int(length.value)
    )
    assert [schedule.lr(step) for step in (0, 1, 2, 6)] == [0.5, 1.0, 1.0, 0.5]
