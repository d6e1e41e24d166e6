"""Replaces the random draws of a module's forward pass, so that they do not depend on the layout.

`Draws` intercepts every operator of a pass. It distinguishes three kinds of draws by their shape:

- The first dimension is the batch, or B * G with the G rows of a sequence next to each other, as for attention heads.
  Such a draw is made from the keys of the batch, as in `models.random`: a sequence gets the same values in any
  micro-batch on any rank. The same holds if the second dimension is the batch and time is the first. This is known for
  torch's recurrent layers, and is detected by passes with two batch sizes.
- The shape does not depend on the batch, such as noise on a weight, or one value for all sequences. Such a draw comes
  from torch's generator, which is in the same state on all ranks at the start of every pass of a step.
- Any other draw comes from torch's generator too. It is reproducible in one layout, but differs between layouts;
  `varying` lists these draws.

The number that identifies a draw within the pass is itself drawn from torch's CPU generator. When torch restores that
generator to recompute activations, the recomputation therefore gets the same draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bigtrain.models.plain.modes import StaysOn
from bigtrain.models.random import uniform

Shape = tuple[int, ...]
Drawn = tuple[str, Shape]
"""The operator of a draw, and the shape of the drawn values."""

_RECURRENT = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))


class Draws(TorchDispatchMode):
    """Makes the random draws of one pass; see the module's docstring."""

    def __init__(
        self, keys: Tensor | None, fixed: frozenset[Drawn] = frozenset(), second: frozenset[Drawn] = frozenset()
    ) -> None:
        """Args:
        keys: int64 (B,), keys of the sequences; None: every draw comes from torch's generator.
        fixed: Draws whose shape does not depend on the batch.
        second: Draws whose second dimension is the batch, in the form of `without_second`.
        """
        super().__init__()
        self._keys = keys
        self._fixed = fixed
        self._second = second
        self._batch_dim = 0
        self.is_recurrent = False
        self.seen: list[Drawn] = []
        self.varying: list[Drawn] = []
        """Draws that were not made from keys and are not in `fixed`."""
        self.own_generator: str | None = None
        """Name of an operator that the module called with its own generator, if any."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in function.tags or _drops_nothing(function, args, kwargs):
            return function(*args, **kwargs)
        if kwargs.get("generator") is not None:
            self.own_generator = self.own_generator or str(function)
            return function(*args, **kwargs)
        name = function._schema.name.removeprefix("aten::")
        shape = _shape(args)
        drawn = (name, shape)
        self.seen.append(drawn)
        if self._keys is not None and drawn not in self._fixed and name in _MAKERS and self._fits(drawn):
            return _MAKERS[name](self._uniform, function, list(args), kwargs)
        if drawn not in self._fixed:
            self.varying.append(drawn)
        return function(*args, **kwargs)

    def _fits(self, drawn: Drawn) -> bool:
        """Whether a dimension of a draw is the batch; sets `_batch_dim` to that dimension."""
        assert self._keys is not None
        count, shape = len(self._keys), drawn[1]
        is_second = without_second(drawn, count) in self._second
        self._batch_dim = int(self.is_recurrent or is_second)
        if self.is_recurrent:
            return len(shape) == 3 and shape[1] == count
        return is_second or (bool(shape) and shape[0] > 0 and shape[0] % count == 0)

    def _uniform(self, shape: Sequence[int], device: Any = None) -> Tensor:
        """Float64 tensor of `shape`, uniform in (0, 1), made from the keys."""
        assert self._keys is not None
        number = int(torch.randint(1 << 62, ()))
        if self._batch_dim:
            shape = (shape[1], shape[0], *shape[2:])
        values = uniform(shape, self._keys, number)
        values = values.transpose(0, 1) if self._batch_dim else values
        return values if device is None else values.to(device)


class _Recurrent(StaysOn):
    """Informs `Draws` while a recurrent layer of torch runs; inside it, time is the first dimension."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self._draws = draws

    def call(self, function: Any, args: Any, kwargs: Any) -> Any:
        """See `StaysOn.call`."""
        if getattr(function, "__name__", "") not in _RECURRENT:
            return function(*args, **kwargs)
        self._draws.is_recurrent = True
        try:
            return function(*args, **kwargs)
        finally:
            self._draws.is_recurrent = False


@contextmanager
def drawing(draws: Draws) -> Iterator[Draws]:
    """A context in which `draws` makes every random draw; it must include the forward and the backward pass."""
    with _Recurrent(draws), draws:
        yield draws


def without_second(drawn: Drawn, count: int) -> Drawn | None:
    """A draw with its second dimension removed, if that dimension has size `count`; else None."""
    name, shape = drawn
    return (name, (shape[0], *shape[2:])) if len(shape) > 1 and shape[1] == count else None


