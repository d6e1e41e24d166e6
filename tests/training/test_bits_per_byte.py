"""Bits per byte of a held-out loss."""

from __future__ import annotations

import math

import pytest

from bigtrain.engines.contract import Totals
from bigtrain.training.config import HeldOut
from bigtrain.training.evaluators.loss import LossConfig


def test_bits_per_byte_are_nats_over_bytes_of_text() -> None:
    """300 tokens of 2.5 bytes each, 1.5 bits a byte in all: whatever the tokens are."""
    nats = 1.5 * 750 * math.log(2)
    found = LossConfig().results(HeldOut(Totals(nats, 300.0), 750.0))
    assert found["bits_per_byte"].value == pytest.approx(1.5)
    assert found["loss"].value == pytest.approx(nats / 300)
    assert "bits_per_byte" not in LossConfig().results(HeldOut(Totals(nats, 300.0), 0.0))
