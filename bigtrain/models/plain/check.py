"""Checks that a plain module computes the same in every layout, with tiny batches on the CPU, before any rank starts.

A pass is repeated after another pass, which reveals state that a checkpoint would lose. It is compared with two passes
over parts of the batch that sum over each other like ranks, which reveals coupling inside a batch. And parameters and
attributes are compared with those before the pass. A module that is built without values (`initialisers()`) runs on the
meta device, and values are not compared.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from bigtrain.config import UserError
from bigtrain.models.batches import batch_kind
from bigtrain.models.check import check_embedding, check_names, users_code
from bigtrain.models.contract import Batch, LossSum
from bigtrain.models.plain.across import BatchRanks, OneProcess, across, couples, differing_uses
from bigtrain.models.plain.compared import (
    Result,
    State,
    attributes_of,
    close,
    equal,
    has_tensor,
    host_state,
    is_persistent,
    repeats,
    restore,
    state_of,
)
from bigtrain.models.plain.draws import Drawn, Draws, drawing
from bigtrain.models.plain.facts import Facts
from bigtrain.models.plain.kept import (
    kept_state,
    lost_buffers,
    refuse_changed_parameters,
    refuse_lost_state,
    unlike,
)
from bigtrain.models.plain.network import Network
from bigtrain.models.plain.rehearsal import Rehearsed, together

if TYPE_CHECKING:
    from bigtrain.models.plain.family import PlainConfig

logger = logging.getLogger(__name__)

PARTS = (3, 2)
"""Number of sequences in each of the two parts of the compared batch."""
SEED, OTHER_SEED = 20, 21
"""Seeds of the passes. The second is used if draws of NumPy or `random` decide what a pass computes, because one draw
may hide an error that another reveals."""


def check_plain(config: PlainConfig, vocab_size: int, across_layouts: bool = False) -> Facts:
    """Refuse a module whose losses would depend on the layout, or whose state a resume would lose.

    Args:
        across_layouts: Whether random draws that differ between layouts are errors; otherwise they are warnings.

    Raises:
        UserError: The module violates a rule. The error describes the first violation and its fix.
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
            fix = "State the image size in Config, as a property sample_shape that returns (height, width, channels)."
            raise UserError(error.what, error.where, error.fix if config.sample_shape else error.fix or fix) from error
        raise
    network.facts = facts
    if facts.varying and across_layouts:
        raise UserError(
            "forward() draws random tensors whose first dimension is not the batch, so that layouts differ: "
            f"{_listed(facts)}",
            where,
            "Set engine.deterministic to auto or true, or draw tensors whose first dimension is the batch.",
        )
    if facts.varying:
        logger.warning(
            "forward() draws random tensors whose first dimension is not the batch: %s. A run repeats and resumes "
            "bit for bit at one layout, but layouts differ",
            _listed(facts),
        )
    if facts.own_generator is not None:
        raise UserError(
            f"forward() draws by {facts.own_generator} from its own generator, whose state is not saved in checkpoints",
            where,
            "Remove the generator: torch's default generator is seeded at each step.",
        )
    if not on_meta:
        with users_code(config, where, "forward()"):
            for part in config.parts or (None,):
                _Passes(config, vocab_size, facts, where, across_layouts, part).check()
            _warn_about_one_sequence(config, vocab_size, facts)
    return facts


def _warn_about_one_sequence(config: PlainConfig, vocab_size: int, facts: Facts) -> None:
    """Warn about a module that fails on a batch of one sequence, as where it calls squeeze() without a dimension."""
    from bigtrain.models.plain.family import example_batch, seeded

    network = _with_facts(config.wrapped(vocab_size, SEED), facts).eval()
    batch = example_batch(config, vocab_size, 1)
    try:
        with seeded(SEED), torch.set_grad_enabled(facts.needs_grad), across(OneProcess(1), 1):
            network(batch)
    except Exception as error:  # noqa: BLE001 - the user's code, on a batch that a run may never have
        logger.warning(
            "forward() fails on a batch of one sequence (%s), which a rank may get at the end of an evaluation: name "
            "the dimension of squeeze()",
            str(error).splitlines()[0] if str(error) else type(error).__name__,
        )


