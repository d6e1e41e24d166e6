"""The layouts of a run, each written plainly with torch's own APIs: what bigtrain's are held against.

It shares no code with bigtrain. One small Llama with a head of its own; fully_shard by hand; parallelize_module with
torch's tensor-parallel styles; torch.distributed.pipelining; all-to-all around attention. A step gives what a trainer
needs of it, loss and gradient norm over all ranks, and clips. What can be had for less is written so: norms' weights
under sequence parallelism are plain tensors, whose gradients are summed in one collective instead of one each, and the
loss over a shared vocabulary is by hand with two (torch's loss_parallel has three).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """Of a Llama."""

    vocab: int
    layers: int
    width: int
    heads: int
    hidden: int


class Attention(nn.Module):
    """Causal attention with rotary positions; x (B, C, W)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_width = shape.width // shape.heads
        self.q, self.k, self.v, self.o = (nn.Linear(shape.width, shape.width, bias=False) for _ in range(4))
        self.cp: dist.ProcessGroup | None = None

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_width)) for f in (self.q, self.k, self.v))
        q, k = rotated(q, *rotary), rotated(k, *rotary)
        if self.cp is not None:
            q, k, v = heads_for_sequence(torch.stack((q, k, v)), self.cp)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        y = y.transpose(1, 2)
        if self.cp is not None:
            y = sequence_for_heads(y, self.cp)
        return self.o(y.flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(shape.width, shape.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = (nn.RMSNorm(shape.width, eps=EPS) for _ in range(2))
        self.attention, self.mlp = Attention(shape), MLP(shape)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.norm_1(x), rotary=rotary)
        return x + self.mlp(self.norm_2(x))


class Llama(nn.Module):
    """Tokens (B, C), or the residual stream of the stage before, to logits, or to that of the next stage."""

    def __init__(self, shape: Shape, blocks: range, positions: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.width) if blocks.start == 0 else None
        self.layers = nn.ModuleDict({str(block): Block(shape) for block in blocks})
        last = blocks.stop == shape.layers
        self.norm = nn.RMSNorm(shape.width, eps=EPS) if last else None
        self.head = nn.Linear(shape.width, shape.vocab, bias=False) if last else None
        half = shape.width // shape.heads // 2
        angles = positions[:, None, None] / 10000.0 ** (torch.arange(half) / half)
        self.rotary = angles.cos(), angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embedding is None else self.embedding(x)
        for layer in self.layers.values():
            x = layer(x, self.rotary)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) of x (B, C, H, D)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def heads_for_sequence(qkv: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """A slice of the sequence with all heads (3, B, c, H, D) to the whole with some: three of (B, C, h, D)."""
    ranks = group.size()
    sent = qkv.unflatten(3, (ranks, -1)).movedim(3, 0).contiguous()
    got = all_to_all_single_autograd(sent, None, None, group).view(sent.shape)
    return got.movedim(0, 2).flatten(2, 3).unbind()


def sequence_for_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The way back: (B, C, h, D) to (B, c, H, D)."""
    sent = x.unflatten(1, (group.size(), -1)).movedim(1, 0).contiguous()
    got = all_to_all_single_autograd(sent, None, None, group).view(sent.shape)
    return got.movedim(0, 2).flatten(2, 3)


class Sum(torch.autograd.Function):
    """A sum over ranks that all of them use alike: its gradient is each one's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def loss_over_parts(logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of cross-entropies from this rank's columns of the logits (Shoeybi et al. 2019, section 3)."""
    highest = logits.detach().amax(-1)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    logits = logits - highest[..., None]
    own = targets - group.rank() * logits.shape[-1]
    here = (own >= 0) & (own < logits.shape[-1])
    picked = logits.gather(-1, own.masked_fill(~here, 0)[..., None])[..., 0] * here
    total, picked = Sum.apply(torch.stack((logits.exp().sum(-1), picked)), group)
    return (total.log() - picked).sum()


def whole_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of cross-entropies."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")


def split_matrices(model: Llama, tp: DeviceMesh) -> None:
    """Tensor and sequence parallelism by torch's own styles; the norms work on slices of the sequence as they are."""
    block = {
        "attention": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        **{f"attention.{name}": ColwiseParallel() for name in "qkv"},
        "attention.o": RowwiseParallel(output_layouts=Shard(1)),
        "mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "mlp.gate": ColwiseParallel(),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
    }
    for layer in model.layers.values():
        parallelize_module(layer, tp, block)
    ends = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "head": ColwiseParallel(input_layouts=Shard(1)),
    }
    parallelize_module(model, tp, ends)


