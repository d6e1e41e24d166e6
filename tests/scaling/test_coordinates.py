"""The coordinate check: flat under muP, not flat in the standard parametrization, and what it refuses."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtrain.models.config import FAMILIES
from bigtrain.scaling.coordinates import FLAT, judge
from bigtrain.training.coordinates import at_width

MUP = {"base_width": 32}
MODEL = {"arch": "llama", "layers": 1, "width": 32, "heads": 2, "context": 16}
OPTIONS = ("--widths", "32,64,128", "--steps", "3", "--random-tokens", "61", "--json")


@pytest.fixture
def check(write_config: Callable[..., Path], bigtrain_here: Callable) -> Callable[..., dict[str, Any]]:
    def run(*options: str, optimizer: dict[str, Any] | None = None, **model: Any) -> dict[str, Any]:
        config = write_config(model={**MODEL, **model}, optimizer={"lr": 3e-3, **(optimizer or {})})
        return json.loads(bigtrain_here("scaling", "coordinate-check", config, *options).stdout)

    return run


@pytest.mark.parametrize("tied", [False, True])
def test_changes_are_flat_under_mup_and_grow_without(tied: bool, check: Callable, tmp_path: Path) -> None:
    found = check(*OPTIONS, "--out", "out", mup=MUP, tied=tied)
    assert found["flat"]
    last = {place: slopes[-1] for place, slopes in found["slopes"]["change"].items()}
    assert max(map(abs, last.values())) < FLAT
    root = ET.fromstring((tmp_path / "out" / "coordinates.svg").read_text())
    assert len([one for one in root.iter() if one.tag.endswith("polyline") and one.get("stroke-width") == "1.5"]) == 8
    assert json.loads((tmp_path / "out" / "coordinates.json").read_text())["slopes"] == found["slopes"]

    standard = check(*OPTIONS, tied=tied)
    assert not standard["flat"]
    grown = {place: slopes[-1] for place, slopes in standard["slopes"]["change"].items()}
    assert grown.pop("embedding") < FLAT
    assert min(grown.values()) > 0.7
    # At the base width, the first of both, they are one model.
    assert found["losses"][0] == standard["losses"][0]


@pytest.mark.slow
@pytest.mark.parametrize(("base", "flat"), [({"base_head_width": 16}, True), ({}, False)])
def test_wider_heads_want_their_own_base_width(base: dict[str, int], flat: bool, check: Callable) -> None:
    """By queries and keys that agree: at the start the scores of random ones are small at every width."""
    options = ("--widths", "32,128,512", "--steps", "30", "--keep", "heads", "--random-tokens", "61", "--json")
    found = check(*options, optimizer={"lr": 1e-2}, mup={**MUP, **base})
    assert found["flat"] == flat


def test_the_config_s_own_data_are_used_and_the_table_names_them(
    write_config: Callable[..., Path], bigtrain_here: Callable
) -> None:
    config = write_config(model={**MODEL, "mup": MUP})
    done = bigtrain_here("scaling", "coordinate-check", config, "--widths", "32,64", "--steps", "2", "--sequences", "2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "each step 2 sequences of 16 tokens of data.train" in lines[0]
    assert "muP from width 32" in lines[0]
    row = next(line.split() for line in lines if line.startswith("logits |change|") and line.split()[2] == "2")
    assert len(row) == 7
    assert "loss of the last step" in done.stdout


@pytest.mark.parametrize(
    ("options", "model", "optimizer", "says"),
    [
        (("--widths", "32,40"), {}, {}, "width 40 cannot keep heads of width 16"),
        (("--widths", "32"), {}, {}, "--widths must be two or more different widths"),
        (("--widths", "32,x"), {}, {}, "--widths must be two or more different widths"),
        ((), {"adapter": {"name": "lora"}}, {}, "with an adapter"),
        ((), {"mup": MUP}, {"name": "sgd"}, "the optimizer 'sgd' follows another"),
    ],
)
def test_what_cannot_be_checked_is_refused(
    options: tuple[str, ...], model: dict[str, Any], optimizer: dict[str, Any], says: str, check: Callable
) -> None:
    assert says in check(*options, "--json", "--random-tokens", "61", optimizer=optimizer, **model)["error"]


def test_a_shape_at_another_width() -> None:
    model = FAMILIES["llama"](**{**MODEL, "width": 64, "heads": 4, "kv_heads": 2, "mlp_width": 96})
    wide = at_width(model, 128, "head_width")
    assert (wide.heads, wide.kv_heads, wide.width_of_head, wide.mlp_width) == (8, 4, 16, 192)
    tall = at_width(model, 128, "heads")
    assert (tall.heads, tall.kv_heads, tall.width_of_head, tall.mlp_width) == (4, 2, 32, 192)
    same = at_width(model, 64, "heads")
    assert same.parameter_shapes(61) == model.parameter_shapes(61)


def test_slopes_and_verdicts_of_planted_powers() -> None:
    widths = [64, 128, 256]
    powers = {"embedding": 0.0, "layers.0.mlp": 1.0, "logits": -0.5}
    values = {place: [[3.0 * width**power] * 2 for width in widths] for place, power in powers.items()}
    values["layers.0.attention"] = [[1.0, 1.0], [1.0, 1.0], [1.0, np.inf]]
    found = judge({"widths": widths, "steps": 1, "places": list(values), "size": values, "change": values})
    for place, power in powers.items():
        assert found["slopes"]["change"][place] == pytest.approx([power] * 2)
    assert found["slopes"]["size"]["layers.0.attention"] == [pytest.approx(0), None]
    assert found["verdicts"] == {
        "embedding": "flat", "layers.0.mlp": "grows", "logits": "shrinks", "layers.0.attention": "grows"
    }  # fmt: skip
    assert not found["flat"]


def test_activations_of_zero_do_not_grow() -> None:
    values = {"logits": [[0.0, 0.0]] * 2, "embedding": [[1.0, 2.0]] * 2}
    found = judge({"widths": [64, 128], "steps": 1, "places": list(values), "size": values, "change": values})
    assert found["verdicts"] == {"logits": "zero", "embedding": "flat"}
    assert not found["flat"]
