"""Whether a plain module computes the same at every layout: tiny real batches on the CPU, before any rank starts.

A pass is compared with itself after another one (state that a checkpoint would lose), with two passes over its parts
that sum over each other as ranks do (what couples a batch), with parameters and attributes before it. A module that is
built without values (`initialisers()`) runs on the meta device, and values are not compared.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bigtrain.config import UserError
from bigtrain.models.batches import batch_kind
from bigtrain.models.check import check_embedding, check_names, users_code
from bigtrain.models.contract import Batch, LossSum
from bigtrain.models.plain.across import BatchRanks, OneProcess, across
from bigtrain.models.plain.draws import Draws, drawing
from bigtrain.models.plain.facts import Facts, attributes
from bigtrain.models.plain.network import Network
from bigtrain.models.plain.rehearsal import Rehearsed, together

if TYPE_CHECKING:
    from bigtrain.models.plain.family import PlainConfig

logger = logging.getLogger(__name__)

PARTS = (3, 2)
"""Sequences of the two parts of the compared batch."""
LOSS_BAND, GRADIENT_BAND = 1e-4, 1e-3
"""Relative, in FP32: parts are summed in another order. What couples a batch is off by far more."""
SEED = 20


def check_plain(config: PlainConfig, vocab_size: int, across_layouts: bool = False) -> Facts:
    """Refuse a module whose losses would depend on the layout, or whose state a resume would lose.

    Args:
        across_layouts: Whether draws that differ from layout to layout are refused; otherwise they are reported.

    Raises:
        UserError: The first thing that is wrong, by its qualified name, and what to do instead.
    """
    where = config.plugin.place if config.plugin is not None else type(config).__module__
    with users_code(config, where, "build()"):
        network = config.wrapped(vocab_size, SEED)
    _check_parts(network, where)
    on_meta = network.has_no_values()
    if on_meta:
        check_names(network.initialisers(), dict(network.named_parameters()), "initialisers()", "parameter", where)
    else:
        _check_repeats(network, config.wrapped(vocab_size, SEED), where)
    try:
        with users_code(config, where, "forward()"):
            facts = config._observed(vocab_size, SEED)
    except UserError as error:
        if batch_kind(config).takes_image or config.data_kind == "images":
            fix = "Say the images' size in Config: a property sample_shape that returns (height, width, channels)."
            raise UserError(error.what, error.where, error.fix if config.sample_shape else error.fix or fix) from error
        raise
    network.facts = facts
    if facts.varying and across_layouts:
        raise UserError(
            f"forward() draws {_listed(facts)} by no sequence of the batch, which other layouts draw otherwise",
            where,
            "Set engine.deterministic to auto or true, or draw tensors whose first dimension is the batch.",
        )
    if facts.varying:
        logger.warning(
            "forward() draws %s by no sequence of the batch: a run repeats and resumes to the bit at one layout, and "
            "other layouts draw otherwise",
            _listed(facts),
        )
    if facts.own_generator is not None:
        raise UserError(
            f"forward() draws by {facts.own_generator} from a generator of its own, whose state no checkpoint keeps",
            where,
            "Leave the generator out: torch's own one is seeded at each step.",
        )
    if not on_meta:
        with users_code(config, where, "forward()"):
            _Passes(config, vocab_size, facts, where, across_layouts).check()
    return facts


def _listed(facts: Facts) -> str:
    return ", ".join(sorted({f"{name} of shape {shape}" for name, shape in facts.varying}))


def _check_parts(network: Network, where: str) -> None:
    for name, part in network.named_modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
            check_embedding(name, part, where)
    for name, parameter in network.named_parameters():
        if parameter._post_accumulate_grad_hooks:
            raise UserError(
                f"'{name}' has a hook after the accumulation of its gradient, which the engine owns",
                where,
                "Use register_hook(), which gets the full gradient of a step.",
            )
        if parameter.dtype.is_complex:
            raise UserError(
                f"'{name}' is {str(parameter.dtype).removeprefix('torch.')}, which is not trained",
                where,
                "Keep the real and the imaginary part in a parameter of two numbers (torch.view_as_complex).",
            )


def _check_repeats(network: Network, again: Network, where: str) -> None:
    """Each rank builds the module: values that differ from build to build would differ from rank to rank."""
    first, second = (dict((*one.named_parameters(), *one.named_buffers())) for one in (network, again))
    for name, value in first.items():
        if name not in second or not _equal(value.detach(), second[name].detach()):
            raise UserError(
                f"build() gives '{name}' other values each time it is called, from the same seed",
                where,
                "Draw them from torch's, NumPy's or random's own generator, which are seeded.",
            )


@dataclass(frozen=True)
class _Result:
    """What a pass gave."""

    loss: float
    weight: float
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]

    def away(self, other: _Result) -> tuple[float, float]:
        """How far another result is: of the loss, relative above 1; of all gradients, relative to their norm."""
        loss = abs(self.loss - other.loss) / max(1.0, abs(self.loss))
        names = self.gradients.keys() | other.gradients.keys()
        zero = torch.zeros(())
        pairs = [(self.gradients.get(name, zero), other.gradients.get(name, zero)) for name in names]
        square = sum(float((a - b).double().square().sum()) for a, b in pairs)
        norm = math.sqrt(sum(float(a.double().square().sum()) for a, _ in pairs))
        return loss, math.sqrt(square) / max(norm, 1e-6)

    def agrees(self, other: _Result) -> bool:
        loss, gradient = self.away(other)
        return loss <= LOSS_BAND and gradient <= GRADIENT_BAND and abs(self.weight - other.weight) <= 1e-3


class _Passes:
    """The compared passes of one module."""

    def __init__(self, config: PlainConfig, vocab_size: int, facts: Facts, where: str, across_layouts: bool) -> None:
        from bigtrain.models.plain.family import example_batch, seeded

        self._seeded = seeded
        self._new = lambda: _with_facts(config.wrapped(vocab_size, SEED), facts)
        self._facts = facts
        self._where = where
        self._across_layouts = across_layouts
        self._batch, self._other = (example_batch(config, vocab_size, sum(PARTS), seed) for seed in (0, 1))

    def check(self) -> None:
        """Compare, in training and in evaluation.

        Raises:
            UserError: A pass depends on what should not matter.
        """
        for training in (True, False):
            network = self._new()
            network.train(training)
            start = _state(network)
            before = _attributes(network)
            whole = self._pass(network, self._batch)
            self._refuse_bad_numbers(whole, training)
            self._refuse_changed_parameters(network, start)
            middle = _attributes(network)
            _restore(network, start)
            self._pass(network, self._other)
            after = _attributes(network)
            _restore(network, start)
            again = self._pass(network, self._batch)
            self._refuse_state(network, before, middle, after, _repeats(whole, again))
            self._check_coupling(whole, training)

    def _pass(self, network: Network, batch: Batch, ranks: BatchRanks | None = None, constant: bool = False) -> _Result:
        """Forward and backward, from the generators' state at a step's beginning."""
        rows = len(batch["keys"])
        network.zero_grad(set_to_none=True)
        with (
            self._seeded(SEED),
            torch.set_grad_enabled(network.training or self._facts.needs_grad),
            across(ranks or OneProcess(rows), rows),
            drawing(_Constant() if constant else Draws(batch["keys"], self._facts.fixed)),
        ):
            result: LossSum = network(batch)
            if network.training and result.loss.requires_grad and ranks is None:
                result.loss.backward()
        return self._result(network, result)

    @staticmethod
    def _result(network: Network, result: LossSum) -> _Result:
        gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        return _Result(float(result.loss.detach()), float(result.weight), gradients, buffers)

    def _in_parts(self, training: bool, constant: bool) -> _Result:
        """The step of two ranks, each with a part of the batch."""
        networks = [self._new() for _ in PARTS]
        first, second = ({name: _rows(x, sum(PARTS), part) for name, x in self._batch.items()} for part in _PARTS)
        losses: list[LossSum] = []

        def run(network: Network, batch: Batch, ranks: Rehearsed) -> LossSum:
            network.train(training)
            rows = len(batch["keys"])
            with (
                self._seeded(SEED),
                torch.set_grad_enabled(training or self._facts.needs_grad),
                across(ranks, rows),
                drawing(_Constant() if constant else Draws(batch["keys"], self._facts.fixed)),
            ):
                return network(batch)

        losses = together(
            [lambda ranks: run(networks[0], first, ranks), lambda ranks: run(networks[1], second, ranks)],
            list(PARTS),
        )
        loss = losses[0].loss + losses[1].loss
        if training and loss.requires_grad:
            loss.backward()
        gradients: dict[str, Tensor] = {}
        for network in networks:
            for name, parameter in network.named_parameters():
                if parameter.grad is not None:
                    gradients[name] = gradients.get(name, 0) + parameter.grad
        own = [{name: buffer.clone() for name, buffer in network.named_buffers()} for network in networks]
        alike = {
            name: x if _close(x, own[1][name]) else torch.full_like(x.float(), math.nan) for name, x in own[0].items()
        }
        weight = float(losses[0].weight) + float(losses[1].weight)
        return _Result(float(loss.detach()), weight, gradients, alike)

    def _check_coupling(self, whole: _Result, training: bool) -> None:
        mode = "training" if training else "evaluation"
        parts = self._in_parts(training, constant=False)
        if whole.agrees(parts):
            self._refuse_buffers(whole, parts)
            return
        if self._facts.draws:
            network = self._new()
            network.train(training)
            whole, parts = self._pass(network, self._batch, constant=True), self._in_parts(training, constant=True)
            if whole.agrees(parts):
                self._report_draws()
                return
        loss, gradient = whole.away(parts)
        raise UserError(
            f"In {mode} the loss of a batch is not the sum of the losses of its parts (off by {loss:.1e}, gradients by "
            f"{gradient:.1e}, relative): it would differ from layout to layout",
            self._where,
            "Keep what couples sequences out of forward(), or compute it over the global batch by gather_batch() or "
            "sum_over_batch() of bigtrain.models.plain. A mean over the batch is stated by loss_is. Draw by torch, not "
            "by NumPy or random.",
        )

    def _report_draws(self) -> None:
        """Draws that `Draws` took for keyed and that do not follow the sequences, such as time before batch."""
        what = "forward() draws by rows that are not the batch's: other layouts draw otherwise"
        if self._across_layouts:
            raise UserError(what, self._where, "Draw tensors whose first dimension is the batch.")
        if not self._facts.varying:
            logger.warning("%s; a run repeats and resumes to the bit at one layout", what)

    def _refuse_buffers(self, whole: _Result, parts: _Result) -> None:
        for name, value in whole.buffers.items():
            if not _close(value, parts.buffers[name]):
                raise UserError(
                    f"forward() changes the buffer '{name}' by its own part of the batch: ranks would differ",
                    self._where,
                    "Sum what it follows by sum_over_batch() of bigtrain.models.plain.",
                )

    def _refuse_bad_numbers(self, result: _Result, training: bool) -> None:
        if not math.isfinite(result.loss):
            mode = "training" if training else "evaluation"
            logger.warning("the loss of a made-up batch is %s in %s: nothing could be compared", result.loss, mode)

    def _refuse_changed_parameters(self, network: Network, start: _State) -> None:
        for name, parameter in network.named_parameters():
            value, version, pointer = start.parameters[name]
            if parameter._version == version and parameter.data_ptr() == pointer and _equal(parameter.detach(), value):
                continue
            raise UserError(
                f"forward() changes the parameter '{name}', which each rank would do on its own part of it",
                self._where,
                "Do it in a method after_step(self), which runs after each update with the full parameters.",
            )

    def _refuse_state(
        self,
        network: Network,
        before: Mapping[str, Any],
        middle: Mapping[str, Any],
        after: Mapping[str, Any],
        repeats: bool,
    ) -> None:
        listed = {name for name, _ in network._with_extra_state()}
        moved = [
            name
            for name, value in after.items()
            if name.rpartition(".")[0] not in listed and not _alike(value, middle.get(name))
        ]
        counters = [name for name in moved if not _has_tensor(after[name])]
        non_persistent = [name for name in self._facts.moving if not _is_persistent(network, name)]
        if repeats and not counters and not non_persistent:
            return
        changed = [name for name, value in after.items() if not _alike(value, before.get(name))]
        names = counters or non_persistent or moved or changed
        if names:
            raise UserError(
                f"forward() changes '{names[0]}', which no checkpoint keeps, and passes after it "
                f"{'depend on it' if not repeats else 'could depend on it'}",
                self._where,
                'What follows the step comes from batch["step"]; what follows the weights is done in after_step(self); '
                "a number that the module counts is returned by get_extra_state().",
            )
        if not repeats:
            raise UserError(
                "Two passes of one batch from the same seed differ: forward() looks at a clock, or at a generator that "
                "is not seeded",
                self._where,
                "Draw from torch's, NumPy's or random's own generator, which are seeded at each step.",
            )


_PARTS = (slice(0, PARTS[0]), slice(PARTS[0], sum(PARTS)))


class _Constant(Draws):
    """The same value for each draw: what is left of a difference does not come from draws."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(1, dtype=torch.int64))

    def _fits(self, shape: tuple[int, ...]) -> bool:
        return True

    def _uniform(self, shape: Any, device: Any = None) -> Tensor:
        return torch.full(tuple(shape), 0.37, dtype=torch.float64)


