"""The wrapper in which engines run a plain module: parameters keep their names, and forward returns sums of losses."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from bigtrain.config import UserError
from bigtrain.models.contract import Batch, Init, LossSum
from bigtrain.models.plain.across import AllRanks, OneProcess, across
from bigtrain.models.plain.draws import Draws, drawing
from bigtrain.models.plain.facts import Facts, attributes
from bigtrain.models.plain.module import PlainModel, as_sums, autocast, look_up_in

if TYPE_CHECKING:
    from bigtrain.models.plain.family import PlainConfig

IGNORED = -100
"""Value of a target that does not count, as in torch's own losses."""
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
        self._kept = _parameters_in_lists(network)
        self.is_shared = False
        """Whether several ranks take part in a step; the engine sets it."""
        self._empty = False
        self._before: dict[str, Tensor] = {}
        self._after: dict[str, Tensor] = {}
        self._extra_before: dict[str, Any] = {}
        self.gradient_hooks = _taken_hooks(network)
        """Gradient hooks, by parameter name; each gets and returns the gradient of the global batch's mean loss."""
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
        kept = {parameter for _, _, parameter in self._kept}
        return [
            (name, modules[name])
            for name in (self.facts.blocks if listed is None else listed)
            if name in self.facts.blocks and not kept.intersection(modules[name].parameters())
        ]

    def initialisers(self) -> dict[str, Init]:
        """The module's own initialisation rules; empty if it has none (see `has_rules`)."""
        return cast(Any, self.network).initialisers() if has_rules(self.network) else {}

    def forward(self, batch: Batch) -> LossSum:
        """The sums of losses and weights of one micro-batch."""
        self._relink()
        if self.part is not None:
            batch = {**batch, "part": cast(Any, self.part)}
        if self._takes_batch:
            with autocast(self.network, self._compute_dtype):
                result: Any = self.network(batch)
        else:
            batch = _with_ignored_targets(batch) if self._config.loss_is == "mean" else batch
            arguments = self._config.inputs(batch)
            with autocast(self.network, self._compute_dtype):
                result = _call(self.network, arguments, batch, self.where)
        sums = self._sums(result, batch)
        if self._empty:
            # This rank has only a filler. It must not count, even if the loss ignores weights.
            sums = LossSum(sums.loss * 0, sums.weight * 0)
        if self.training and self.facts.moving:
            named = dict(self.named_buffers())
            self._after = {name: named[name].clone() for name in self.facts.moving}
        if self.facts.by_data and self.is_shared and torch.is_grad_enabled():
            sums = LossSum(self._with_all_parameters(sums.loss), *sums[1:])
        return sums

    @property
    def _takes_batch(self) -> bool:
        names = list(inspect.signature(self.network.forward).parameters)
        return names == ["batch"]

    def _sums(self, result: Any, batch: Batch) -> LossSum:
        if _are_sums(result):
            return as_sums(result, self.where)
        if isinstance(self.network, PlainModel):
            return as_sums(result, self.where)
        return self._config.as_loss_sum(result, batch, self.where)

    def _relink(self) -> None:
        """Replace parameters in the module's lists and dicts by those that FSDP has gathered."""
        for (container, key), (module, name), _ in self._kept:
            container[key] = getattr(module, name)

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
        # A block that is recomputed in the backward pass has changed its buffers a second time.
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
            self._extra_before = {name: module.get_extra_state() for name, module in self._with_extra_state()}
            return
        self._put_back(self._before)
        for name, module in self._with_extra_state():
            module.set_extra_state(self._extra_before[name])

    @torch.no_grad()
    def take_back_where(self, bad: Tensor) -> None:
        """Restore the buffers to their values before the step, if its loss or gradient was not finite.

        Args:
            bad: Boolean scalar on the device, true if the step must be undone.
        """
        named = dict(self.named_buffers())
        for name, value in self._before.items():
            named[name].copy_(torch.where(bad, value, named[name]))
        self._before = {}

    def _with_all_parameters(self, loss: Tensor) -> Tensor:
        """The loss, with zero gradients for parameters that this pass has not used, so that all ranks reduce the same
        ones."""
        leaves = _reached(loss)
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        self.reached.update(name for name, parameter in trained.items() if parameter in leaves)
        missing = [parameter for parameter in trained.values() if parameter not in leaves]
        return cast(Tensor, _Touch.apply(loss, *missing)) if missing else loss

    # State beside parameters and buffers.

    def _with_extra_state(self) -> list[tuple[str, nn.Module]]:
        own = nn.Module.get_extra_state
        return [(name, part) for name, part in self.network.named_modules() if type(part).get_extra_state is not own]

    def extra_state(self) -> dict[str, Tensor]:
        """The `get_extra_state` of each module, as uint8 tensors of equal size, to be saved or loaded in place.

        Raises:
            UserError: An extra state is not JSON-serialisable, or longer than `EXTRA_BYTES`.
        """
        self._extra = {}
        for name, module in self._with_extra_state():
            try:
                data = json.dumps(_plain(module.get_extra_state())).encode()
            except TypeError as error:
                raise UserError(
                    f"get_extra_state() of '{name or type(module).__name__}' returns a value that JSON cannot "
                    f"represent: {error}",
                    self.where,
                    "Return numbers, texts, lists and dicts of them; keep tensors in buffers.",
                ) from None
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
        for name, module in self._with_extra_state():
            if name in self._extra:
                module.set_extra_state(json.loads(self._extra[name].numpy().tobytes().decode()))


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