def _drops_nothing(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator that may draw does not, such as an attention or recurrent kernel with dropout 0."""
    for position, argument in enumerate(function._schema.arguments):
        if argument.name in ("dropout_p", "dropout"):
            given = args[position] if position < len(args) else kwargs.get(argument.name, argument.default_value)
            return not given
    return False


def _shape(args: Any) -> Shape:
    """The shape of the drawn values: that of the operator's first tensor, or the list of sizes in its arguments."""
    for argument in args:
        if isinstance(argument, Tensor) and argument.ndim:
            return tuple(argument.shape)
        if isinstance(argument, (list, tuple, torch.Size)) and all(isinstance(size, int) for size in argument):
            return tuple(argument)
    # randperm gets the length of the permutation.
    return args[:1] if args and isinstance(args[0], int) else ()


_Uniform = Callable[..., Tensor]


def _normal(uniform: Tensor) -> Tensor:
    return torch.special.ndtri(uniform)


def _in_place(values: Callable[[Tensor, list[Any], dict[str, Any]], Tensor]) -> Callable[..., Tensor]:
    """Wrap a function of uniform values for an operator that fills its first argument in place."""

    def make(draw: _Uniform, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
        target: Tensor = args[0]
        return target.copy_(values(draw(target.shape, target.device), args[1:], _named(function, args, kwargs)))

    return make


def _new(values: Callable[[Tensor, list[Any], dict[str, Any]], Tensor]) -> Callable[..., Tensor]:
    """Wrap a function of uniform values for an operator that returns a new tensor of the requested dtype and device."""

    def make(draw: _Uniform, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
        like = next((argument for argument in args if isinstance(argument, Tensor)), None)
        device = kwargs.get("device") or (like.device if like is not None else torch.get_default_device())
        found = values(draw(_shape(args), device), args, _named(function, args, kwargs))
        integral = function._schema.name.startswith("aten::randint")
        default = torch.int64 if integral else torch.get_default_dtype()
        dtype = kwargs.get("dtype") or (like.dtype if like is not None else default)
        return found.to(dtype)

    return make


def _named(function: Any, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, including the defaults of the operator's schema."""
    found = {}
    for position, argument in enumerate(function._schema.arguments):
        given = args[position] if position < len(args) else kwargs.get(argument.name, argument.default_value)
        found[argument.name] = given
    return found


def _whole_numbers(u: Tensor, args: list[Any], named: dict[str, Any]) -> Tensor:
    low = named.get("low", named.get("from")) or 0
    high = named.get("high", named.get("to"))
    if high is None:
        high = 1 << 24
    return low + (u * (high - low)).floor().clamp(max=high - low - 1)


def _bernoulli(u: Tensor, args: list[Any], named: dict[str, Any]) -> Tensor:
    probability = named.get("p")
    return (u < (named["self"] if probability is None else probability)).double()


def _affine_normal(u: Tensor, args: list[Any], named: dict[str, Any]) -> Tensor:
    return _normal(u) * named.get("std", 1.0) + named.get("mean", 0.0)


def _dropout(draw: _Uniform, function: Any, args: list[Any], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    x, p = args[0], args[1]
    keep = draw(x.shape, x.device) >= p
    return torch.where(keep, x * (1.0 / (1.0 - p) if p < 1 else 0.0), 0.0), keep


def _multinomial(draw: _Uniform, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
    """Sample categories: with replacement by the inverse cumulative distribution, without by an exponential race."""
    named = _named(function, args, kwargs)
    weights, count = named["self"].double(), named["num_samples"]
    if named["replacement"] or count == 1:
        levels = draw((*weights.shape[:-1], count), weights.device)
        cumulative = weights.cumsum(-1)
        return torch.searchsorted(cumulative, levels * cumulative[..., -1:], right=True).clamp(
            max=weights.shape[-1] - 1
        )
    return (weights / -draw(weights.shape, weights.device).log()).topk(count, dim=-1).indices


_MAKERS: dict[str, Callable[..., Any]] = {
    "bernoulli_": _in_place(_bernoulli),
    "bernoulli": _new(_bernoulli),
    "uniform_": _in_place(lambda u, _, n: n["from"] + u * (n["to"] - n["from"])),
    "normal_": _in_place(_affine_normal),
    "exponential_": _in_place(lambda u, _, n: -u.log() / n["lambd"]),
    "geometric_": _in_place(lambda u, _, n: (u.log() / math.log1p(-n["p"])).ceil().clamp(min=1)),
    "cauchy_": _in_place(lambda u, _, n: n["median"] + n["sigma"] * (math.pi * (u - 0.5)).tan()),
    "log_normal_": _in_place(lambda u, _, n: (_normal(u) * n["std"] + n["mean"]).exp()),
    "random_": _in_place(_whole_numbers),
    "rand": _new(lambda u, _, n: u),
    "rand_like": _new(lambda u, _, n: u),
    "randn": _new(lambda u, _, n: _normal(u)),
    "randn_like": _new(lambda u, _, n: _normal(u)),
    "randint": _new(_whole_numbers),
    "randint_like": _new(_whole_numbers),
    "normal": _new(_affine_normal),
    "native_dropout": _dropout,
    "multinomial": _multinomial,
}
"""By operator name, the function that computes the operator's random values from uniform values."""
