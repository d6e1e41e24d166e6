"""The held-out loss, and bits per byte for text."""

from __future__ import annotations

import math
from typing import Literal

from bigtrain.training.config import EVALUATORS, EvaluatorConfig, HeldOut, Result


@EVALUATORS.register
class LossConfig(EvaluatorConfig):
    """The held-out loss; for text also in bits per byte, which is comparable between tokenizers."""

    name: Literal["loss"] = "loss"

    def results(self, held_out: HeldOut) -> dict[str, Result]:
        """`loss` in the model's unit, and `bits_per_byte` for text."""
        totals = held_out.totals
        found = {"loss": Result(totals.mean_loss, held_out.loss_unit)}
        if held_out.text_bytes > 0:
            # The sum of losses in nats, divided by the bytes of the text and converted to bits.
            found["bits_per_byte"] = Result(totals.loss / held_out.text_bytes / math.log(2), "bits per byte")
        return found
