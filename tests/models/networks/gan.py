"""Networks of two parts, the file around them, and how they are trained on a rank and in plain torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.config.plugin import load_plugin
from bigtrain.engines.fsdp.config import FSDPConfig
from bigtrain.models.config import FAMILIES, DataKind
from bigtrain.models.plain import Batch, PlainConfig, pixels
from bigtrain.optim.config import OPTIMIZERS
from bigtrain.optim.schedules.constant import ConstantConfig
from bigtrain.parallel.config import LayoutConfig
from bigtrain.parallel.mesh import Ranks
from bigtrain.testing.equivalence import gather

SIZE, LATENT, STEPS, SEED = 6, 4, 5, 3
OPTIMIZER = {"name": "adam", "lr": 2e-3, "betas": [0.9, 0.95], "eps": 1e-6, "clip": 0.5}
OF_PARTS = (
    {"optimizer": {"lr": 1e-3, "clip": None}},
    {"every": 2, "schedule": {"name": "constant", "warmup": "4 steps"}},
)
"""Keys of the first and of the second part of a network."""


class Adversaries(nn.Module):
    """Goodfellow et al. (2014), with batch statistics in the maker and a buffer that counts its updates."""

    def __init__(self, noisy: bool) -> None:
        super().__init__()
        self.noisy = noisy
        self.maker = nn.Sequential(
            nn.Linear(LATENT, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, SIZE * SIZE)
        )
        self.critic = nn.Sequential(nn.Linear(SIZE * SIZE, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1), nn.Flatten(0))

    def forward(self, x: Tensor, part: str) -> tuple[Tensor, ...]:
        noise = torch.randn(len(x), LATENT) if self.noisy else x[:, :LATENT]
        made = self.maker(noise)
        return (self.critic(made),) if part == "maker" else (self.critic(made.detach()), self.critic(x))


class Config(PlainConfig):
    data_kind: ClassVar[DataKind] = "images"
    parts: ClassVar[tuple[str, ...]] = ("critic", "maker")
    arch: Literal["adversaries"] = "adversaries"
    noisy: bool = False

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (SIZE, SIZE, 1)

    def build(self, vocab_size: int) -> nn.Module:
        return Adversaries(self.noisy)

    def inputs(self, batch: Batch) -> Any:
        return pixels(batch).flatten(1), batch["part"]

    def loss(self, output: Any, batch: Batch) -> Tensor:
        fooled, *real = output
        return F.softplus(fooled) + F.softplus(-real[0]) if real else F.softplus(-fooled)


def _base() -> Any:
    spec = importlib.util.spec_from_file_location("networks_training", Path(__file__).with_name("training.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_of(arch: str = "adversaries", **keys: Any) -> Any:
    load_plugin(__file__)
    return FAMILIES[arch](**keys)


def optimizer_of(config: Any) -> Any:
    return OPTIMIZERS.read({**OPTIMIZER, "parts": dict(zip(config.parts, OF_PARTS, strict=True))})


def engine_of(config: Any) -> Any:
    return FSDPConfig().build(
        config, 0, optimizer_of(config), layout=LayoutConfig(), precision="fp32", seed=SEED,
        ranks=Ranks.from_environment(),
    )  # fmt: skip


class Killed(Exception):
    """Ends a step between its updates."""


def _kill(*_: Any) -> None:
    raise Killed


def train(
    keys: dict[str, Any] | None = None, resume_at: int | None = None, killed: bool = False, fault: bool = False
) -> Any:
    """Losses of both parts in each step, of an evaluation at the end, and the final state in full.

    Args:
        keys: Of the network's config.
        resume_at: A new engine takes over the state before this step.
        killed: The step that is then repeated had ended between its two updates.
        fault: The maker's update moves the critic as well.
    """
    base = _base()
    config = config_of(**keys or {})
    engine = engine_of(config)
    if fault:
        engine.parts[1].optimizer.param_groups[0]["params"] += engine.parts[0].parameters
    schedule = optimizer_of(config).schedule_of(ConstantConfig(), STEPS, lambda duration: int(duration.value))

    def part_of(step: int) -> Any:
        batch = base.global_batch(config, step)
        return base.own_part(batch, engine.data_parallel_rank, engine.data_parallel_size, None)

    losses = []
    for step in range(STEPS):
        if step == resume_at:
            saved = {name: x.detach().clone() for name, x in engine.state().items()}
            if killed:
                engine.parts[1].optimizer.register_step_pre_hook(_kill)
                try:
                    engine.train_step(step, part_of(step), schedule.lr(step))
                except Killed:
                    pass
                else:
                    raise AssertionError("the second update was not due")
            engine = engine_of(config)
            with torch.no_grad():
                for name, x in engine.state().items():
                    x.copy_(saved[name])
            engine.state_loaded()
        metrics = engine.train_step(step, part_of(step), schedule.lr(step)).read().metrics
        losses.append([metrics[f"loss/{part}"].result for part in config.parts if f"loss/{part}" in metrics])
    totals = engine.evaluate(iter([part_of(99)]))
    losses.append([totals.mean_loss, *(totals.metrics[f"loss/{part}"].result for part in config.parts)])
    return losses, gather(dict(engine.state()))


def reference() -> tuple[list[list[float]], dict[str, Tensor]]:
    """The same in plain torch."""
    config = config_of()
    base = _base()
    torch.manual_seed(SEED)
    network = config.build(0)
    critic = torch.optim.Adam(network.critic.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-6)
    maker = torch.optim.Adam(network.maker.parameters(), lr=2e-3, betas=(0.9, 0.95), eps=1e-6)

    def loss_of(step: int, part: str) -> Tensor:
        batch: dict[str, Any] = {name: torch.from_numpy(x) for name, x in base.global_batch(config, step).items()}
        output = network(pixels(batch).flatten(1), part)
        losses, weights = config.loss(output, batch), batch["weights"]
        return (losses * weights).sum() / weights.sum()

    losses = []
    for step in range(STEPS):
        found = [loss_of(step, "critic")]
        critic.zero_grad()
        found[0].backward()
        critic.step()
        if step % 2:
            found.append(loss_of(step, "maker"))
            maker.zero_grad()
            found[1].backward()
            torch.nn.utils.clip_grad_norm_(network.maker.parameters(), 0.5)
            for group in maker.param_groups:
                group["lr"] = 2e-3 * min(1.0, (step + 1) / 4)
            maker.step()
        losses.append([loss.item() for loss in found])
    network.eval()
    last = [loss_of(99, part).item() for part in config.parts]
    return [*losses, [last[0], *last]], {f"model.{name}": x.detach() for name, x in network.state_dict().items()}