def _parameters_in_lists(network: nn.Module) -> list[tuple[tuple[Any, Any], tuple[nn.Module, str], nn.Parameter]]:
    """Registered parameters that modules also keep in lists or dicts.

    Each entry is (container, key), (owning module, parameter name), parameter.
    """
    owners = {
        parameter: (module, name)
        for module in network.modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    found = []
    for module in network.modules():
        for value in attributes(module).values():
            pairs: Collection[tuple[Any, Any]] = ()
            if isinstance(value, list):
                pairs = list(enumerate(value))
            elif isinstance(value, dict):
                pairs = list(value.items())
            found += [
                ((value, key), owners[held], held)
                for key, held in pairs
                if isinstance(held, nn.Parameter) and held in owners
            ]
    return found


def _with_ignored_targets(batch: Batch) -> Batch:
    """Replace targets of weight zero by -100, which torch's losses exclude from a mean.

    If all weights are zero, targets stay unchanged, because the mean would be NaN.
    """
    if "targets" not in batch:
        return batch
    counts = batch["weights"] > 0
    counts = counts | ~counts.any()
    return {**batch, "targets": torch.where(counts, batch["targets"], IGNORED)}


def _are_sums(result: Any) -> bool:
    return isinstance(result, LossSum)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    return value


_SAMPLES = ("x", "input", "inputs")
_ANSWERS = ("y", "target", "targets", "label", "labels")


def _call(network: nn.Module, arguments: Any, batch: Batch, where: str) -> Any:
    """Call a module with the result of `Config.inputs`; if that is None, with arguments from the batch by name."""
    if isinstance(arguments, Mapping):
        return network(**arguments)
    if isinstance(arguments, tuple):
        return network(*arguments)
    if arguments is not None:
        return network(arguments)
    return network(**by_name(network, batch, where))


def by_name(network: nn.Module, batch: Batch, where: str) -> dict[str, Tensor]:
    """The arguments of a module's forward, taken from the batch by name; x means the sample, y its target.

    Raises:
        UserError: The batch has no array for a required argument.
    """
    beside = ("weights", "keys", "step", "part", "sources", "labels", "targets")
    sample = next(name for name in ("tokens", "images", *batch) if name in batch and name not in beside)
    answer = next((name for name in ("targets", "labels") if name in batch), None)
    found: dict[str, Tensor] = {}
    for name, parameter in inspect.signature(network.forward).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            continue
        if name in batch:
            found[name] = batch[name]
        elif parameter.default is parameter.empty and name in _SAMPLES:
            found[name] = batch[sample]
        elif parameter.default is parameter.empty and name in _ANSWERS and answer is not None:
            found[name] = batch[answer]
        elif parameter.default is parameter.empty:
            raise UserError(
                f"forward() takes an argument '{name}', but the batch has {', '.join(batch)}",
                where,
                "Define inputs(self, batch) in Config, which returns the arguments of forward().",
            )
    return found
