"""Random bits of a forward pass that do not depend on the layout: hashes of coordinates, without a generator's state.

A bit is a function of (key of the sequence, number of the draw in the model, position, channel). The key is a function
of (seed, step, index in the global batch). So a recomputed, split or sliced activation has the same bits as the full
one. The bits are also equal on every device: the hash is integer arithmetic modulo 2^32 and 2^64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def dropout(
    x: Tensor,
    p: float,
    keys: Tensor | None,
    layer: int,
    training: bool,
    *,
    positions: Tensor | None = None,
) -> Tensor:
    """Zero each value with probability p and scale the others by 1 / (1 - p).

    Args:
        x: (B, C, W), the full activation or a slice: the tokens at `positions`.
        p: Probability, from 0 to 1.
        keys: int64 (B,), one per sequence; may be None if no value is dropped.
        layer: Number of this dropout in the model; dropouts with other numbers are independent.
        training: Whether values are dropped; if False, x is returned unchanged.
        positions: int64 (C,), positions of the tokens in their sequences; None: 0 to C - 1.

    Raises:
        ValueError: `keys` is None, but values must be dropped.
    """
    if p == 0.0 or not training:
        return x
    if keys is None:
        raise ValueError("dropout needs the batch's keys")
    keep = keep_mask(x.shape, p, keys, layer, positions)
    return torch.where(keep, x * (1.0 / (1.0 - p)), 0.0)


def keep_mask(shape: torch.Size, p: float, keys: Tensor, layer: int, positions: Tensor | None = None) -> Tensor:
    """Boolean (B, C, W), true with probability 1 - p (exact to 2^-32); the arguments are those of `dropout`."""
    return random_bits(shape, keys, layer, positions) >= round(p * 2**32) - 2**31


def random_bits(shape: torch.Size, keys: Tensor, layer: int, positions: Tensor | None = None) -> Tensor:
    """Int32 (B, C, W), each of the 2^32 values with equal probability; the arguments are those of `dropout`."""
    _, tokens, channels = shape
    device = keys.device
    if positions is None:
        positions = torch.arange(tokens, device=device)
    # The product is computed on a tensor, where it wraps around. If a compiler treats `layer` as a symbol, a product of
    # Python integers would not.
    rows = _splitmix64(keys + torch.full_like(keys, layer) * _wrap64(0xD1342543DE82EF95))[:, None]
    rows = _splitmix64(rows + positions)
    # A row has a 64-bit hash. Its two halves enter the 32-bit hash of each channel at different rounds.
    low, high = rows.to(torch.int32)[..., None], (rows >> 32).to(torch.int32)[..., None]
    columns = torch.arange(channels, device=device, dtype=torch.int32)
    bits = low + columns * _wrap32(0x9E3779B9)
    bits = _round32(bits, 16, 0x21F0AAAD).add_(high)
    bits = _round32(bits, 15, 0xD35A2D97)
    bits ^= (bits >> 15).bitwise_and_((1 << 17) - 1)
    return bits


def uniform(shape: Sequence[int], keys: Tensor, layer: int) -> Tensor:
    """Float64 tensor of `shape`, uniform in (0, 1), with 32 random bits per value.

    Args:
        shape: (B * G, ...): G consecutive rows for each of the B sequences.
        keys: int64 (B,), one per sequence.
        layer: Number of this draw in the model; draws with other numbers are independent.

    Raises:
        ValueError: The first dimension is not a multiple of B.
    """
    return _bits_of(shape, keys, layer).double().add_(2.0**31 + 0.5).mul_(2.0**-32)


def normal(shape: Sequence[int], keys: Tensor, layer: int) -> Tensor:
    """FP32 tensor of `shape` from the standard normal distribution; the arguments are those of `uniform`."""
    return torch.special.ndtri(uniform(shape, keys, layer)).float()


def integers(low: int, high: int, shape: Sequence[int], keys: Tensor, layer: int) -> Tensor:
    """Int64 tensor of `shape`, low <= value < high. It is uniform up to (high - low) / 2^32; other arguments are those
    of `uniform`."""
    return uniform(shape, keys, layer).mul_(high - low).floor_().to(torch.int64).clamp_(max=high - low - 1).add_(low)


def _bits_of(shape: Sequence[int], keys: Tensor, layer: int) -> Tensor:
    count = len(keys)
    if not shape or shape[0] % count:
        raise ValueError(f"a draw of shape {tuple(shape)} does not match a batch of {count}")
    row = math.prod(shape) // count
    return random_bits(torch.Size((count, 1, row)), keys, layer).view(tuple(shape))


def _wrap32(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def _wrap64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def _round32(bits: Tensor, shift: int, factor: int) -> Tensor:
    """One round of xor-shift and multiplication, in place; the constants are those of lowbias32 (Wellons 2018)."""
    bits ^= (bits >> shift).bitwise_and_((1 << (32 - shift)) - 1)
    return bits.mul_(_wrap32(factor))


def _splitmix64(x: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele et al. 2014) on int64, modulo 2^64."""
    x = x + _wrap64(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _wrap64(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _wrap64(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))
