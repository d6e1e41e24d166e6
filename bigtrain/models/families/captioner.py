"""A small transformer that generates captions of images.

One stack of pre-norm blocks reads the patches of an image, followed by the tokens of the caption. Patches see all
patches; tokens see all patches and the earlier tokens. This is the prefix language model of SimVLM (Wang et al. 2022),
but one linear layer embeds the patches. The loss is a sum over the tokens of captions, so it is exact in every layout.
A contrastive loss is not, because it compares the samples of a micro-batch with each other.

Shapes: B images, P patches of an image, T tokens of a caption, W width.
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
from bigtrain.models.loss import chunked_cross_entropy
from bigtrain.models.patches import ImageConfig, cut
from bigtrain.models.pictures import Picture, Shown, attention_of, beside_attention
from bigtrain.models.sampling import Choice, generate
from bigtrain.models.sums import by_sequence


@FAMILIES.register
class Config(ImageConfig):
    """One stack of blocks over patches and caption; `context` is the number of tokens of a caption."""

    data_kind: ClassVar[DataKind] = "captions"
    loss_unit: ClassVar[str] = "nats per token"

    arch: Literal["captioner"] = "captioner"

    @property
    def positions(self) -> int:
        """Number of positions of the stack: all patches, and all tokens except the last, which is only a target."""
        return self.patches + self.context - 1

    def build(self, vocab_size: int) -> Captioner:
        """The module; its parameters are not yet initialized."""
        return Captioner(self, vocab_size)

    def parameter_count(self, vocab_size: int) -> int:
        """Exact number of parameters."""
        embeddings = (self.positions + vocab_size) * self.width
        return embeddings + self.parameter_count_without_embeddings(vocab_size)

    def parameter_count_without_embeddings(self, vocab_size: int) -> int:
        """Number of parameters without the tables of tokens and positions."""
        block = 12 * self.width**2 + 13 * self.width
        return (self.patch_values + 1) * self.width + self.layers * block + (2 + vocab_size) * self.width

    def flops_per_token(self, vocab_size: int) -> Flops:
        """Matmul FLOPs of an image and its caption, forward and backward, divided by the caption's `context` tokens.

        They are 6 per parameter and position, and 12 * layers * W for attention per pair of positions; `causal` counts
        only pairs in which one sees the other. Padding is computed too, so MFU counts it.
        """
        patches, places = self.patches, self.positions
        dense = 6 * (patches * self.patch_values * self.width + places * self.layers * 12 * self.width**2)
        dense += 6 * self.context * self.width * vocab_size
        pairs, seen = places**2, patches * places + (places - patches) * (places - patches + 1) // 2
        full, causal = (dense + 12 * self.layers * self.width * count for count in (pairs, seen))
        return Flops(full // self.context, causal // self.context)

    def pictures(self, network: nn.Module, shown: Shown) -> dict[str, Picture]:
        """Images, with captions by greedy decoding below them."""
        images = shown.batch["images"]
        nothing = torch.zeros((shown.count, 0), dtype=torch.int64, device=images.device)
        written = generate(network, nothing, self.context, Choice(0), given={"images": images})
        captions = tuple(shown.text(row) for row in written.tolist())
        note = "Held-out images, with the captions that the model writes."
        return {"captions": Picture(images.permute(0, 3, 1, 2) / 255, 4, captions, note)}

    def attention_pictures(self, network: nn.Module, shown: Shown) -> dict[str, Picture]:
        """Images, beside each the last layer's attention to its patches, averaged over heads and predicted tokens."""
        model, batch = cast(Captioner, network), shown.batch
        images, weights = batch["images"], batch["weights"]
        layer = cast(Block, model.layers[-1]).attention
        found = attention_of(layer, lambda: model.hidden(images, batch["tokens"][:, :-1]))
        writing = found[:, self.patches - 1 :, : self.patches] * weights[..., None]
        return {"attention": beside_attention(images, writing.sum(1) / weights.sum(1, keepdim=True).clamp(min=1))}


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), for x (B, P + T, W)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(width)
        self.attention = Attention(width, heads, bias=True)
        self.mlp_norm = LayerNorm(width)
        self.mlp = MLP(width, 4 * width, bias=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask=mask)
        branch: Tensor = self.mlp(self.mlp_norm(x))
        return x + branch


class Captioner(nn.Module):
    """Embeddings of patches, tokens and positions, transformer blocks, and a head (`contract.Model`)."""

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__()
        self.config, self.context, self.compute_dtype = config, config.context, torch.float32
        self.patch_embedding = Linear(config.patch_values, config.width)
        self.embedding = Embedding(vocab_size, config.width)
        self.position_embedding = Embedding(config.positions, config.width)
        self.layers = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = LayerNorm(config.width)
        self.head = Linear(config.width, vocab_size, bias=False)

    def forward(self, batch: Batch) -> LossSum:
        """Sums of losses and weights for images uint8 (B, H, W, channels), tokens (B, T) and weights (B, T)."""
        tokens, weights = batch["tokens"], batch["weights"]
        hidden = self.hidden(batch["images"], tokens[:, :-1])
        loss, losses = chunked_cross_entropy(hidden, self.head.weight, tokens, weights)
        return LossSum(loss, weights.sum(), by_sequence(losses, weights))

    def logits(self, batch: Batch) -> Tensor:
        """FP32 logits (B, T + 1, vocabulary) that predict each of `tokens` (B, T < context) and the next token."""
        hidden = self.hidden(batch["images"], batch["tokens"])
        return F.linear(hidden, self.head.weight.to(hidden.dtype)).float()

    def hidden(self, images: Tensor, tokens: Tensor) -> Tensor:
        """The normalised residual stream (B, T + 1, W) that the head reads: at the last patch and at tokens (B, T)."""
        patches = self.patch_embedding(cut(images, self.config.patch, self.compute_dtype))
        x = torch.cat((patches, self.embedding(tokens, self.compute_dtype)), dim=1)
        places = torch.arange(x.shape[1], device=x.device)
        x = x + self.position_embedding(places, self.compute_dtype)
        mask = (places < self.config.patches) | (places[:, None] >= places)
        for layer in self.layers:
            x = layer(x, mask[None, None])
        hidden: Tensor = self.norm(x[:, self.config.patches - 1 :])
        return hidden

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """The transformer blocks, in order."""
        return [(f"layers.{index}", layer) for index, layer in enumerate(self.layers)]

    def initialisers(self) -> dict[str, Init]:
        """Tables are normal with std 0.02, matrices normal with variance 1 / inputs; norms are 1, biases 0."""
        return usual_rules(self, ["embedding.weight", "position_embedding.weight"])
