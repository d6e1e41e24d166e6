"""The wrapper in which engines run a plain module: parameters keep their names, and forward returns sums of losses."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigtrain.config import UserError
from bigtrain.models.contract import Batch, Init, LossSum
from bigtrain.models.plain.across import AllRanks, OneProcess, across
from bigtrain.models.plain.calling import call, knowing_target, with_ignored_targets
from bigtrain.models.plain.draws import Draws, drawing
from bigtrain.models.plain.facts import Facts, attributes
from bigtrain.models.plain.module import PlainModel, as_sums, autocast, look_up_in

if TYPE_CHECKING:
    from bigtrain.models.plain.family import PlainConfig

EXTRA_BYTES = 16384
"""Maximum size of the `get_extra_state` of one module, as JSON, in bytes."""


class Network(nn.Module):
    """Wraps the user's module without changing its qualified names."""

    def __init__(self, network: nn.Module, config: PlainConfig, where: str) -> None:
        super().__init__()
        self.network = network
        self.facts = Facts()
        self.where = where
        self._config = config
        self.part: str | None = next(iter(config.parts), None)
        """The part whose loss a pass computes, given to the model as `batch["part"]`; None if it has no parts."""
        self._compute_dtype = torch.float32
        self.is_shared = False
        """Whether several ranks take part in a step; the engine sets it."""
        self._empty = False
        self._before: dict[str, Tensor] = {}
        self._after: dict[str, Tensor] = {}
        self._extra_before: dict[str, Any] = {}
        self.weight: Tensor | None = None
        """If `facts.scale_matters`, the sum of weights over the ranks by which the last pass divided its gradients."""
        self.gradient_hooks = _taken_hooks(network)
        """Gradient hooks, by parameter name; each gets and returns the gradient of the global batch's mean loss."""
        self.own_buffers = tuple(name for name, _ in network.named_buffers())
        """Names of the buffers that `__init__` registered; forward may add tables that it caches."""
        self.reached: set[str] = set()
        """Names of the parameters used in a pass since the last step; only recorded if `facts.by_data`."""

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The names of the user's module: the wrapper adds no prefix."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        memo.add(self)
        yield prefix, self
        yield from self.network.named_modules(memo, prefix, remove_duplicate)

    def has_no_values(self) -> bool:
        """Whether the module is on the meta device."""
        return any(parameter.is_meta for parameter in self.parameters())

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of matmuls and of the output of embeddings."""
        return self._compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype) -> None:
        self._compute_dtype = dtype
        if isinstance(self.network, PlainModel):
            self.network.compute_dtype = dtype
        look_up_in(self.network, dtype)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """The modules that are sharded and recomputed separately: those that the facts allow.

        A `PlainModel` that lists its blocks restricts them further.
        """
        modules = dict(self.network.named_modules())
        own = getattr(self.network, "blocks", None)
        listed = [name for name, _ in own()] if isinstance(self.network, PlainModel) and callable(own) else None
        names = self.facts.blocks if listed is None else listed
        return [(name, modules[name]) for name in names if name in self.facts.blocks]

    @property
    def held(self) -> frozenset[str]:
        """Names of parameters that are not sharded, because other objects than modules hold them."""
        return self.facts.held

    def initialisers(self) -> dict[str, Init]:
        """The module's own initialisation rules; empty if it has none (see `has_rules`)."""
        return cast(Any, self.network).initialisers() if has_rules(self.network) else {}

    def forward(self, batch: Batch) -> LossSum:
        """The sums of losses and weights of one micro-batch."""
        if self.part is not None:
            batch = {**batch, "part": cast(Any, self.part)}
        ignored = self._config.ignored_target
        if self._config.loss_is == "mean":
            batch = with_ignored_targets(batch, ignored)
        arguments = self._config.inputs(batch)
        with autocast(self.network, self._compute_dtype), knowing_target(ignored, self.where):
            result = call(self.network, arguments, batch, self.where)
        sums = self._sums(result, batch)
        if self._empty:
            # This rank has only a filler. It must not count, even if the loss ignores weights.
            sums = LossSum(sums.loss * 0, sums.weight * 0)
        if self.training and self.facts.moving:
            named = dict(self.named_buffers())
            self._after = {name: named[name].clone() for name in self.facts.moving}
        if self.facts.by_data and self.is_shared and torch.is_grad_enabled():
            sums = LossSum(self._with_all_parameters(sums.loss), *sums[1:])
        if self.facts.scale_matters and self.training and torch.is_grad_enabled():
            sums = LossSum(self._as_mean_in_backward(sums), *sums[1:])
        return sums

    def _as_mean_in_backward(self, sums: LossSum) -> Tensor:
        """The sum of losses, whose backward pass is that of the mean over all ranks, as in plain torch. Collective."""
        self.weight = sums.weight.detach().float().clone()
        if self.is_shared:
            dist.all_reduce(self.weight)
        self.weight = torch.where(self.weight == 0, 1.0, self.weight)
        return cast(Tensor, _Divided.apply(sums.loss, self.weight))

    def _sums(self, result: Any, batch: Batch) -> LossSum:
        if _are_sums(result):
            return as_sums(result, self.where)
        if isinstance(self.network, PlainModel):
            return as_sums(result, self.where)
        return self._config.as_loss_sum(result, batch, self.where)

    # Calls of the engine during a step.

    @contextmanager
    def passing(self, batch: Batch, rows: int, number: int = 0, passes: int = 1) -> Iterator[None]:
        """A context for forward and backward of one micro-batch: keyed draws, sums over ranks, consistent buffers.

        A buffer that passes change is updated only once per step: each pass starts from its value at the start of the
        step.

        Args:
            rows: Number of sequences of the batch, without fillers.
            number: Index of this micro-batch in its step, from 0.
            passes: Number of micro-batches of the step.
        """
        facts = self.facts
        if facts.scale_matters and passes > 1:
            raise UserError(
                "A hook that changes gradients by their size needs each rank's part of a batch in one pass, but a step "
                f"has {passes} passes",
                "layout.micro_size",
                f"Set layout.micro_size to {passes * len(batch['keys'])} or more, or remove it; or use more ranks.",
            )
        self._keep_state(number)
        self._empty = rows == 0
        with ExitStack() as stack:
            if facts.couples:
                count = len(batch["keys"])
                ranks = AllRanks(rows, batch["keys"].device) if self.is_shared else OneProcess(rows)
                stack.enter_context(across(ranks, count, passes))
            if facts.draws:
                stack.enter_context(drawing(Draws(batch["keys"], facts.fixed, facts.second)))
            yield
        self.undo_recomputation()

    def undo_recomputation(self) -> None:
        """Restore buffers that a block recomputed in the backward pass has changed a second time."""
        self._put_back(self._after)
        self._after = {}

    @torch.no_grad()
    def _put_back(self, buffers: Mapping[str, Tensor]) -> None:
        named = dict(self.named_buffers()) if buffers else {}
        for name, value in buffers.items():
            named[name].copy_(value)

    def _keep_state(self, number: int) -> None:
        if not self.training:
            return
        if number == 0:
            named = dict(self.named_buffers())
            self._before = {name: named[name].clone() for name in self.facts.moving if name in named}
            self._extra_before = self.copied_extra_state()
            return
        self._put_back(self._before)
        self.set_extra_state_of_modules(self._extra_before)

    @torch.no_grad()
    def take_back_where(self, bad: Tensor) -> None:
        """Restore buffers and extra states to those before the step, if its loss or gradient was not finite.

        Args:
            bad: Boolean scalar on the device, true if the step must be undone.
        """
        named = dict(self.named_buffers())
        for name, value in self._before.items():
            named[name].copy_(torch.where(bad, value, named[name]))
        self._before = {}
        if self._extra_before and bool(bad):
            self.set_extra_state_of_modules(self._extra_before)
        self._extra_before = {}

    def _with_all_parameters(self, loss: Tensor) -> Tensor:
        """The loss, with zero gradients for parameters that this pass has not used, so that all ranks reduce the same
        ones."""
        leaves = _reached(loss)
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        self.reached.update(name for name, parameter in trained.items() if parameter in leaves)
        missing = [parameter for parameter in trained.values() if parameter not in leaves]
        return cast(Tensor, _Touch.apply(loss, *missing)) if missing else loss

    def with_after_step(self) -> Iterator[Any]:
        """The modules that define `after_step`."""
        return (module for module in self.network.modules() if callable(getattr(module, "after_step", None)))

    def after_step(self) -> None:
        """Call `after_step` of each module that defines it, in the order of `named_modules()`.

        Raises:
            UserError: It changes whether a parameter is trained.
        """
        trained = {name: parameter.requires_grad for name, parameter in self.named_parameters()}
        for module in self.with_after_step():
            module.after_step()
        for name, parameter in self.named_parameters():
            if parameter.requires_grad != trained.get(name):
                raise UserError(
                    f"after_step() changes requires_grad of '{name}', but the optimizer is made before the first step",
                    self.where,
                    "Let it require a gradient from the start, and until then call detach() on what forward() computes "
                    'with it, by batch["step"]: a parameter without a gradient is not updated.',
                )

    # State beside parameters and buffers.

    def _with_extra_state(self) -> list[tuple[str, nn.Module]]:
        return with_extra_state(self.network)

    def copied_extra_state(self) -> dict[str, Any]:
        """A copy of the `get_extra_state` of each module: what it returns may be the state itself."""
        return {name: copy.deepcopy(module.get_extra_state()) for name, module in self._with_extra_state()}

    def set_extra_state_of_modules(self, states: Mapping[str, Any]) -> None:
        """Set the modules' extra states to copies of these, as `copied_extra_state` returns them."""
        for name, module in self._with_extra_state():
            module.set_extra_state(copy.deepcopy(states[name]))

    def extra_state(self) -> dict[str, Tensor]:
        """The `get_extra_state` of each module, as uint8 tensors of equal size, to be saved or loaded in place.

        Raises:
            UserError: JSON cannot represent an extra state, or changes it, or it is longer than `EXTRA_BYTES`.
        """
        self._extra = {}
        for name, module in self._with_extra_state():
            value = _plain(module.get_extra_state())
            try:
                data = json.dumps(value).encode()
                why = "" if _survives(value, json.loads(data)) else f"{value!r} would be loaded as {json.loads(data)!r}"
            except TypeError as error:
                why = str(error)
            if why:
                raise UserError(
                    f"get_extra_state() of '{name or type(module).__name__}' returns a value that JSON cannot "
                    f"represent: {why[:300]}",
                    self.where,
                    "Return numbers, texts, lists, and dicts whose keys are texts; convert them in set_extra_state(). "
                    "Keep tensors in buffers.",
                )
            if len(data) > EXTRA_BYTES:
                raise UserError(
                    f"get_extra_state() of '{name}' returns {len(data)} bytes, more than {EXTRA_BYTES}",
                    self.where,
                    "Keep tensors and tables in buffers.",
                )
            self._extra[name] = torch.from_numpy(np.frombuffer(data.ljust(EXTRA_BYTES), np.uint8).copy())
        return {f"extra.{name}": tensor for name, tensor in self._extra.items()}

    def take_extra_state(self) -> None:
        """Set the modules' extra states from the tensors of the last `extra_state`, after they were loaded."""
        load_extra_state(self.network, self._extra)


