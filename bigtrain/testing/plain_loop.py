"""A plain PyTorch training loop with its own model: the reference for bigtrain's results and speed.

It shares no code with bigtrain."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor, Tensor]  # inputs, targets and weights, each (B, C)


class Block(nn.Module):
    """A Llama block: RMSNorm, rotary attention, SwiGLU; x (B, C, W)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = (nn.RMSNorm(width, eps=1e-5) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, context, width = x.shape
        y = self.norm_1(x)
        q, k, v = (f(y).view(batch, context, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(rotated(q, cos, sin), rotated(k, cos, sin), v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(batch, context, width))
        y = self.norm_2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) of x (B, H, C, D)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Llama(nn.Module):
    """A Llama with a tied head: tokens (B, C) to logits (B, C, V)."""

    def __init__(self, vocab: int, layers: int, width: int, heads: int, hidden: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        half = width // heads // 2
        angles = torch.arange(context)[:, None] / 10000.0 ** (torch.arange(half) / half)
        for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
            self.register_buffer(name, table, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return F.linear(self.norm(x), self.embedding.weight)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, lr: float, clip: float) -> Tensor:
    """Run one step on the full batch in one pass, and return its mean loss, a scalar on the device."""
    tokens, targets, weights = batch
    losses = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="none")
    loss = (losses * weights.flatten()).sum() / weights.sum()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return loss.detach()


def named_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters of bigtrain's Llama to this model's names.

    Args:
        state: Tensors by bigtrain's qualified names.
    """
    names = {"attention_norm": "norm_1", "mlp_norm": "norm_2", "attention.query": "q", "attention.key": "k",
             "attention.value": "v", "attention.output": "o", "mlp.": ""}  # fmt: skip
    pattern = re.compile("|".join(map(re.escape, names)))
    return {pattern.sub(lambda found: names[found[0]], name): tensor for name, tensor in state.items()}