def shard(model: Llama, mesh: DeviceMesh, keep: bool = False) -> None:
    """fully_shard by hand: the last block is kept, since the backward pass begins with it.

    Args:
        keep: All is kept until the backward pass has ended: a pipeline's stages would gather for each micro-batch.
    """
    layers = list(model.layers.values())
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=not keep and layer is not layers[-1])
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes, outermost first."""

    pp: int = 1
    replicas: int = 1
    shards: int = 1
    cp: int = 1
    tp: int = 1


class Run:
    """A model at a layout with its optimizer; a step takes this rank's sequences whole."""

    def __init__(
        self, shape: Shape, layout: Layout, weights: Mapping[str, Tensor], context: int, passes: int, **adam: Any
    ) -> None:
        """Args:
        weights: Of the full (unsharded) model, by this class's names.
        passes: Micro-batches of a pipeline's step.
        """
        self.layout, self.context = layout, context
        sizes = layout.pp, layout.replicas, layout.shards, layout.cp, layout.tp
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("pp", "replicas", "shards", "cp", "tp"))
        self.mesh = mesh
        count = context // layout.cp
        self.mine = slice(mesh["cp"].get_local_rank() * count, (mesh["cp"].get_local_rank() + 1) * count)
        share = shape.layers // layout.pp
        stage = mesh["pp"].get_local_rank()
        blocks = range(stage * share, (stage + 1) * share)
        self.model = Llama(shape, blocks, torch.arange(context)[self.mine])
        self.model.load_state_dict({name: weights[name] for name in self.model.state_dict()})
        if layout.tp > 1:
            split_matrices(self.model, mesh["tp"])
        if layout.cp > 1:
            for module in self.model.modules():
                if isinstance(module, Attention):
                    module.cp = mesh["cp"].get_group()
        if layout.replicas * layout.shards * layout.cp > 1:
            over = mesh["shards"]
            if layout.cp > 1:
                over = mesh["shards", "cp"]._flatten()
            shard(self.model, mesh["replicas", "shards"] if layout.replicas > 1 else over, keep=layout.pp > 1)
        self.parameters = list(self.model.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters if p.ndim > 1]},
            {"params": [p for p in self.parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, fused=True, **adam)
        self.schedule = self._schedule(shape, stage, passes) if layout.pp > 1 else None

    def step(self, tokens: Tensor, targets: Tensor, clip: float) -> tuple[float, float]:
        """One optimizer step; the mean loss and the gradient's norm over all ranks."""
        self.optimizer.zero_grad()
        loss = self._backward(tokens[:, self.mine], targets[:, self.mine])
        for parameter in self.parameters:
            # torch gives the embedding's gradient whole on each rank.
            if isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor):
                parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
        gradients = self._gradients(self.parameters)
        if self.layout.tp > 1:
            sum_in_one(self._gradients(p for p in self.parameters if p.ndim == 1), self.mesh["tp"].get_group())
        square = sum((g.double().norm() ** 2 for g in self._counted()), torch.zeros((), dtype=torch.float64))
        counts = self.mesh["tp"].get_local_rank() == 0 and self.mesh["pp"].get_local_rank() == self.layout.pp - 1
        tokens_here = targets[:, self.mine].numel()
        mine = [loss.double(), torch.tensor(float(tokens_here)).double()] if counts else [torch.zeros(()).double()] * 2
        # Loss, tokens, square norm, whether a rank must stop, and whether it records something new: one message.
        numbers = torch.stack([*mine, square, *torch.zeros(2).double()])
        dist.all_reduce(numbers)
        total, count, square, *_ = numbers.unbind()
        norm = square.sqrt() / count
        torch._foreach_mul_(gradients, ((clip / norm).clamp(max=1.0) / count).float())
        self.optimizer.step()
        return float(total / count), float(norm)

    def _backward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        if self.schedule is not None:
            losses: list[Tensor] = []
            first, last = self.mesh["pp"].get_local_rank() == 0, self.model.head is not None
            self.schedule.step(*([tokens] if first else []), target=targets if last else None, losses=losses,
                               return_outputs=False)  # fmt: skip
            return torch.stack(losses).sum().detach() if losses else torch.zeros(())
        logits = self.model(tokens)
        tp = self.mesh["tp"].get_group()
        loss = loss_over_parts(logits, targets, tp) if self.layout.tp > 1 else whole_loss(logits, targets)
        loss.backward()
        return loss.detach()

    def _schedule(self, shape: Shape, stage: int, passes: int) -> Schedule1F1B:
        place = PipelineStage(self.model, stage, self.layout.pp, torch.device("cpu"), group=self.mesh["pp"].get_group())
        return Schedule1F1B(place, passes, loss_fn=whole_loss, scale_grads=False)

    def _gradients(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        return [local(p.grad) for p in parameters if p.grad is not None]

    def _counted(self) -> list[Tensor]:
        """Gradients without the copies of another rank: of replicas, and of norms over tp."""
        if self.mesh["replicas"].get_local_rank():
            return []
        first = self.mesh["tp"].get_local_rank() == 0
        return self._gradients(p for p in self.parameters if p.ndim > 1 or first)


def local(x: Tensor) -> Tensor:
    """What of a tensor lies on this rank."""
    return x.to_local() if isinstance(x, DTensor) else x


def sum_in_one(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sum small tensors over ranks, in place."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))
