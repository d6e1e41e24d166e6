"""The ladder: computes the shape, batch, learning rate, beta2 and warm-up of each target N by the sweep's rules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bigtrain.config import UserError
from bigtrain.models.config import ModelConfig
from bigtrain.models.decoder_config import GATED, DecoderConfig
from bigtrain.sweeps.config import LadderConfig, SizeConfig, SizeFacts, SweepRule
from bigtrain.sweeps.load import Sweep
from bigtrain.training.prepare import prepare

MAX_LAYERS = 160
MAX_DEVIATION = 0.2
"""Largest relative difference between a shape's N and its target; a larger one is refused."""
ASPECT_WEIGHT = 0.02
"""Weight of ln(width / layers / aspect)^2 relative to ln(N / target)^2 in the choice of a shape.

An N that is off by 10 % counts as much as an aspect that is off by a factor of two.
"""


@dataclass(frozen=True)
class Rung:
    """One size of a sweep, with the shape and hyperparameters of its trials."""

    target: int
    """Target N, which also names the size."""
    model: dict[str, Any]
    """The keys of `model` that give the shape."""
    params: int
    """N of the shape, as the law counts it."""
    params_without_embeddings: int
    params_total: int
    flops_per_token: int
    """Exact matmul FLOPs of the forward and backward passes, with attention over all pairs of positions."""
    context: int
    """Tokens per sequence."""
    batch_sequences: int
    """Sequences of a global batch."""
    lr: float
    beta2: float
    warmup_steps: int
    vocab_size: int
    sequences_per_epoch: int
    deviations: tuple[str, ...] = ()
    """Differences between this rung and the ladder's rules, as texts for the user."""
    keys: Mapping[str, float] = field(default_factory=dict)
    """Values of `ladder.keys`, by dotted name."""
    hidden_lr: float | None = None
    """Learning rate of the blocks' matrices under muP; None if the base run has no `model.mup`."""

    @property
    def batch_tokens(self) -> int:
        """Tokens of a global batch, which one step consumes."""
        return self.batch_sequences * self.context

    def steps(self, tokens: float) -> int:
        """Number of steps of a run of D tokens, rounded, and at least 1."""
        return max(1, round(tokens / self.batch_tokens))

    def flops(self, steps: int) -> float:
        """Exact matmul FLOPs of so many steps."""
        return float(self.flops_per_token) * steps * self.batch_tokens


def rung(sweep: Sweep, size: SizeConfig) -> Rung:
    """Compute the rung of one size; the base run's config is checked against its data.

    Raises:
        UserError: The base run is wrong, no shape has an N near the target, a rule gives no positive value, or the
            size's batch is not a whole number of sequences.
    """
    ladder = sweep.config.ladder
    vocab_size, context, per_epoch = _data(sweep)
    deviations = []
    if size.model is not None:
        shape: dict[str, Any] = dict(size.model)
        deviations.append("shape given in the file")
    else:
        shape = _shape(sweep, size.params, vocab_size)
    model = sweep.trial({**_PROBE, "model": shape}).model
    params = count(model, ladder, vocab_size)
    off = params / size.params - 1
    if size.model is None and abs(off) > MAX_DEVIATION:
        raise UserError(
            f"No shape has about {size.params:,} parameters ({ladder.count}): the nearest has {params:,}", sweep.where,
            f"Give a size of {params:,}, a smaller ladder.width_multiple, or the shape under sizes[].model.",
        )  # fmt: skip
    if abs(off) > 0.005:
        deviations.append(f"N {off:+.1%} from its target")
    facts = SizeFacts(params, model.plain(), 0)
    wanted = _apply(sweep, "batch", ladder.batch, facts)
    if size.batch is not None:
        try:
            batch = size.batch.sequences(context)
        except ValueError as error:
            where = f"{sweep.where}: sizes[].batch of the size {size.params:,}"
            raise UserError(str(error), where, "Give a number of sequences, or a multiple of model.context.") from None
        deviations.append("batch given in the file")
    else:
        batch = max(1, round(wanted / context))
        if abs(batch * context / wanted - 1) > 0.05:
            deviations.append(f"batch {batch * context / wanted - 1:+.0%} from its rule: whole sequences of {context}")
    if size.lr is not None:
        deviations.append("lr given in the file")
    tokens = batch * context
    facts = replace(facts, batch_tokens=tokens)
    lr = size.lr or _apply(sweep, "lr", ladder.lr, facts)
    beta2 = _apply(sweep, "beta2", ladder.beta2, facts)
    warmup = max(1, round(_apply(sweep, "warmup", ladder.warmup, facts) / tokens))
    keys = {key: _rounded(_apply(sweep, f"keys.{key}", rule, facts)) for key, rule in ladder.keys.items()}
    return Rung(
        size.params, shape, params, model.parameter_count_without_embeddings(vocab_size),
        model.parameter_count(vocab_size), model.flops_per_token(vocab_size).full, context, batch,
        _rounded(lr), beta2, warmup, vocab_size, per_epoch, tuple(deviations), keys,
        _rounded(lr * model.width_factor) if isinstance(model, DecoderConfig) and model.follows_mup else None,
    )  # fmt: skip


