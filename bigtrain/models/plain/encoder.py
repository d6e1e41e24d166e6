"""Transformer blocks made of torch's own layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def encoder_layers(count: int, width: int, heads: int, **options: Any) -> nn.ModuleList:
    """`count` transformer blocks for x (B, T, width), with GELU and an MLP of four times the width.

    Args:
        options: Further arguments of `nn.TransformerEncoderLayer`.
    """
    block: dict[str, Any] = {"activation": "gelu", "batch_first": True, **options}
    return nn.ModuleList(nn.TransformerEncoderLayer(width, heads, 4 * width, **block) for _ in range(count))


class TwoWayBlock(nn.Module):
    """Tokens attend to each other and to the image; then the image attends to the tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.of_tokens, self.to_image, self.from_image = (
            nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(3)
        )
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))

    def forward(self, tokens: Tensor, image: Tensor, prompt: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Update tokens (B, N, W) and image patches (B, T, W).

        Args:
            prompt: The initial tokens (B, N, W), added to queries and keys of tokens in every attention.
            places: Position features (T, W), added to queries and keys of the image in every attention.
        """
        asking = tokens + prompt
        tokens = self.norms[0](tokens + self.of_tokens(asking, asking, tokens, need_weights=False)[0])
        tokens = self.norms[1](tokens + self.to_image(tokens + prompt, image + places, image, need_weights=False)[0])
        tokens = self.norms[2](tokens + self.mlp(tokens))
        seen = self.from_image(image + places, tokens + prompt, tokens, need_weights=False)[0]
        return tokens, self.norms[3](image + seen)