def _listed(facts: Facts) -> str:
    return ", ".join(sorted({f"{name} of shape {shape}" for name, shape in facts.varying}))


def _check_parts(network: Network, where: str) -> None:
    for name, part in network.named_modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
            check_embedding(name, part, where)
    for name, buffer in network.named_buffers():
        if buffer.layout is not torch.strided and is_persistent(network, name):
            raise UserError(
                f"The buffer '{name}' is a sparse tensor, which checkpoints do not support",
                where,
                "Register it with persistent=False, so that it is built again, or keep its indices and values in "
                "buffers.",
            )
    for name, parameter in network.named_parameters():
        if parameter._post_accumulate_grad_hooks:
            raise UserError(
                f"'{name}' has a hook that runs after gradient accumulation, which only the engine may use",
                where,
                "Use register_hook(), which gets the full gradient of a step.",
            )
        if parameter.dtype.is_complex:
            raise UserError(
                f"'{name}' is {str(parameter.dtype).removeprefix('torch.')}, a dtype that cannot be trained",
                where,
                "Keep the real and the imaginary part in a real parameter with a last dimension of 2 "
                "(torch.view_as_complex).",
            )


def _check_repeats(network: Network, again: Network, where: str) -> None:
    """Check that building the module twice gives the same values; otherwise they would differ between ranks."""
    first, second = (dict((*one.named_parameters(), *one.named_buffers())) for one in (network, again))
    for name, value in first.items():
        if name not in second or not equal(value.detach(), second[name].detach()):
            raise UserError(
                f"build() gives '{name}' different values in two calls with the same seed",
                where,
                "Draw them from the default generator of torch, NumPy or random, which are seeded.",
            )
    tables, same = attributes_of(network), attributes_of(again)
    for name in unlike(tables, same):
        if has_tensor(tables[name]):
            raise UserError(
                f"build() gives the attribute '{name}' different values in two calls with the same seed",
                where,
                "Draw them from the default generator of torch, NumPy or random, which are seeded.",
            )


