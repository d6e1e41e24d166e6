"""A plugin: two parts, whose process dies in the pass of a part, or just before it, where a file says so."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.models.config import DataKind
from bigtrain.models.plain import Batch, PlainConfig

PLACE = "MORTAL_FILES"
"""Variable that names a folder with a file STEP-PART for each death; the process that dies removes it."""


class Adversaries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6))
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Dropout(0.1), nn.Linear(8, 1))

    def forward(self, x: Tensor, step: Tensor, part: str) -> tuple[Tensor, ...]:
        death = Path(os.environ.get(PLACE, "nowhere"), f"{int(step)}-{part}")
        if self.training and death.exists():
            death.unlink(missing_ok=True)
            os.kill(os.getpid(), signal.SIGKILL)
        made = self.critic(self.maker(torch.randn(len(x), 3)))[:, 0]
        return (made,) if part == "maker" else (made, self.critic(x)[:, 0])


class Config(PlainConfig):
    data_kind: ClassVar[DataKind] = "arrays"
    parts: ClassVar[tuple[str, ...]] = ("critic", "maker")
    arch: Literal["mortal"] = "mortal"

    @property
    def sample_arrays(self) -> dict[str, tuple[int, ...]]:
        return {"x": (6,)}

    def build(self, vocab_size: int) -> nn.Module:
        return Adversaries()

    def loss(self, output: Any, batch: Batch) -> Tensor:
        fooled, *real = output
        return F.softplus(fooled) + F.softplus(-real[0]) if real else F.softplus(-fooled)
