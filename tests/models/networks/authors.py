"""Networks as their authors write them: plain torch, small, without imports of any framework."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    """Batch statistics and residual connections (He et al. 2016)."""

    def __init__(self, classes: int, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(2))
        self.head = nn.Linear(width, classes)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class LeNet(nn.Module):
    """Dropout of whole channels and of single values (LeCun et al. 1998; Srivastava et al. 2014)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.2), nn.Conv2d(6, 16, 5), nn.ReLU()
        )
        self.classifier = nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class UNet(nn.Module):
    """Group norm, skip connections, transposed convolutions (Ronneberger et al. 2015)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.GroupNorm(2, width), nn.SiLU())
        self.middle = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.SiLU())
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.out = nn.Conv2d(2 * width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        return self.out(torch.cat([skip, self.up(self.middle(skip))], 1))


class Diffusion(nn.Module):
    """Noise and time steps sampled in forward, tables made in __init__ (Ho et al. 2020)."""

    def __init__(self, steps: int = 50) -> None:
        super().__init__()
        self.net = UNet()
        self.time = nn.Embedding(steps, 16)
        self.project = nn.Linear(16, 1)
        self.register_buffer("signal", torch.linspace(0.999, 0.01, steps).log().cumsum(0).exp(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.randint(0, len(self.signal), (len(x),), device=x.device)
        noise = torch.randn_like(x)
        a = self.signal[t][:, None, None, None]
        noisy = a.sqrt() * x + (1 - a).sqrt() * noise + self.project(self.time(t))[:, :, None, None]
        return F.mse_loss(self.net(noisy), noise, reduction="none").mean((1, 2, 3))


class VAE(nn.Module):
    """The reparametrised draw of Kingma and Welling (2013); a scalar parameter for the decoder's scale."""

    def __init__(self, pixels: int, latent: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, 32), nn.Tanh(), nn.Linear(32, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 32), nn.Tanh(), nn.Linear(32, pixels))
        self.log_scale = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mean, log_var = self.encoder(x).chunk(2, -1)
        z = torch.distributions.Normal(mean, (0.5 * log_var).exp()).rsample()
        error = 0.5 * ((x - self.decoder(z)) ** 2 * (-2 * self.log_scale).exp()).sum(-1) + x.shape[-1] * self.log_scale
        return {"loss": (error + 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(-1)).mean()}


class CharLSTM(nn.Module):
    """torch's dropout between layers (Zaremba et al. 2014)."""

    def __init__(self, vocabulary: int, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, 2, batch_first=True, dropout=0.3)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])


class PackedGRU(nn.Module):
    """Sequences of several lengths in one batch."""

    def __init__(self, vocabulary: int, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.gru = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = 1 + (tokens % 2).sum(1).cpu()
        packed = pack_padded_sequence(self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=tokens.shape[1])
        return self.head(hidden)


class TiedGPT(nn.Module):
    """A head tied to the embedding, twice, once through a list; dropout in attention; positions from NumPy."""

    def __init__(self, vocabulary: int, context: int, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = torch.from_numpy(np.sin(np.outer(np.arange(context), np.arange(1, width + 1)) / width)).float()
        layer = {"nhead": 2, "dim_feedforward": 32, "dropout": 0.1, "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, **layer) for _ in range(2))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.tables = [self.embedding.weight]
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.05)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        for layer in self.layers:
            x = layer(x, mask, is_causal=True)
        return 0.5 * (self.head(x) + F.linear(x, self.tables[0]))


class Experts(nn.Module):
    """Experts that get no token in some batches, and a second loss kept on the module (Shazeer et al. 2017)."""

    def __init__(self, vocabulary: int, width: int = 16, experts: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, width)) for _ in range(experts)
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        scores = self.router(x).softmax(-1)
        gate, choice = scores.max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = (choice == number) & (tokens != number)
            if chosen.any():
                out[chosen] = gate[chosen][:, None] * expert(x[chosen])
        self.balance = scores.square().sum(-1)
        return self.head(x + out)


class DropPath(nn.Module):
    """Stochastic depth as timm writes it (Huang et al. 2016)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * keep / (1 - self.p)


class ConvNeXt(nn.Module):
    """Layer scale, drop path, channels-last weights (Liu et al. 2022)."""

    def __init__(self, classes: int, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 4, 4)
        self.depthwise = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(2))
        self.pointwise = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.gammas = nn.ParameterList(nn.Parameter(1e-1 * torch.ones(width)) for _ in range(2))
        self.path = DropPath(0.2)
        self.head = nn.Linear(width, classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for depthwise, pointwise, gamma in zip(self.depthwise, self.pointwise, self.gammas, strict=True):
            y = gamma * F.gelu(pointwise(depthwise(x).permute(0, 2, 3, 1)))
            x = x + self.path(y.permute(0, 3, 1, 2))
        return self.head(x.mean((2, 3)))


class BYOL(nn.Module):
    """A target that follows by a moving average (Grill et al. 2020)."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(pixels, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 8))
        self.predictor = nn.Linear(8, 8)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        predicted, wanted = self.predictor(self.online(x.roll(3, 1))), self.target(x.flip(1))
        return 2 - 2 * F.cosine_similarity(predicted, wanted)

    def after_step(self) -> None:
        for slow, fast in zip(self.target.parameters(), self.online.parameters(), strict=True):
            slow.data = slow.data * 0.9 + fast.data * 0.1


class Discriminator(nn.Module):
    """Spectral norm and weight norm, each by its parametrization (Miyato et al. 2018)."""

    def __init__(self, pixels: int, classes: int) -> None:
        super().__init__()
        self.one = spectral_norm(nn.Linear(pixels, 16))
        self.two = weight_norm(nn.Linear(16, 16))
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.leaky_relu(self.two(F.leaky_relu(self.one(x)))))


