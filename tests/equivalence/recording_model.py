"""A user's model family that records metrics of its own: Llama with named values of each reduction."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from bigtrain.metrics import record_metric
from bigtrain.models.contract import Batch, LossSum
from bigtrain.models.decoder import Block, DecoderModel
from bigtrain.models.families.llama import Config as Llama


class Config(Llama):
    """Llama's keys."""

    arch: Literal["recording-llama"] = "recording-llama"  # type: ignore[assignment]

    def build(self, vocab_size: int) -> nn.Module:
        return RecordingModel(self, vocab_size)


class RecordingBlock(Block):
    """Records in each block, of every stage, also where it is computed again in the backward pass."""

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        x = super().forward(x, *rest)
        record_metric("stream_max", x.float(), "max", tp="stream")
        record_metric("stream_min", x.float(), "min", tp="stream")
        return x


class RecordingModel(DecoderModel):
    """Records at the first stage and at the last."""

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        for layer in self.layers.values():
            layer.__class__ = RecordingBlock

    def _embedded(self, tokens: Tensor, positions: Tensor) -> Tensor:
        record_metric("even_tokens", (tokens % 2 == 0).float(), weight=self._batch["weights"], unit="share")
        return super()._embedded(tokens, positions)

    def _blocks(self, x: Tensor | None, batch: Batch) -> Tensor:
        self.__dict__["_batch"] = batch
        return super()._blocks(x, batch)

    def _sums(self, hidden: Tensor, batch: Batch) -> LossSum:
        weights = batch["weights"]
        if self.tensor is not None:
            weights = weights[:, self.tensor.positions(weights.shape[1])]
        squares = hidden.float().square().mean(dim=-1)
        record_metric("hidden_square", squares, weight=weights, tp="stream")
        record_metric("hidden_norm", hidden.float() * weights[..., None], "norm", tp="stream")
        record_metric("counted_tokens", 1.0, "sum", weight=batch["weights"].sum(), unit="tokens")
        return super()._sums(hidden, batch)
