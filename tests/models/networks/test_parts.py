"""Several optimizers in a step: each part of a model by its own loss, equal to plain torch's and at two ranks."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from bigtrain.config import UserError
from bigtrain.engines.config import ENGINES
from bigtrain.engines.support import check_support
from bigtrain.models.config import FAMILIES
from bigtrain.optim.config import OPTIMIZERS
from bigtrain.parallel.config import LayoutConfig
from bigtrain.testing.ranks import RankPool

_spec = importlib.util.spec_from_file_location("networks_gan", Path(__file__).with_name("gan.py"))
assert _spec is not None
assert _spec.loader is not None
gan: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gan)

AGREES = 1e-5
"""Relative above 1, in FP32: sums are taken in another order."""
DCGAN: dict[str, Any] = {"arch": "dcgan", "image_size": 8, "channels": 1, "width": 3, "latent": 4}


def away(a: list[list[float]], b: list[list[float]]) -> float:
    assert [len(one) for one in a] == [len(one) for one in b]
    pairs = zip(itertools.chain(*a), itertools.chain(*b), strict=True)
    return max(abs(x - y) / max(1.0, abs(x)) for x, y in pairs)


def test_one_process_and_two_ranks_give_what_plain_torch_gives(ranks: RankPool) -> None:
    losses, state = gan.reference()
    for count in (1, 2):
        found, own = ranks.run(gan.train, ranks=count)[0]
        assert away(losses, found) <= AGREES, count
        off = [name for name, x in state.items() if not torch.allclose(x, own[name], rtol=1e-4, atol=1e-5)]
        assert off == [], count


@pytest.mark.parametrize("keys", [{"noisy": True}, DCGAN, {**DCGAN, "hidden": 5}], ids=["noisy", "dcgan", "hidden"])
def test_a_resumed_run_is_the_undisturbed_one_to_the_bit_also_after_a_death_between_updates(
    ranks: RankPool, keys: dict[str, Any]
) -> None:
    alone = ranks.run(gan.train, keys, ranks=1)[0]
    for killed in (False, True):
        losses, state = ranks.run(gan.train, keys, 3, killed, ranks=1)[0]
        assert losses == alone[0]
        assert all(torch.equal(x, state[name]) for name, x in alone[1].items())
    # Noise that each part draws for itself follows the sequences.
    assert away(alone[0], ranks.run(gan.train, keys, ranks=2)[0][0]) <= AGREES


@pytest.mark.slow
def test_an_update_that_moves_the_other_part_is_seen(ranks: RankPool) -> None:
    losses, _ = gan.reference()
    assert away(losses, ranks.run(gan.train, {}, None, False, True, ranks=1)[0][0]) > 10 * AGREES


def test_the_check_before_the_start_takes_it() -> None:
    gan.config_of(noisy=True).check(0)


@pytest.mark.parametrize(
    ("engine", "keys", "precision", "words"),
    [
        ("fsdp", {"parts": {"critic": {}}}, "fp32", "has critic, but a model of arch"),
        ("fsdp", {}, "fp32", "has nothing, but a model of arch"),
        (
            "fsdp",
            {"parts": {"discriminator": {"every": 2}, "generator": {}}},
            "fp32",
            "The first part, 'discriminator', is not updated",
        ),
        ("fsdp", {"parts": {"discriminator": {}, "generator": {}}}, "fp16", "one loss scale"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(engine: str, keys: Any, precision: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_support(
            ENGINES[engine](), "dcgan", LayoutConfig(), optimizer=OPTIMIZERS.read({"name": "adam", **keys}),
            precision=precision,
        )  # fmt: skip


def test_a_model_without_parts_and_an_engine_of_one_optimizer_refuse_them() -> None:
    parts = OPTIMIZERS.read({"name": "adam", "parts": {"a": {}}})
    with pytest.raises(UserError, match="has no parts"):
        check_support(ENGINES["fsdp"](), "vit", LayoutConfig(), optimizer=parts)
    with pytest.raises(UserError, match="'deepspeed' has one optimizer"):
        check_support(ENGINES["deepspeed"](), "vit", LayoutConfig(), optimizer=parts)


def test_a_parameter_of_two_parts_is_refused() -> None:
    from bigtrain.engines.fsdp.parts import build_parts

    network = FAMILIES["dcgan"](width=2, latent=2).build(0)
    config = OPTIMIZERS.read({"name": "adam", "parts": {"discriminator": {"parameters": ["*.0.*"]}, "generator": {}}})
    with pytest.raises(UserError, match=r"'generator\.0\.weight' is in the parts discriminator and generator"):
        build_parts(config, ("discriminator", "generator"), list(network.named_parameters()), None)


@pytest.mark.parametrize("optimizer", [{"parts": {}}, {"frozen": ["*"]}, {"nme": 1}])
def test_keys_of_a_part_are_checked_with_the_config(optimizer: Any) -> None:
    with pytest.raises(ValueError, match=r"parts|nme"):
        OPTIMIZERS.read({"name": "adam", "parts": {"a": {"optimizer": optimizer}}})


STEPS, DEATHS = 16, 6


@pytest.mark.exhaustive
def test_a_run_killed_six_times_also_between_two_updates_ends_as_the_undisturbed_one(
    bigtrain: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((96, 6), dtype=np.float32))
    packed = bigtrain("data", "pack", "x.npy", "--arrays", "--validation", "10%", "--out", "data")
    assert packed.returncode == 0, packed.stderr
    config = {
        "name": "mortal",
        "model": {"arch": "mortal"},
        "data": {"train": "data/train", "validation": "data/validation"},
        "batch": {"size": 8},
        "duration": f"{STEPS} steps",
        "precision": "fp32",
        "optimizer": {"name": "adam", "parts": {"critic": {}, "maker": {"every": 2}}},
        "checkpoint": {"every": "2 steps"},
        "tracking": {"wandb": "disabled", "every": "1 step"},
        "job": {"max_failures": DEATHS},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    plugin = Path(__file__).with_name("mortal.py")
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"the moments follow from seed {seed}")
    # The maker is updated in every second step; its passes come after the critic's update.
    passes = [f"{step}-{part}" for step in range(STEPS) for part in ("critic", "maker")[: 1 + step % 2]]
    between = f"{STEPS - 3}-maker"
    passes.remove(between)
    moments = [between, *random.Random(seed).sample(passes, DEATHS - 1)]
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    monkeypatch.setenv("MORTAL_FILES", str(deaths))
    rows = {}
    for name in ("undisturbed", "killed"):
        if name == "killed":
            for moment in moments:
                (deaths / moment).touch()
        result = bigtrain("train", "config.yaml", "--plugin", plugin, "--nproc", 2, "--name", name)
        assert result.returncode == 0, result.stderr
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        keys = ("loss", "loss/critic", "loss/maker", "gradient_norm/maker", "val_loss", "val_loss/maker")
        by_step = {row["step"]: [row.get(key) for key in keys] for row in map(json.loads, lines)}
        assert sorted(by_step) == list(range(1, STEPS + 1))
        rows[name] = by_step
    assert not list(deaths.iterdir()), "a death did not come"
    assert rows["killed"] == rows["undisturbed"]
    last = rows["killed"][STEPS]
    assert None not in last, last