@dataclass(frozen=True)
class _State:
    parameters: dict[str, tuple[Tensor, int, int]]
    """Values, version and address."""
    buffers: dict[str, Tensor]
    extra: dict[str, Any]


def _state(network: Network) -> _State:
    return _State(
        {name: (p.detach().clone(), p._version, p.data_ptr()) for name, p in network.named_parameters()},
        {name: buffer.clone() for name, buffer in network.named_buffers()},
        {name: module.get_extra_state() for name, module in network._with_extra_state()},
    )


@torch.no_grad()
def _restore(network: Network, state: _State) -> None:
    for name, buffer in network.named_buffers():
        buffer.copy_(state.buffers[name])
    for name, module in network._with_extra_state():
        module.set_extra_state(state.extra[name])


def _with_facts(network: Network, facts: Facts) -> Network:
    network.facts = facts
    return network


def _attributes(network: Network) -> dict[str, Any]:
    """Copies of what modules keep besides parameters and buffers, by qualified names."""
    found = {}
    for prefix, module in network.network.named_modules():
        for name, value in attributes(module).items():
            leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(value)]
            found[f"{prefix}.{name}" if prefix else name] = leaves
    return found


def _has_tensor(leaves: list[Any]) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in leaves)


def _alike(a: list[Any], b: list[Any] | None) -> bool:
    """Whether two attributes hold the same; objects of other kinds are not compared."""
    if b is None or len(a) != len(b):
        return False
    for one, other in zip(a, b, strict=True):
        if isinstance(one, Tensor) or isinstance(other, Tensor):
            if not (isinstance(one, Tensor) and isinstance(other, Tensor) and _equal(one, other)):
                return False
        elif isinstance(one, (bool, int, float, str, type(None))) and one != other:
            return False
    return True


def _repeats(a: _Result, b: _Result) -> bool:
    same = a.loss == b.loss or (math.isnan(a.loss) and math.isnan(b.loss))
    return same and all(_equal(value, b.gradients.get(name)) for name, value in a.gradients.items())


def _equal(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5)


def _is_persistent(network: Network, name: str) -> bool:
    prefix, _, own = name.rpartition(".")
    modules = dict(network.network.named_modules())
    return own not in modules[prefix]._non_persistent_buffers_set


def _rows(x: Tensor, rows: int, part: slice) -> Tensor:
    return x[part] if x.ndim and len(x) == rows else x