def _apply(sweep: Sweep, key: str, rule: SweepRule, facts: SizeFacts) -> float:
    """The value that a rule gives for a size.

    Raises:
        UserError: The rule gives no value, or one that is not positive and finite.
    """
    try:
        found = rule.of(facts)
    except ValueError as error:
        message = str(error)
    else:
        if math.isfinite(found) and found > 0:
            return found
        message = f"it gives {found!r}"
    raise UserError(
        f"The rule '{rule.name}' of ladder.{key} has no valid value for the size of {facts.params:,} parameters: "
        f"{message}",
        sweep.where, "Change the rule.",
    )  # fmt: skip


_PROBE: dict[str, Any] = {"name": "probe", "duration": "1 steps", "batch": {"size": 1}}


def count(model: ModelConfig, ladder: LadderConfig, vocab_size: int) -> int:
    """N of a model, as the law counts it: with or without embeddings."""
    if ladder.count == "total":
        return model.parameter_count(vocab_size)
    return model.parameter_count_without_embeddings(vocab_size)


def _rounded(lr: float) -> float:
    """The value rounded to three significant digits, so that it can be written into a file exactly."""
    return float(f"{lr:.3g}")


def _data(sweep: Sweep) -> tuple[int, int, int]:
    """Vocabulary size, tokens per sequence and sequences per epoch of the base run's data."""
    smallest = {"layers": 1, "width": sweep.config.ladder.width_multiple, "heads": 1}
    try:
        config = sweep.trial({**_PROBE, "model": smallest})
    except UserError:
        shapes = [size.model for size in sweep.config.ladder_sizes() if size.model is not None]
        if not shapes:
            raise
        config = sweep.trial({**_PROBE, "model": shapes[0]})
    prepared = prepare(config)
    return prepared.outputs, prepared.context, prepared.sequences_per_epoch


def _shape(sweep: Sweep, target: int, vocab_size: int) -> dict[str, Any]:
    """The keys of the shape that comes nearest to the target N and the ladder's aspect."""
    ladder = sweep.config.ladder
    best: tuple[float, dict[str, Any]] | None = None
    for layers in range(1, MAX_LAYERS + 1):
        for width in _widths(sweep, layers, target, vocab_size):
            keys = _keys(sweep, layers, width)
            params = count(sweep.trial({**_PROBE, "model": keys}).model, ladder, vocab_size)
            size = math.log(params / target) ** 2
            aspect = math.log(width / layers / ladder.aspect) ** 2
            score = size + ASPECT_WEIGHT * aspect
            if best is None or score < best[0]:
                best = (score, keys)
        # Deeper shapes are only farther from the wanted aspect.
        if best is not None and ASPECT_WEIGHT * _least_aspect(layers + 1, ladder, target) > best[0]:
            break
    assert best is not None
    return best[1]


def _least_aspect(layers: int, ladder: LadderConfig, target: int) -> float:
    """Least value of ln(width / layers / aspect)^2 at the target N, if each block has 12 width^2 parameters.

    It is 0 while the width over the layers is above the aspect.
    """
    width = math.sqrt(target / (12 * layers))
    return max(0.0, -math.log(width / layers / ladder.aspect)) ** 2


def _widths(sweep: Sweep, layers: int, target: int, vocab_size: int) -> set[int]:
    """The multiples of `width_multiple` next to the width at which so many layers have N parameters."""
    step = sweep.config.ladder.width_multiple
    near = step
    for _ in range(_REFINEMENTS):
        model = sweep.trial({**_PROBE, "model": _keys(sweep, layers, near)}).model
        # The parameters of blocks are quadratic in the width. Other parameters and rounding need further iterations.
        wanted = near * math.sqrt(target / count(model, sweep.config.ladder, vocab_size))
        last, near = near, max(step, round(wanted / step) * step)
        if near == last:
            break
    return {width for width in (near - step, near, near + step) if width >= step}


_REFINEMENTS = 4


def _keys(sweep: Sweep, layers: int, width: int) -> dict[str, Any]:
    """The keys of `model` for a decoder of this depth and width."""
    ladder = sweep.config.ladder
    heads = max(1, width // ladder.head_width)
    while width % heads or (width // heads) % 2:
        heads -= 1
    keys: dict[str, Any] = {"layers": layers, "width": width, "heads": heads}
    if ladder.mlp_ratio is not None or _is_gated(sweep):
        ratio = ladder.mlp_ratio or 8 / 3
        # The decoder's own rounding to multiples of 256 would make narrow models mostly MLP.
        keys["mlp_width"] = max(16, round(ratio * width / 16) * 16)
    return keys


def _is_gated(sweep: Sweep) -> bool:
    model = sweep.document.value.get("model")
    chosen = model.get("mlp") if isinstance(model, dict) else None
    if chosen is not None:
        return chosen in GATED
    probe = sweep.trial({**_PROBE, "model": {"layers": 1, "width": sweep.config.ladder.width_multiple, "heads": 1}})
    return getattr(probe.model, "mlp", None) in GATED
