"""The module of direct preference optimisation; its loss is explained in families/dpo.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.metrics import not_recorded, record_metric
from bigtrain.models.config import TensorRole
from bigtrain.models.contract import Batch, LossSum
from bigtrain.models.decoder import DecoderModel
from bigtrain.models.decoder_config import DecoderConfig
from bigtrain.models.lora import LoRALinear


class PreferenceModel(DecoderModel):
    """A decoder, the policy, with a frozen copy of itself as the reference.

    Args:
        config: Config of the policy. If it has an adapter, there is no copy: the reference is the policy without the
            adapter.
        beta: Factor of the log-likelihood ratios.
    """

    def __init__(self, config: DecoderConfig, vocab_size: int, beta: float) -> None:
        super().__init__(config, vocab_size)
        self.beta = beta
        self.reference: DecoderModel | None = None
        if config.adapter is None:
            self.reference = DecoderModel(config, vocab_size).requires_grad_(False)

    def forward(self, batch: Batch) -> LossSum:
        """Sum of the losses over pairs, in nats, and the number of pairs.

        Args:
            batch: tokens and targets, int64 (B, 2, C); weights, FP32 (B, 2, C), positive where the target belongs to an
                answer; keys (B,). A pair whose weights are all zero does not count.
        """
        # In FP16 the weights include the loss scale. It must scale the losses of pairs, not the log-likelihoods.
        counts = batch["weights"].amax(dim=(1, 2))
        sides: Batch = {name: batch[name].flatten(0, 1) for name in ("tokens", "targets")}
        sides["weights"] = (batch["weights"].flatten(0, 1) > 0).float()
        hidden = self.hidden(sides)
        with torch.no_grad():
            policy = _losses(self._sums(hidden.detach(), sides))
            with not_recorded():
                reference = self._of_reference(sides)
            margins = self.beta * ((reference - policy) @ policy.new_tensor([1.0, -1.0]))
            losses = -F.logsigmoid(margins) * counts
        record_metric("reward_margin", margins, weight=counts, unit="nats")
        record_metric("reward_accuracy", (margins > 0).float(), weight=counts)
        total = losses.sum()
        if torch.is_grad_enabled():
            # d loss / d (negative log-likelihood) is +-beta sigmoid(-margin). A cross-entropy weighted by these factors
            # has the gradient of the loss, but another value.
            slopes = self.beta * torch.sigmoid(-margins) * counts
            factors = torch.stack((slopes, -slopes), dim=1).flatten()[:, None]
            with not_recorded():
                carrier = self._sums(hidden, {**sides, "weights": sides["weights"] * factors}).loss
            total = carrier + (total - carrier).detach()
        return LossSum(total, counts.sum(), torch.stack((losses, counts), dim=1))

    def _of_reference(self, sides: Batch) -> Tensor:
        if self.reference is None:
            with _without_adapters(self):
                return _losses(self._sums(self.hidden(sides), sides))
        self.reference.tensor, self.reference.compute_dtype = self.tensor, self.compute_dtype
        return _losses(self.reference._sums(self.reference.hidden(sides), sides))

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """The blocks of the reference, then the blocks of the policy, where the backward pass begins."""
        reference = [] if self.reference is None else self.reference.blocks()
        return [(f"reference.{name}", block) for name, block in reference] + super().blocks()

    def tensor_plan(self) -> dict[str, TensorRole]:
        """The tensor plan of the policy, which also applies to the reference."""
        plan = super().tensor_plan()
        return {f"reference.{pattern}": role for pattern, role in plan.items() if pattern != "*"} | plan


def _losses(sums: LossSum) -> Tensor:
    """Negative log-likelihoods (B, 2) of the chosen and the rejected answer of each pair."""
    return cast(Tensor, sums.by_sequence)[:, 0].view(-1, 2)


@contextlib.contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for layer in layers:
        layer.is_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_on = True