class _Passes:
    """Runs passes of one module and compares them."""

    def __init__(
        self, config: PlainConfig, vocab_size: int, facts: Facts, where: str, across_layouts: bool, part: str | None
    ) -> None:
        from bigtrain.models.plain.family import example_batch, seeded

        self._config = config
        self._seeded = seeded
        # `_as_mean` scales the gradients of all passes here.
        unscaled = replace(facts, scale_matters=False)
        self._new = lambda: _with_facts(config.of_part(part, vocab_size, SEED), unscaled)
        self._facts = facts
        self._where = where
        self._across_layouts = across_layouts
        self._seed = SEED
        self._gradients: dict[str, Tensor] = {}
        self._weight = 0.0
        self._by_host = False
        """Whether a pass has taken random numbers from NumPy or `random`."""
        self._batch, self._other = (example_batch(config, vocab_size, sum(PARTS), seed) for seed in (0, 1))

    def check(self) -> None:
        """Compare passes in training mode and in evaluation mode.

        Raises:
            UserError: A pass depends on the layout, or on state that no checkpoint contains.
        """
        for training in (True, False):
            network = self._new()
            network.train(training)
            start = state_of(network)
            before = attributes_of(network)
            whole = self._pass(network, self._batch)
            self._weight, self._gradients = whole.weight, whole.gradients
            uses = couples()
            self._refuse_bad_numbers(whole, training)
            refuse_changed_parameters(network, start, self._where)
            if not training:
                self._refuse_changes_in_evaluation(network, start)
            moved, again = self._moved(network, start, uses)
            changed = unlike(attributes_of(network), before)
            refuse_lost_state(network, self._facts, self._where, moved, changed, repeats(whole, again))
            self._check_coupling(whole, training)
            if self._by_host:
                self._seed = OTHER_SEED
                restore(network, start)
                self._check_coupling(self._pass(network, self._batch), training)
                self._seed = SEED
        self._check_after_step()

    def _moved(self, network: Network, start: State, uses: int) -> tuple[list[str], Result]:
        """Run a pass of another batch, then repeat that of the first, which has just run.

        Args:
            uses: How often the first pass has coupled sequences.

        Returns:
            Names of attributes that differ after the two passes of the same batch, because they accumulate or
            alternate; and the result of the repeated pass. Values for a log, which a pass computes from its batch, are
            equal.
        """
        first = attributes_of(network, start)
        restore(network, start)
        self._pass(network, self._other)
        if couples() != uses:
            raise differing_uses()
        between = attributes_of(network, start)
        restore(network, start)
        again = self._pass(network, self._batch)
        moved = unlike(attributes_of(network, start), first)
        if any(name not in moved and not has_tensor(between.get(name, [])) for name in unlike(between, first)):
            restore(network, start)
            self._pass(network, self._batch)
            moved = sorted({*moved, *unlike(attributes_of(network, start), first)})
        return moved, again

    def _refuse_changes_in_evaluation(self, network: Network, start: State) -> None:
        """Refuse buffers and extra states that evaluation changes in each pass; a table made once is no such change."""
        first = kept_state(network)
        if not unlike(first, kept_state(network, start)):
            return
        self._pass(network, self._other)
        for name in unlike(kept_state(network), first):
            raise UserError(
                f"In evaluation, forward() changes {name}: training would depend on how often evaluations call it",
                self._where,
                "Change it only if self.training, or in after_step(self).",
            )

    def _check_after_step(self) -> None:
        """Run an update and refuse what `after_step` changes and no checkpoint contains."""
        network = self._new()
        network.extra_state()
        if not any(network.with_after_step()):
            return
        network.train()
        self._pass(network, self._batch)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.mul_(0.9)
            network.zero_grad(set_to_none=True)
            before = attributes_of(network) | lost_buffers(network)
            with self._seeded(self._seed), users_code(self._config, self._where, "after_step()"):
                network.after_step()
            after = attributes_of(network) | lost_buffers(network)
        listed = {name for name, _ in network._with_extra_state()}
        for name in unlike(after, before):
            if name.rpartition(".")[0] not in listed:
                raise UserError(
                    f"after_step() changes '{name}', which is not saved in checkpoints",
                    self._where,
                    "Keep tensors in buffers, or in parameters of submodules, and return counters from "
                    "get_extra_state().",
                )
        network.extra_state()

    def _pass(self, network: Network, batch: Batch, ranks: BatchRanks | None = None, constant: bool = False) -> Result:
        """Run forward and backward, with all generators in their state at the start of a step."""
        rows = len(batch["keys"])
        network.zero_grad(set_to_none=True)
        with (
            self._seeded(self._seed),
            torch.set_grad_enabled(network.training or self._facts.needs_grad),
            across(ranks or OneProcess(rows), rows),
            drawing(self._draws(batch, constant)),
        ):
            before = host_state()
            result: LossSum = network(batch)
            self._by_host |= host_state() != before
            if network.training and result.loss.requires_grad and ranks is None:
                self._as_mean(result).backward()
                network.undo_recomputation()
        return self._result(network, result)

    def _as_mean(self, result: LossSum) -> Tensor:
        """The loss of a part as it counts in the mean of the complete batch, whose gradient hooks may see."""
        return result.loss / (self._weight or float(result.weight) or 1.0)

    def _draws(self, batch: Batch, constant: bool) -> Draws:
        return _Constant() if constant else Draws(batch["keys"], self._facts.fixed, self._facts.second)

    @staticmethod
    def _result(network: Network, result: LossSum) -> Result:
        gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        return Result(float(result.loss.detach()), float(result.weight), gradients, kept_state(network))

    def _in_parts(self, training: bool, constant: bool) -> Result:
        """Run the step as two ranks would, each with a part of the batch."""
        networks = [self._new() for _ in PARTS]
        first, second = ({name: _rows(x, sum(PARTS), part) for name, x in self._batch.items()} for part in _PARTS)
        losses: list[LossSum] = []

        def run(network: Network, batch: Batch, ranks: Rehearsed) -> LossSum:
            network.train(training)
            rows = len(batch["keys"])
            with (
                self._seeded(self._seed),
                torch.set_grad_enabled(training or self._facts.needs_grad),
                across(ranks, rows),
                drawing(self._draws(batch, constant)),
            ):
                result: LossSum = network(batch)
                if training and result.loss.requires_grad and not self._facts.couples:
                    # Inside the contexts, so that recomputation (torch.utils.checkpoint) repeats the same draws.
                    self._as_mean(result).backward()
                    network.undo_recomputation()
                    return LossSum(result.loss.detach(), *result[1:])
                return result

        losses = together(
            [lambda ranks: run(networks[0], first, ranks), lambda ranks: run(networks[1], second, ranks)],
            list(PARTS),
        )
        loss = losses[0].loss + losses[1].loss
        own = [self._result(network, loss).buffers for network, loss in zip(networks, losses, strict=True)]
        gradients: dict[str, Tensor] = {}
        try:
            if training and loss.requires_grad:
                (loss / (self._weight or 1.0)).backward()
            for name, parameter in (pair for network in networks for pair in network.named_parameters()):
                if parameter.grad is not None:
                    gradients[name] = gradients.get(name, 0) + parameter.grad
        except CheckpointError:
            gradients = self._gradients  # statistics that torch.utils.checkpoint computes again cannot be summed here
        buffers = {
            name: x if close(x, own[1].get(name, x)) else torch.full_like(x.float(), math.nan)
            for name, x in own[0].items()
        }
        weight = float(losses[0].weight) + float(losses[1].weight)
        return Result(float(loss.detach()), weight, gradients, buffers)

    def _check_coupling(self, whole: Result, training: bool) -> None:
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
        draws, instead = "", ""
        if self._by_host:
            draws = ". forward() draws random values from NumPy or random, which are not keyed by sequence"
            instead = "Draw random values with torch. "
        raise UserError(
            f"In {mode} the loss of a batch is not the sum of the losses of its parts (off by {loss:.1e}, gradients by "
            f"{gradient:.1e}, relative): it would differ between layouts{draws}",
            self._where,
            f"{instead}Remove what couples sequences from forward(), or compute it over the global batch with "
            "gather_batch() or sum_over_batch() of bigtrain.models.plain. If the loss is a mean over the batch, set "
            "loss_is; if it is a mean over anything else (masked tokens, class weights), return LossSum(sum, divisor).",
        )

    def _report_draws(self) -> None:
        """Report draws that `Draws` keyed by sequence although their first dimension is not the batch."""
        what = "forward() draws random tensors whose rows are not those of the batch, so that layouts differ"
        if self._across_layouts:
            raise UserError(what, self._where, "Draw tensors whose first dimension is the batch.")
        if not self._facts.varying:
            logger.warning("%s; a run repeats and resumes bit for bit at one layout", what)

    def _refuse_buffers(self, whole: Result, parts: Result) -> None:
        for name, value in whole.buffers.items():
            if not close(value, parts.buffers.get(name, value)):
                raise UserError(
                    f"forward() changes {name} from its own part of the batch: ranks would differ",
                    self._where,
                    "Sum the values that it depends on with sum_over_batch() of bigtrain.models.plain.",
                )

    def _refuse_bad_numbers(self, result: Result, training: bool) -> None:
        if not math.isfinite(result.loss):
            mode = "training" if training else "evaluation"
            logger.warning(
                "the loss of an example batch is %s in %s: the module could not be checked", result.loss, mode
            )


_PARTS = (slice(0, PARTS[0]), slice(PARTS[0], sum(PARTS)))


class _Constant(Draws):
    """Makes every draw return the same value, so that a remaining difference does not come from draws."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(1, dtype=torch.int64))

    def _fits(self, drawn: Drawn) -> bool:
        return True

    def _uniform(self, shape: Any, device: Any = None) -> Tensor:
        return torch.full(tuple(shape), 0.37, dtype=torch.float64)


def _with_facts(network: Network, facts: Facts) -> Network:
    network.facts = facts
    return network


def _rows(x: Tensor, rows: int, part: slice) -> Tensor:
    return x[part] if x.ndim and len(x) == rows else x
