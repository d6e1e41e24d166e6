"""State of networks: what a checkpoint would lose, or a layout would change, is refused by name before the start."""

from __future__ import annotations

import copy
import logging
import random
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.config import UserError
from bigtrain.models.config import DataKind
from bigtrain.models.plain import Batch, PlainConfig, pixels


class Base(nn.Module):
    """A linear network; the networks below add a habit of the field."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class EmaInADict(Base):
    """A moving average of the weights, used in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.shadow = {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def after_step(self) -> None:
        for name, p in self.net.named_parameters():
            self.shadow[name] = 0.9 * self.shadow[name] + 0.1 * p.detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if self.training else F.linear(x, self.shadow["weight"], self.shadow["bias"])


class HiddenTeacher(Base):
    """A teacher in a list, so that it is no submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [copy.deepcopy(self.net).requires_grad_(False)]

    def after_step(self) -> None:
        for slow, fast in zip(self.hidden[0].parameters(), self.net.parameters(), strict=True):
            slow.data.lerp_(fast.data, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.hidden[0](x)


class StepsInAfterStep(Base):
    steps = 0

    def after_step(self) -> None:
        self.steps += 1


class Momentum(Base):
    """An optimizer of the module's own, whose momentum no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.target = nn.Linear(16, 3).requires_grad_(False)
        self.optimizer = torch.optim.SGD(self.target.parameters(), lr=0.1, momentum=0.9)

    def after_step(self) -> None:
        for slow, fast in zip(self.target.parameters(), self.net.parameters(), strict=True):
            slow.grad = slow.detach() - fast.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Unfreezing(Base):
    def __init__(self) -> None:
        super().__init__()
        self.net.bias.requires_grad_(False)

    def after_step(self) -> None:
        self.net.bias.requires_grad_(True)


class Memory:
    def __init__(self) -> None:
        self.passes = 0


class CountsInAnObject(Base):
    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()

    def forward(self, x: Tensor) -> Tensor:
        self.memory.passes += self.training
        return self.net(x) * (2.0 if self.memory.passes > 1000 else 1.0)


class CountsInAnArray(Base):
    def __init__(self) -> None:
        super().__init__()
        self.usage = np.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        self.usage += self.training
        return self.net(x) * (2.0 if self.usage[0] > 1000 else 1.0)


class Alternating(Base):
    """Every other pass would do something else, later."""

    odd = False

    def forward(self, x: Tensor) -> Tensor:
        self.odd = not self.odd
        return self.net(x)


class OwnGenerator(Base):
    """A layer that is skipped rarely, so that two passes hardly differ."""

    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * (0.5 if self.training and self.random.random() < 0.01 else 1.0)


class CountsInEvaluation(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.net(x) / (1 + self.passes)


class SeenSequences(Base):
    """Counts its own part of the batch, in a listed state."""

    seen = 0

    def get_extra_state(self) -> int:
        return self.seen

    def set_extra_state(self, state: int) -> None:
        self.seen = state

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x) * self.training
        return self.net(x)


class IntegerKeys(Base):
    """JSON makes texts of these keys."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {0: 0, 1: 0}

    def get_extra_state(self) -> dict[int, int]:
        return self.counts

    def set_extra_state(self, state: dict[int, int]) -> None:
        self.counts = state

    def after_step(self) -> None:
        self.counts[1] += 1


class LateParameter(Base):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "scale"):
            self.scale = nn.Parameter(torch.ones(3))
        return self.net(x) * self.scale


class LateBuffer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.ones(3)
        return self.net(x) * self.mask


class UnseededTable(Base):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.from_numpy(np.random.default_rng().normal(size=3)).float()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.table


class NormBySome(nn.Module):
    """Batch statistics in as many layers as the data decides on: ranks would wait for each other."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)
        self.layers = nn.ModuleList(nn.BatchNorm1d(16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[: 1 + int(x.sum() * 100) % 4]:
            x = layer(x)
        return self.head(x)


class Logging(Base):
    """Values for a log, which a pass computes from its batch, in numbers, objects and hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.count, self.log = 0.0, 0, Memory()
        self.net.register_forward_hook(lambda module, inputs, output: setattr(self, "seen", output.detach()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        self.last, self.count, self.log.passes = y.mean().item(), int((y > 0).sum()), len(x)
        return y


class CachedTables(Base):
    """A table made in the first pass, one kept without memory of its own, and a state by reference."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", None, persistent=False)
        self.register_buffer("ones", torch.ones(1).expand(3))
        self.stats = {"passes": 0}

    def get_extra_state(self) -> dict[str, int]:
        return self.stats

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.stats = state

    def forward(self, x: Tensor) -> Tensor:
        self.stats["passes"] += self.training
        if self.mask is None:
            self.register_buffer("mask", torch.ones(3), persistent=False)
        return self.net(x) * self.mask * self.ones / (1 + self.stats["passes"])


class NamedBatch(Base):
    """Its argument is called batch, and is a tensor."""

    def forward(self, batch: Tensor) -> Tensor:
        return self.net(batch)


class Squeezing(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze()


class Config(PlainConfig):
    data_kind: ClassVar[DataKind] = "images"
    arch: Literal["habit"] = "habit"
    network: ClassVar[Any] = Base

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (4, 4, 1)

    def build(self, vocab_size: int) -> nn.Module:
        module: nn.Module = self.network()
        return module

    def inputs(self, batch: Batch) -> Tensor:
        return pixels(batch).flatten(1)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(output, batch["labels"], reduction="none")


def of(network: type[nn.Module]) -> Config:
    class Around(Config):
        pass

    Around.network = network
    return Around()


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (EmaInADict, r"after_step\(\) changes 'shadow', which is not saved"),
        (HiddenTeacher, r"after_step\(\) changes 'hidden', which is not saved"),
        (StepsInAfterStep, r"after_step\(\) changes 'steps', which is not saved"),
        (Momentum, r"after_step\(\) changes 'optimizer', which is not saved"),
        (Unfreezing, r"after_step\(\) changes requires_grad of 'net.bias'"),
        (CountsInAnObject, "changes 'memory', which is not saved"),
        (CountsInAnArray, "changes 'usage', which is not saved"),
        (Alternating, "changes 'odd', which is not saved"),
        (OwnGenerator, "changes 'random', which is not saved"),
        (CountsInEvaluation, "In evaluation, forward.* changes the buffer 'passes'"),
        (SeenSequences, r"changes get_extra_state\(\) of 'SeenSequences' from its own part of the batch"),
        (IntegerKeys, "JSON cannot represent"),
        (LateParameter, "creates the parameter 'scale'"),
        (LateBuffer, "creates the buffer 'mask'"),
        (UnseededTable, "the attribute 'table' different values"),
        (NormBySome, "runs depends on the data"),
    ],
)
def test_state_that_would_be_lost_or_differ_is_refused_by_name(network: type[nn.Module], words: str) -> None:
    with pytest.raises(UserError, match=words):
        of(network).check(3)


@pytest.mark.parametrize("network", [Base, Logging, CachedTables, NamedBatch])
def test_what_a_resume_does_not_lose_is_accepted(network: type[nn.Module]) -> None:
    of(network).check(3)


def test_a_network_that_fails_on_one_sequence_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "bigtrain"):
        of(Squeezing).check(3)
    assert "fails on a batch of one sequence" in caplog.text


class TwoHeads(nn.Module):
    """As nanoGPT returns it: logits and the mean loss, in which targets of -1 do not count."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocabulary, 8), nn.Linear(8, vocabulary)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.head(self.embedding(idx))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class Text(PlainConfig):
    arch: Literal["two-heads"] = "two-heads"
    loss_is: ClassVar[Any] = "mean"
    ignored_target: ClassVar[int] = -1

    def build(self, vocab_size: int) -> nn.Module:
        return TwoHeads(vocab_size)

    def inputs(self, batch: Batch) -> Any:
        return batch["tokens"], batch["targets"]


def test_a_loss_in_a_tuple_is_found() -> None:
    Text(context=6).check(5)


def test_a_target_that_the_loss_does_not_know_is_refused_with_the_key() -> None:
    class Wrong(Text):
        ignored_target: ClassVar[int] = -100

    with pytest.raises(UserError, match="-100") as caught:
        Wrong(context=6).check(5)
    assert "ignored_target" in str(caught.value)
