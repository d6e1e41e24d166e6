"""Gradient clipping: its YAML, its formulas, and equal updates at every layout and engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from bigtrain.config.plugin import load_plugin
from bigtrain.engines.accelerate.config import AccelerateConfig
from bigtrain.engines.clipping import scale_and_clip, square_of
from bigtrain.engines.deepspeed.config import DeepSpeedConfig
from bigtrain.engines.fsdp.config import FSDPConfig
from bigtrain.engines.support import check_support
from bigtrain.optim.clip import CLIPS
from bigtrain.optim.config import OPTIMIZERS
from bigtrain.parallel.config import LayoutConfig
from bigtrain.run import RECIPE, load_config
from bigtrain.run.plugins import plugin_hashes
from bigtrain.testing.equivalence import LR, How, What, build, gather, micro_batches
from bigtrain.testing.ranks import RankPool

SOFT = Path(__file__).parents[1] / "extensions" / "plugins" / "soft_clip.py"
SHAPE = {"arch": "llama", "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 56}
RELATIVE = 1e-5
"""In FP32: sums over ranks in another order."""
STEPS = 2


def refused(clip: Any, write_config: Callable[..., Path], bigtrain_here: Callable[..., Any]) -> str:
    done = bigtrain_here("config", "show", write_config(optimizer={"clip": clip}))
    assert done.returncode == 2
    return done.stderr


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (0.5, 0.5),
        (2, 2.0),
        ({"name": "norm", "max": 0.5}, 0.5),
        ({"max": 0.5}, 0.5),
        ({}, 1.0),
        (None, None),
        ({"name": "value", "max": 0.5}, {"name": "value", "max": 0.5}),
        ({"name": "adaptive"}, {"name": "adaptive", "ratio": 0.01, "eps": 0.001}),
    ],
)
def test_a_number_is_the_largest_norm(given: Any, shown: Any) -> None:
    config = OPTIMIZERS.read({"name": "adamw", "clip": given})
    assert config.plain()["clip"] == shown
    again = OPTIMIZERS["adamw"].model_validate_json(json.dumps({"clip": given}), strict=True)
    assert again == config == OPTIMIZERS.read(config.plain())


@pytest.mark.parametrize(
    ("clip", "said"),
    [
        (-1, "optimizer.clip: input should be greater than 0 (got -1)"),
        ("big", "optimizer.clip: input should be a number or a mapping of keys"),
        (True, "optimizer.clip: input should be a number or a mapping of keys"),
        ({"name": "norms"}, "Unknown clip 'norms'"),
        ({"name": "value", "limit": 1}, "optimizer.clip.max"),
    ],
)
def test_what_is_no_clipping_is_refused_by_its_key(
    clip: Any, said: str, write_config: Callable[..., Path], bigtrain_here: Callable[..., Any]
) -> None:
    assert said in " ".join(refused(clip, write_config, bigtrain_here).split())


def clipped(clip: dict[str, Any], parameters: list[Tensor], scale: float) -> list[Tensor]:
    """The gradients of the parameters after `scale_and_clip`."""
    gradients = [one.grad.clone() for one in parameters if one.grad is not None]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    norm = square_of(gradients, torch.device("cpu")).sqrt() * scale
    scale_and_clip(gradients, torch.tensor(scale, dtype=torch.float64), norm, CLIPS.read(clip), parameters)
    return gradients


@pytest.fixture
def parameters() -> list[Tensor]:
    """A matrix, a filter, a vector and a matrix of zeros, with gradients."""
    torch.manual_seed(3)
    found: list[Tensor] = [torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 4), (3, 2, 2, 2), (6,), (4, 3))]
    found[-1].data.zero_()
    for parameter in found:
        parameter.grad = torch.randn(parameter.shape)
    return found


@pytest.mark.parametrize("limit", [0.3, 100.0])
def test_clipping_by_norm_and_by_value_is_torchs(limit: float, parameters: list[Tensor]) -> None:
    for name, reference in (
        ("norm", lambda: torch.nn.utils.clip_grad_norm_(parameters, limit)),
        ("value", lambda: torch.nn.utils.clip_grad_value_(parameters, limit)),
    ):
        before = [one.grad.clone() for one in parameters if one.grad is not None]
        found = clipped({"name": name, "max": limit}, parameters, 0.25)
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient * 0.25
        reference()
        for parameter, gradient in zip(parameters, found, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=RELATIVE, atol=0)
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


@pytest.mark.parametrize("ratio", [0.05, 0.3])
def test_adaptive_clipping_follows_its_formula(ratio: float, parameters: list[Tensor]) -> None:
    """Brock et al. 2021, eq. 3, in float64, unit by unit."""
    before = [one.grad.double() for one in parameters if one.grad is not None]
    found = clipped({"name": "adaptive", "ratio": ratio, "eps": 0.01}, parameters, 0.25)
    limited = 0
    for parameter, gradient, result in zip(parameters, before, found, strict=True):
        weights, mean = parameter.detach().double(), gradient * 0.25
        units = zip(weights, mean, result, strict=True) if weights.ndim > 1 else [(weights, mean, result)]
        for weight, unit, one in units:
            limit = ratio * max(float(weight.norm()), 0.01)
            factor = min(1.0, limit / float(unit.norm()))
            limited += factor < 1
            torch.testing.assert_close(one.double(), unit * factor, rtol=RELATIVE, atol=0)
    assert 4 < limited <= 13


def train(what: What, how: How) -> tuple[dict[str, Tensor], list[float]]:
    """All weights after some steps, and the norms of the gradients. Collective."""
    if what.plugin:
        load_plugin(what.plugin)
    engine = build(what, how)
    norms = []
    for step in range(STEPS):
        batch = micro_batches(what, how, step, engine.data_parallel_rank, engine.data_parallel_size)
        norms.append(engine.train_step(step, batch, LR * 100).read().gradient_norm)
    weights = {name: one for name, one in gather(engine.state()).items() if name.startswith("model.")}
    engine.close()
    return weights, norms


KINDS = {
    "value": {"name": "value", "max": 2e-3},
    "adaptive": {"name": "adaptive", "ratio": 0.02},
    "soft": {"name": "soft", "limit": 2e-3},
}
LAYOUTS = {
    "dp2": How(2),
    "tp2": How(2, {"tp": 2}),
    "hsdp2x2": How(4, {"dp_replicate": 2}),
    "dp2 x tp2": How(4, {"tp": 2}),
    "pp2": How(2, {"pp": 2}),
    "cp2": How(2, {"cp": 2}),
    "deepspeed 2": How(2, {}, {"name": "deepspeed", "zero": 2}),
    "deepspeed 3": How(2, {}, {"name": "deepspeed", "zero": 3}),
}
QUICK = {("value", "dp2"), ("adaptive", "dp2")}
BY_HAND = {("value", "hsdp2x2"), ("value", "dp2 x tp2"), ("value", "deepspeed 2")} | {
    ("soft", layout) for layout in LAYOUTS if layout != "dp2"
}


def tier(kind: str, layout: str) -> tuple[pytest.MarkDecorator, ...]:
    """Elementwise kinds meet one code path at every layout, of which CI needs a few."""
    if (kind, layout) in QUICK:
        return ()
    return (pytest.mark.exhaustive if (kind, layout) in BY_HAND else pytest.mark.slow,)


ROWS = [
    pytest.param(kind, layout, marks=tier(kind, layout))
    for kind in KINDS
    for layout in LAYOUTS
    if (kind, layout.partition(" ")[0]) != ("adaptive", "deepspeed")
]


@pytest.mark.parametrize(("kind", "layout"), ROWS)
def test_updates_are_those_of_one_process(kind: str, layout: str, ranks: RankPool) -> None:
    # Unlike Adam's, the steps of SGD are as long as its gradients.
    what = What(SHAPE, clip=KINDS[kind], optimizer={"name": "sgd"}, plugin=str(SOFT) if kind == "soft" else None)
    how = LAYOUTS[layout]
    alone, norms = ranks.run(train, what, How(), ranks=1)[0]
    found, others = ranks.run(train, what, how, ranks=how.ranks)[0]
    assert others == pytest.approx(norms, rel=RELATIVE)
    assert found.keys() == alone.keys()
    for name, value in alone.items():
        assert (found[name] - value).norm() <= RELATIVE * value.norm(), name
    free, _ = ranks.run(train, What(SHAPE, clip=None, optimizer={"name": "sgd"}), How(), ranks=1)[0]
    assert max(float((free[name] - value).norm() / value.norm()) for name, value in alone.items()) > 100 * RELATIVE


def test_clipping_by_parameter_is_refused_where_parameters_are_flat() -> None:
    optimizer = OPTIMIZERS.read({"name": "sgd", "clip": {"name": "adaptive"}})
    check_support(FSDPConfig(), "llama", LayoutConfig(), optimizer=optimizer)
    for engine, arch in ((DeepSpeedConfig(zero=0), "llama"), (AccelerateConfig(), "hf")):
        with pytest.raises(Exception, match="clipping 'adaptive' needs their shapes"):
            check_support(engine, arch, LayoutConfig(), optimizer=optimizer)


def test_a_users_clipping_belongs_to_the_identity(
    write_config: Callable[..., Path], bigtrain_here: Callable[..., Any]
) -> None:
    config = write_config(optimizer={"clip": {"name": "soft"}})
    assert "Unknown clip 'soft'" in bigtrain_here("config", "show", config).stderr
    done = bigtrain_here("config", "show", config, "--plugin", SOFT)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["optimizer"]["clip"] == {"name": "soft", "limit": 1.0}
    load_plugin(str(SOFT))
    assert set(plugin_hashes(load_config(config), RECIPE)) == {"optimizer"}
