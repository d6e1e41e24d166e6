"""Networks as their authors write them, whose weights or gradients code reaches by other ways than modules."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ClippedRNN(nn.Module):
    """Gradients of hidden states are clipped on their way back (Graves 2013), and those of a layer by its hook."""

    def __init__(self, rows: int, classes: int) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(rows, 8), nn.Linear(8, classes)
        self.out.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0].clamp(-0.02, 0.02),))

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), 8)
        for row in x[:, 0].unbind(1):
            hidden = self.cell(row, hidden)
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: gradient.clamp(-0.005, 0.005))
        return self.out(hidden)


class Functional(nn.Module):
    """Weights that a tuple, a partial and an optimizer hold; a target that this optimizer moves after the step."""

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, size) / math.sqrt(size)), nn.Parameter(torch.zeros(8))
        self.layers = ((self.weight, self.bias),)
        self.last, self.target = nn.Linear(8, classes), nn.Linear(8, classes).requires_grad_(False)
        self.again = partial(F.linear, weight=self.weight)
        self.pairs = list(zip(self.target.parameters(), self.last.parameters(), strict=True))
        self.optimizer = torch.optim.SGD([slow for slow, _ in self.pairs], lr=0.1)

    def after_step(self) -> None:
        for slow, fast in self.pairs:
            slow.grad = slow.detach() - fast.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forward(self, x: Tensor) -> Tensor:
        hidden = x
        for weight, bias in self.layers:
            hidden = torch.tanh(F.linear(hidden, weight, bias))
        return self.last(hidden + self.again(x)) + self.target(hidden)


class SyncNorm(nn.Module):
    """Converted to SyncBatchNorm, as for DistributedDataParallel."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        body = nn.Sequential(nn.Conv2d(1, 4, 3, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.SyncBatchNorm.convert_sync_batchnorm(body)
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Equilibrium(nn.Module):
    """A fixed point found without a graph; a hook solves for the gradient (Bai et al. 2019)."""

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.into, self.inner, self.out = nn.Linear(size, 8), nn.Linear(8, 8), nn.Linear(8, classes)
        self.inner.weight.data.mul_(0.3)

    @staticmethod
    def solve(step: Any, z: Tensor) -> Tensor:
        for _ in range(60):
            following = step(z)
            if (following - z).norm().item() <= 1e-6 * following.norm().item():
                return following
            z = following
        return z

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)

        def step(z: Tensor) -> Tensor:
            return torch.tanh(self.inner(z) + x)

        with torch.no_grad():
            z = self.solve(step, torch.zeros_like(x))
        z = step(z)
        if self.training:
            start = z.detach().requires_grad_()
            again = step(start)

            def backward(gradient: Tensor) -> Tensor:
                return self.solve(
                    lambda y: torch.autograd.grad(again, start, y, retain_graph=True)[0] + gradient, gradient
                )

            z.register_hook(backward)
        return self.out(z)


class _Reversed(torch.autograd.Function):
    """A reversible block, whose activations its backward pass computes from its results (Gomez et al. 2017)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, f: nn.Module, g: nn.Module) -> tuple[Tensor, Tensor]:
        ctx.f, ctx.g = f, g
        with torch.no_grad():
            a = a + f(b)
            b = b + g(a)
        ctx.save_for_backward(a, b)
        return a, b

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        a, b = ctx.saved_tensors
        with torch.enable_grad():
            a = a.detach().requires_grad_()
            made = ctx.g(a)
            made.backward(gradients[1])
            b = (b - made).detach().requires_grad_()
            of_a = gradients[0] + a.grad
            ctx.f(b).backward(of_a)
        return of_a, gradients[1] + b.grad, None, None


class RevNet(nn.Module):
    """Reversible blocks, each of two entries of lists."""

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(size, 8), nn.Linear(8, classes)
        self.fs = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.gs = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.into(x).chunk(2, 1)
        for f, g in zip(self.fs, self.gs, strict=True):
            a, b = _Reversed.apply(a, b, f, g)
        return self.head(torch.cat([a, b], 1))


class Transcriber(nn.Module):
    """Log-probabilities with time first, for the CTC loss (Graves et al. 2006)."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(features, 6, bidirectional=True, batch_first=True), nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0]).log_softmax(-1).transpose(0, 1)


class RandomFeatures(nn.Module):
    """Random features that no state dict contains (Rahimi and Recht 2007), and an expanded buffer that one does."""

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.directions = torch.randn(size, 16) / math.sqrt(size)
        self.register_buffer("phase", torch.rand(1).expand(16))
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cos(x @ self.directions + self.phase))