class Forces(nn.Module):
    """A gradient taken inside forward, differentiated again (Schuett et al. 2017)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(size, 16), nn.Linear(16, 16)])
        self.out = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = x
            for layer in self.layers:
                y = torch.tanh(layer(y))
            energy = self.out(y)[:, 0]
            (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return energy, -force


@dataclass
class Rated:
    """What the recommender returns."""

    score: Tensor
    penalty: Tensor


class Recommender(nn.Module):
    """Factors and a bag of words, a dataclass returned (Koren et al. 2009)."""

    def __init__(self, items: int, width: int = 8) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(16, width), nn.Embedding(items, width)
        self.words = nn.EmbeddingBag(items, width, mode="mean")
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, user: Tensor, item: Tensor) -> Rated:
        a, b = (
            self.users(user.long().clamp(0, 15)),
            self.items(item.long().clamp(0, 6)) + self.words(item.long().clamp(0, 6)[:, None]),
        )
        return Rated((a * b).sum(-1) + self.bias, 1e-2 * (a**2 + b**2).sum(-1))


class Counting(nn.Module):
    """An attribute that the author lists, and a persistent buffer that no batch changes."""

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, classes)
        self.register_buffer("temperature", torch.tensor(2.0))
        self.updates = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"updates": self.updates}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.updates = state["updates"]

    def after_step(self) -> None:
        self.updates += 1
        self.temperature.mul_(0.9)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) / (self.temperature + 0.1 * self.updates)


class Hooked(nn.Module):
    """A gradient that a hook masks, another that it clips, and a hook on a module's output."""

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(size, 16), nn.Linear(16, classes)
        mask = (torch.arange(16) % 2).float()[:, None]
        self.one.weight.register_hook(lambda gradient: gradient * mask)
        self.two.weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        self.one.register_forward_hook(lambda module, inputs, output: torch.relu(output))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


class Skipping(nn.Module):
    """A layer that Python's generator skips at random, for the whole batch (Fan et al. 2019)."""

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(3))
        self.head = nn.Linear(size, classes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and random.random() < 0.4:
                continue
            x = x + torch.tanh(layer(x))
        return self.head(x)


class NoisyNet(nn.Module):
    """Noise on weights, one draw for the batch (Fortunato et al. 2018)."""

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.empty(classes, size).uniform_(-0.1, 0.1))
        self.scale = nn.Parameter(torch.full((classes, size), 0.05))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.mean + self.scale * torch.randn_like(self.scale) if self.training else self.mean
        return F.linear(x, weight)


class Fourier(nn.Module):
    """Complex numbers in forward, an attribute with a table, a weight read outside its layer."""

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.randn(size // 2 + 1, 2) / math.sqrt(size))
        self.layers = nn.ModuleList([nn.Linear(size, size), nn.Linear(size, size)])
        self.head = nn.Linear(size, classes)
        self.window = torch.hann_window(size)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fft.irfft(torch.fft.rfft(x * self.window) * torch.view_as_complex(self.filters), n=x.shape[-1])
        x = self.layers[1](self.layers[0](x))
        return self.head(x) + 1e-3 * self.layers[0].weight.square().sum()


class Unused(nn.Module):
    """A head that this task does not use, and a frozen body."""

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(size, 16), nn.ReLU()).requires_grad_(False)
        self.head, self.other = nn.Linear(16, classes), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class CLIP(nn.Module):
    """Two towers and a learned temperature (Radford et al. 2021); the loss is the adaptor's."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(size, 8), nn.Linear(size, 8)
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.normalize(self.left(x)), F.normalize(self.right(x.flip(-1))), self.temperature.exp()
