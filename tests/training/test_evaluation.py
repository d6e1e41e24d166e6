"""Several held-out sets: what the means and the bits per byte are taken over."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from bigtrain.data.loader import StepBatch
from bigtrain.engines.contract import Measuring, Totals
from bigtrain.models.config import FAMILIES
from bigtrain.training.evaluation import Evaluation, HeldOutSet
from bigtrain.training.evaluators.loss import LossConfig

NATS = {"short": (6.0, 3.0), "long": (90.0, 30.0)}
"""Sum of losses and number of tokens of each set: the means are 2 and 3."""
BYTES_PER_TOKEN = {"short": 4.0, "long": 2.0}


@dataclass
class Engine:
    """Gives the sums that a batch names."""

    def evaluate(self, batches: Iterator[list[dict[str, Any]]], measuring: Measuring) -> Totals:
        ((name,),) = [[batch["set"] for batch in micro_batches] for micro_batches in batches]
        return Totals(*NATS[name])


def held_out(name: str, bytes_per_token: float | None) -> HeldOutSet:
    @contextmanager
    def opened() -> Iterator[list[StepBatch]]:
        yield [StepBatch(0, [{"set": name}])]  # type: ignore[dict-item]

    return HeldOutSet(opened, bytes_per_token)


def evaluated(**bytes_per_token: float | None) -> dict[str, float | None]:
    sets = {name: held_out(name, known) for name, known in bytes_per_token.items()}
    return Evaluation(Engine(), [LossConfig()], sets, print).run().values  # type: ignore[arg-type]


def test_the_loss_of_all_sets_is_a_mean_over_their_tokens() -> None:
    values = evaluated(**BYTES_PER_TOKEN)
    assert (values["val_loss/short"], values["val_loss/long"]) == (2.0, 3.0)
    assert values["val_loss"] == pytest.approx(96 / 33)


def test_bits_per_byte_are_over_the_bytes_of_what_was_evaluated() -> None:
    values = evaluated(**BYTES_PER_TOKEN)
    assert values["val_bits_per_byte/short"] == pytest.approx(6 / 12 / math.log(2))
    assert values["val_bits_per_byte"] == pytest.approx(96 / (12 + 60) / math.log(2))


def test_a_set_without_known_bytes_leaves_no_bits_per_byte_of_all() -> None:
    values = evaluated(short=4.0, long=None)
    assert "val_bits_per_byte/short" in values
    assert not {"val_bits_per_byte", "val_bits_per_byte/long"} & values.keys()


def test_only_a_model_that_predicts_text_has_bits_per_byte() -> None:
    index: Any = SimpleNamespace(bytes_per_token=4.0)
    found = [
        HeldOutSet.of(lambda _: None, index, FAMILIES[arch](context=8)).bytes_per_token for arch in ("rnn", "bert")
    ]
    assert found == [4.0, None]