def with_extra_state(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that define `get_extra_state`, with their qualified names."""
    own = nn.Module.get_extra_state
    return [(name, part) for name, part in network.named_modules() if type(part).get_extra_state is not own]


def load_extra_state(network: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Set the modules' extra states.

    Args:
        saved: By qualified name, the tensors of `Network.extra_state`, without their prefix.
    """
    for name, module in with_extra_state(network):
        if name in saved:
            value = json.loads(saved[name].numpy().tobytes().decode())
            now = module.get_extra_state()
            is_tensor = isinstance(now, Tensor)
            module.set_extra_state(torch.tensor(value, dtype=now.dtype, device=now.device) if is_tensor else value)


def has_rules(module: nn.Module) -> bool:
    """Whether a module defines `initialisers()` itself, so that it can be built without values."""
    own = getattr(type(module), "initialisers", None)
    return callable(own) and own is not PlainModel.initialisers


def without_fillers(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
    """A micro-batch without the fillers at its end, and its number of sequences without fillers.

    If there are only fillers, one is kept and the number is 0.
    """
    weights = arrays["weights"]
    counted = np.flatnonzero(weights.reshape(len(weights), -1).any(axis=1))
    rows = int(counted[-1]) + 1 if len(counted) else 0
    return {name: values[: max(rows, 1)] for name, values in arrays.items()}, rows


def moved(module: nn.Module, device: torch.device) -> None:
    """Move a module to a device, including tensors that are plain attributes."""
    module.to(device)
    if device.type == "cpu":
        return
    for part in module.modules():
        for name, value in attributes(part).items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                vars(part)[name] = value.to(device)


class _Divided(torch.autograd.Function):
    """Returns its first argument; the gradient is divided by the second."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.weight, None


class _Touch(torch.autograd.Function):
    """Returns the first argument, and gives the others gradients of zero."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def _reached(loss: Tensor) -> set[Tensor]:
    """The leaves of the autograd graph of a loss."""
    seen: set[Any] = set()
    leaves: set[Tensor] = set()
    waiting = [loss.grad_fn] if loss.grad_fn is not None else []
    while waiting:
        function = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        if hasattr(function, "variable"):
            leaves.add(function.variable)
        waiting += [following for following, _ in function.next_functions if following is not None]
    return leaves


def _taken_hooks(network: nn.Module) -> dict[str, list[Any]]:
    """Remove gradient hooks from the parameters and return them; the engine runs them on a step's full gradient."""
    found = {}
    for name, parameter in network.named_parameters():
        hooks = parameter._backward_hooks
        if hooks:
            found[name] = list(hooks.values())
            hooks.clear()
    return found


def _are_sums(result: Any) -> bool:
    return isinstance(result, LossSum)


def _survives(value: Any, loaded: Any) -> bool:
    """Whether JSON has returned a value unchanged: tuples, keys that are no texts and counters are not."""
    if isinstance(value, (int, float)):
        return bool(value == loaded) or (value != value and loaded != loaded)
    if type(value) is dict and type(loaded) is dict:
        return value.keys() == loaded.keys() and all(_survives(one, loaded[key]) for key, one in value.items())
    if type(value) is list and type(loaded) is list:
        return len(value) == len(loaded) and all(map(_survives, value, loaded))
    return type(value) is type(loaded) and bool(value == loaded)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    return value
