"""A small vision transformer (Dosovitskiy et al. 2021) that classifies images.

It also serves as an example for new families. A family is one file, selected by its name (`model.arch: vit`), with:
1. `Config`: the keys under `model` in the YAML, the module that they build, and exact counts of parameters and FLOPs;
2. the module: `forward(batch)` returns the sums of losses and weights, without scaling the loss; `blocks()` lists the
   modules that are sharded and recomputed separately; `initialisers()` returns a rule for every parameter; and the
   engine sets `compute_dtype`.

Shapes: B images, T patches of an image, W width.
"""

from __future__ import annotations

from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.models.config import FAMILIES, DataKind, Flops
from bigtrain.models.contract import Batch, Init, LossSum
from bigtrain.models.init import usual_rules
from bigtrain.models.layers import MLP, Attention, Embedding, LayerNorm, Linear
from bigtrain.models.loss import chunked_cross_entropy, class_losses
from bigtrain.models.patches import ImageConfig, cut
from bigtrain.models.pictures import Picture, Shown, attention_of, beside_attention
from bigtrain.models.sums import by_sequence


@FAMILIES.register
class Config(ImageConfig):
    """A pre-norm ViT without a class token: the head reads the mean over patches."""

    data_kind: ClassVar[DataKind] = "images"
    loss_unit: ClassVar[str] = "nats per image"

    arch: Literal["vit"] = "vit"

    def build(self, vocab_size: int) -> VisionTransformer:
        """The classifier for `vocab_size` classes; its parameters are not yet initialized."""
        return VisionTransformer(self, vocab_size)

    def parameter_count(self, vocab_size: int) -> int:
        """Exact number of parameters."""
        return self.patches * self.width + self.parameter_count_without_embeddings(vocab_size)

    def parameter_count_without_embeddings(self, vocab_size: int) -> int:
        """Number of parameters without the position table."""
        block = 12 * self.width**2 + 13 * self.width
        return (self.patch_values + 1) * self.width + self.layers * block + (2 + vocab_size) * self.width

    def flops_per_token(self, vocab_size: int) -> Flops:
        """Matmul FLOPs per image, forward and backward: 6 per parameter and patch, plus 12 * layers * W * T^2."""
        dense = 6 * self.patches * (self.patch_values * self.width + self.layers * 12 * self.width**2)
        total = dense + 12 * self.layers * self.width * self.patches**2 + 6 * self.width * vocab_size
        return Flops(total, total)

    def attention_pictures(self, network: nn.Module, shown: Shown) -> dict[str, Picture]:
        """Images, beside each the last layer's attention to its patches, averaged over heads and query patches."""
        model, images = cast(VisionTransformer, network), shown.batch["images"]
        found = attention_of(cast(Block, model.layers[-1]).attention, lambda: model.hidden(images))
        return {"attention": beside_attention(images, found.mean(1))}


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), for x (B, T, W); every patch sees every other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(width)
        self.attention = Attention(width, heads, bias=True, causal=False)
        self.mlp_norm = LayerNorm(width)
        self.mlp = MLP(width, 4 * width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        branch: Tensor = self.mlp(self.mlp_norm(x))
        return x + branch


class VisionTransformer(nn.Module):
    """Patch and position embeddings, transformer blocks, mean over patches, and a head (`contract.Model`)."""

    def __init__(self, config: Config, classes: int) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, torch.float32
        self.embedding = Linear(config.patch_values, config.width)
        self.position_embedding = Embedding(config.patches, config.width)
        self.layers = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = LayerNorm(config.width)
        self.head = Linear(config.width, classes, bias=False)

    def forward(self, batch: Batch) -> LossSum:
        """Sums of losses and weights for images (B, H, W, channels), labels (B,) or (B, classes), and weights (B,)."""
        labels, weights = batch["labels"], batch["weights"]
        if labels.ndim == 2:
            losses = class_losses(self.logits(batch), batch) * weights
            return LossSum(losses.sum(), weights.sum(), by_sequence(losses, weights))
        loss, losses = chunked_cross_entropy(self.hidden(batch["images"]), self.head.weight, labels, weights)
        return LossSum(loss, weights.sum(), by_sequence(losses, weights))

    def logits(self, batch: Batch) -> Tensor:
        """FP32 logits (B, classes); of the batch, only `images` is needed."""
        hidden = self.hidden(batch["images"])
        return F.linear(hidden, self.head.weight.to(hidden.dtype)).float()

    def hidden(self, images: Tensor) -> Tensor:
        """The features (B, W) that the head reads, for images (B, height, width, channels)."""
        patches = self.embedding(cut(images, self.config.patch, self.compute_dtype))
        x = patches + self.position_embedding.weight.to(self.compute_dtype)
        for layer in self.layers:
            x = layer(x)
        hidden: Tensor = self.norm(x.mean(dim=1))
        return hidden

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """The transformer blocks, in order."""
        return [(f"layers.{index}", layer) for index, layer in enumerate(self.layers)]

    def initialisers(self) -> dict[str, Init]:
        """Matrices are normal with variance 1 / inputs, positions normal with std 0.02; norms are 1, biases 0."""
        return usual_rules(self, ["position_embedding.weight"])
