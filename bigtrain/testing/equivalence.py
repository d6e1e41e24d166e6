"""Whether a layout and an engine compute what one process computes: the same *what*, another *how*.

    expected = pool.run(record, what, directory, ranks=1)[0]                 # one process, the whole batch in one pass
    found = pool.run(deviations, what, how, directory, ranks=how.ranks)      # by rank; equal on all
    assert not found[0].faults()

Each compared step starts from the recorded weights and optimizer state, since Adam amplifies rounding; besides, a run
of its own from the same seed shows what the steps add up to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from bigtrain.checkpoint.flat import FlatPart
from bigtrain.config.plugin import load_plugin
from bigtrain.data.loader import distribute
from bigtrain.engines.config import ENGINES, Precision
from bigtrain.engines.contract import Measuring, MicroBatch, Reloaded, StepNumbers, Totals
from bigtrain.engines.fsdp.engine import FSDPEngine
from bigtrain.engines.support import check_support
from bigtrain.models.batches import batch_kind
from bigtrain.models.config import FAMILIES, ModelConfig
from bigtrain.optim.config import OPTIMIZERS
from bigtrain.parallel.config import LayoutConfig
from bigtrain.parallel.mesh import Ranks

OF_OWN, OF_ALL = 1e-5, 1e-7
"""A gradient may differ by this share of its own norm plus this share of the norm of all, in FP32: sums over ranks
round otherwise, and what is a small difference of large numbers (a key's bias, which no output depends on) has the
rounding of those, not its own."""
OF_NUMBERS = 1e-5
"""Relative, for losses and norms in FP32."""
UPDATES = 3
OF_UPDATE = 5e-3
"""Of the change of a weight in `UPDATES` real steps; without its weight decay of 1.0 one is off by 2e-2."""
OF_ROUNDING = 0.1
"""Of the change that Adam makes at most, added to it: a key's bias has a gradient of nothing but rounding."""
LR = 1e-3
ACCURACY = Measuring(frozenset({"accuracy"}))


_ADAMW = {"name": "adamw", "eps": 1e-6, "weight_decay": 1.0, "groups": [{"pattern": "*weight", "lr_scale": 0.5}]}


@dataclass(frozen=True)
class What:
    """What is trained. The batch has padding in its last sequences; sizes that nothing divides are the rule."""

    model: dict[str, Any]
    documents: bool = False
    context: int = 24
    vocabulary: int = 61
    batch: int = 7
    steps: int = 8
    seed: int = 5
    clip: float | None = 1.0
    frozen: tuple[str, ...] = ()
    optimizer: dict[str, Any] = field(default_factory=lambda: dict(_ADAMW))
    """The section `optimizer`. A larger eps than usual: where a gradient is nothing but rounding, Adam would make steps
    of its sign. A large weight decay and two learning rates: a layout that ignores one shows in the updated weights."""
    precision: Precision = "fp32"
    plugin: str | None = None
    """The user's own code, as `--plugin` names it."""
    sources: int = 0
    """Sources of a mixture that the sequences come from in turn; 0: batches do not say."""


_LLAMA = {"arch": "llama", "layers": 2, "width": 32, "heads": 8, "kv_heads": 4, "mlp_width": 56}
_GPT2 = {"arch": "gpt2", "layers": 2, "width": 32, "heads": 4}
MODELS = {
    "llama-gqa-tied-qk-norm-documents": What(
        {**_LLAMA, "tied": True, "qk_norm": True, "dropout": 0.1}, documents=True, sources=3
    ),
    "llama-untied-dropout": What({**_LLAMA, "dropout": 0.1}, sources=3),
    "gpt2-dropout": What({**_GPT2, "dropout": 0.1}, sources=3),
}
"""Small models that have between them what layouts get wrong."""


@dataclass(frozen=True)
class How:
    """How it is run."""

    ranks: int = 1
    layout: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    """The section `engine`; fsdp where it has no name."""
    micro_size: int | None = 2


@dataclass(frozen=True)
class Deviations:
    """How far a layout is from one process."""

    same_start: bool
    """Whether the initial weights are equal to the bit."""
    gradients: dict[str, float]
    """By parameter, the largest over the steps: norm of the difference over what is allowed."""
    relative_gradients: dict[str, float]
    """The same over the parameter's own norm."""
    losses: list[float]
    source_losses: list[float]
    """The worst of a mixture's sources."""
    metrics: list[float]
    """The worst of those that were recorded by name, or infinite where names differ."""
    norms: list[float]
    weights: list[float]
    """Relative, of each compared step."""
    free_losses: list[float]
    """Relative, of each step of a run of its own."""
    evaluation: float
    """Relative, of the held-out loss and accuracy at the start: the larger one."""
    updates: dict[str, float] = field(default_factory=dict)
    """By parameter, after `UPDATES` steps of the run of its own: norm of the difference over that of the change."""

    def faults(self) -> list[str]:
        """What is further away than allowed in FP32, in words."""
        found = [] if self.same_start else ["the initial weights differ"]
        found += [
            f"gradient of {name}: {by:.3g} times what is allowed" for name, by in self.gradients.items() if not by <= 1
        ]
        for kind in ("losses", "source_losses", "metrics", "norms", "weights", "free_losses"):
            values = getattr(self, kind)
            if not max(values) <= OF_NUMBERS:
                found.append(f"{kind}: {max(values):.3g} at step {values.index(max(values))}")
        if not self.evaluation <= OF_NUMBERS:
            found.append(f"evaluation: {self.evaluation:.3g}")
        wrong = {name: by for name, by in self.updates.items() if not by <= OF_UPDATE}
        return found + [f"update of {name}: off by {by:.3g} of the change" for name, by in wrong.items()]


def build(what: What, how: How) -> Any:
    """The engine of this rank, as a run builds it."""
    layout = LayoutConfig(**how.layout, micro_size=how.micro_size)
    model = section(what)
    layout.check(model, what.vocabulary)
    engine = ENGINES.read(how.engine)
    optimizer = OPTIMIZERS.read({"lr": LR, "clip": what.clip, "frozen": what.frozen, **what.optimizer})
    check_support(
        engine,
        model.arch,
        layout,
        document_mask=what.documents,
        optimizer=optimizer,
        precision=what.precision,
        frozen=model.frozen,
    )
    return engine.build(
        model,
        what.vocabulary,
        optimizer,
        layout=layout,
        precision=what.precision,
        seed=what.seed,
        ranks=Ranks.from_environment(),
    )


def section(what: What) -> ModelConfig:
    """The section `model` of what is trained."""
    arch = what.model["arch"]
    if what.plugin:
        load_plugin(what.plugin)
    found = FAMILIES[arch]
    of_tokens = batch_kind(found).of_tokens
    return found(**what.model, **({"context": what.context} if of_tokens else {}))


def global_batch(what: What, step: int) -> MicroBatch:
    """The batch of a step: ragged padding and, where requested, several documents in each sequence."""
    rng = np.random.default_rng([what.seed, step])
    model = section(what) if what.model else ModelConfig(arch="any", context=what.context)
    batch = batch_kind(model).example_batch(model, what.vocabulary, what.batch, rng, what.documents)
    if what.sources:
        batch["sources"] = np.eye(what.sources, dtype=np.float32)[np.arange(what.batch) % what.sources]
    return batch


def micro_batches(what: What, how: How, step: int, rank: int, ranks: int) -> list[MicroBatch]:
    """The part of a data-parallel rank; fillers hold content that would show if it counted."""
    whole = global_batch(what, step)
    layout = LayoutConfig(**how.layout)
    shape = distribute(
        what.batch,
        ranks,
        how.micro_size or what.batch,
        least=layout.least_micro_batches,
        multiple=layout.micro_batch_multiple,
    )
    copies = -(-shape.per_rank * ranks // what.batch)
    filled = {name: np.concatenate([array] * copies) for name, array in whole.items()}
    filled["weights"][what.batch :] = 0
    slots, size = shape.slots(rank), shape.micro_batch
    firsts = range(slots.start, slots.stop, size)
    return [{name: array[first : first + size] for name, array in filled.items()} for first in firsts]


def record(what: What, directory: Path) -> list[StepNumbers]:
    """Run one process, the whole batch in one pass; write its gradients, the states before the steps and the last."""
    how = How(micro_size=None)
    engine = build(what, how)
    numbers, evaluation = [], engine.evaluate(iter([micro_batches(what, how, 0, 0, 1)]), ACCURACY)
    for step in range(what.steps):
        save_file(gather(engine.state()), directory / f"state-{step}.safetensors")
        found, gradients = compute(engine, what, how, step)
        save_file(gradients, directory / f"gradients-{step}.safetensors")
        numbers.append(found)
        update(engine)
    save_file(gather(engine.state()), directory / f"state-{what.steps}.safetensors")
    rows = [[n.loss, n.weight, n.gradient_norm, *(value for pair in n.sources for value in pair)] for n in numbers]
    facts = {"numbers": torch.tensor(rows, dtype=torch.float64)}
    facts["evaluation"] = torch.tensor([evaluation.mean_loss, _accuracy(evaluation)], dtype=torch.float64)
    for name in numbers[0].metrics:
        values = [n.metrics[name].result for n in numbers]
        facts[f"metric {name}"] = torch.tensor(values, dtype=torch.float64)
    save_file(facts, directory / "numbers.safetensors")
    return numbers


def deviations(what: What, how: How, directory: Path, plant: Callable[[Any], None] | None = None) -> Deviations:
    """Compare this rank's layout with what `record` has written. Collective.

    Args:
        plant: Breaks the engine, to see that the comparison finds it.
    """
    engine = build(what, how)
    if plant is not None:
        plant(engine)
    facts = load_file(directory / "numbers.safetensors")
    start = load_file(directory / "state-0.safetensors")
    same_start = all(torch.equal(value, start[name]) for name, value in gather(engine.state()).items())
    batch = micro_batches(what, how, 0, engine.data_parallel_rank, engine.data_parallel_size)
    held_out = engine.evaluate(iter([batch]), ACCURACY)
    loss, accuracy = facts["evaluation"].tolist()
    evaluation = max(_off(held_out.mean_loss or 0.0, loss), _off(1 + _accuracy(held_out), 1 + accuracy))
    free = []
    updates: dict[str, float] = {}
    for step in range(what.steps):
        batch = micro_batches(what, how, step, engine.data_parallel_rank, engine.data_parallel_size)
        free.append(_off(engine.train_step(step, batch, LR).read().loss, float(facts["numbers"][step, 0])))
        if step == UPDATES - 1:
            updates = _updates(gather(engine.state()), start, load_file(directory / f"state-{UPDATES}.safetensors"))
    allowed: dict[str, float] = {}
    relative: dict[str, float] = {}
    off: list[tuple[float, ...]] = []
    for step in range(what.steps):
        put(engine.state(), load_file(directory / f"state-{step}.safetensors"))
        if isinstance(engine, Reloaded):
            engine.state_loaded()
        numbers, gradients = compute(engine, what, how, step)
        forget(engine)
        expected = load_file(directory / f"gradients-{step}.safetensors")
        assert gradients.keys() == expected.keys()
        overall = math.sqrt(sum(float(tensor.norm()) ** 2 for tensor in expected.values()))
        for name, tensor in expected.items():
            difference, own = float((gradients[name] - tensor).norm()), float(tensor.norm())
            by = difference / (OF_OWN * own + OF_ALL * overall)
            allowed[name] = max(allowed.get(name, 0.0), by) if by == by else math.inf
            # At the first step a matrix of an adapter has no gradient at all: its other half is zero.
            relative[name] = max(
                relative.get(name, 0.0), difference / own if own else (math.inf if difference else 0.0)
            )
        found = (
            numbers.loss,
            numbers.weight,
            numbers.gradient_norm,
            *(one for pair in numbers.sources for one in pair),
        )
        away = [_off(own, other) for own, other in zip(found, facts["numbers"][step].tolist(), strict=True)]
        off.append((*away[:3], max(away[3:], default=0.0), _off_by_name(numbers, facts, step)))
    engine.close()
    losses, weights, norms, source_losses, metrics = (list(column) for column in zip(*off, strict=True))
    numbers_off = losses, source_losses, metrics, norms, weights
    return Deviations(same_start, allowed, relative, *numbers_off, free, evaluation, updates)


def compute(engine: Any, what: What, how: How, step: int) -> tuple[StepNumbers, dict[str, Tensor]]:
    """A step's numbers and whole gradients of the sum of losses, the weights untouched. Collective."""
    batch = micro_batches(what, how, step, engine.data_parallel_rank, engine.data_parallel_size)
    if not isinstance(engine, FSDPEngine):
        return _computed_by_deepspeed(engine, batch, what, step)
    sums = engine.backward(step, batch)
    gradients = {name: parameter.grad for name, parameter in engine.model.named_parameters()}
    whole = gather({name: gradient for name, gradient in gradients.items() if gradient is not None})
    numbers = engine.reduce_and_scale(sums, vote=0.0).read()
    return numbers, whole


def forget(engine: Any) -> None:
    """Start the next compared step without gradients; DeepSpeed does so itself, and with offload keeps the tensors."""
    if isinstance(engine, FSDPEngine):
        engine.optimizer.zero_grad()


def _computed_by_deepspeed(
    engine: Any, batch: list[MicroBatch], what: What, step: int
) -> tuple[StepNumbers, dict[str, Tensor]]:
    """DeepSpeed gives gradients up only to its optimizer: what that gets, unscaled, in a step of length zero.

    The optimizer's own state goes on: each compared step begins with `put`.
    """
    used: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        # Copies, since in BF16 DeepSpeed fills with zeros what it has used.
        used.update({name: _copy(gradient) for name, gradient in engine.gradients().items()})

    watch = engine.optimizer.register_step_pre_hook(keep)
    numbers = engine.train_step(step, batch, lr=0.0).read()
    watch.remove()
    clipped = 1.0 if what.clip is None else min(1.0, what.clip / numbers.gradient_norm)
    return numbers, {name: tensor * (numbers.weight / clipped) for name, tensor in gather(used).items()}


def update(engine: FSDPEngine) -> None:
    """What `train_step` does after `compute`."""
    for group in engine.optimizer.param_groups:
        group["lr"] = LR * group["lr_scale"]
    engine.optimizer.step()
    engine.optimizer.zero_grad()


def _copy(value: Tensor) -> Tensor:
    if isinstance(value, FlatPart):
        return FlatPart(value.local.clone(), value.begin, value.shape, value.box, value.written)
    return value.clone()


def gather(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of whole tensors, those of other stages too; NaN where the copies of two ranks differ. Collective."""
    own = {name: _pieces(value) for name, value in state.items()}
    ranks: list[Any] = [own]
    if dist.is_initialized() and dist.get_world_size() > 1:
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
    whole: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for held in ranks:
        for name, (shape, pieces) in held.items():
            for offset, piece in pieces:
                full = whole.setdefault(name, piece.new_zeros(shape))
                known = seen.setdefault(name, torch.zeros(shape, dtype=torch.bool))
                box = _box(offset, piece.shape)
                # What is equal to nothing shows in every comparison.
                differs = known[box] & (full[box] != piece)
                full[box] = torch.where(differs, math.nan, piece)
                known[box] = True
    return whole


def _pieces(value: Tensor) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], Tensor]]]:
    """The shape of the full tensor, and the pieces that this rank holds, each with its offset."""
    shape = tuple(value.shape)
    if isinstance(value, FlatPart):
        return shape, [(offset, piece) for (offset, _), piece in value.pieces()]
    if not isinstance(value, DTensor):
        return shape, [((0,) * len(shape), value.detach())]
    if any(placement.is_partial() for placement in value.placements):
        return shape, [((0,) * len(shape), value.full_tensor().detach())]
    # No collective for each tensor: `gather` puts the pieces together in one.
    _, at = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    return shape, [(tuple(at), value.to_local().detach())]


def put(state: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    """Fill tensors of any layout, in place, from whole ones; a stage has a part of them."""
    assert state.keys() <= whole.keys()
    with torch.no_grad():
        for name, value in state.items():
            if isinstance(value, FlatPart):
                for (offset, sizes), piece in value.pieces():
                    piece.copy_(whole[name][_box(offset, sizes)])
            elif isinstance(value, DTensor):
                shape, at = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
                value.to_local().copy_(whole[name][_box(at, shape)])
            else:
                value.copy_(whole[name])


def _box(offset: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(offset, sizes, strict=True))


def _updates(state: dict[str, Tensor], start: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """How far each updated weight is from the expected one, over how far that has moved.

    Weights are skipped if their gradient may differ by more than `OF_UPDATE` of itself (`OF_ALL`): Adam makes full
    steps of what is rounding.
    """
    squares = {name: float(value.double().sum()) for name, value in expected.items() if name.endswith(".exp_avg_sq")}
    rounding = (OF_ALL / OF_UPDATE) ** 2 * sum(squares.values())
    found = {}
    for name in (name for name in expected if name.startswith("model.")):
        if squares.get(f"optimizer.{name.removeprefix('model.')}.exp_avg_sq", math.inf) <= rounding:
            continue
        change = float((expected[name].double() - start[name].double()).norm())
        away = float((state[name].double() - expected[name].double()).norm())
        most = UPDATES * LR * math.sqrt(expected[name].numel())
        found[name.removeprefix("model.")] = away / (change + OF_ROUNDING * most) if away == away else math.inf
    return found


def _off_by_name(numbers: StepNumbers, facts: dict[str, Tensor], step: int) -> float:
    """The worst of a step's named metrics."""
    known = {name.removeprefix("metric ") for name in facts if name.startswith("metric ")}
    if numbers.metrics.keys() != known:
        return math.inf
    results = {name: value.result for name, value in numbers.metrics.items()}
    pairs = [(value, float(facts[f"metric {name}"][step])) for name, value in results.items()]
    return max((math.inf if value is None else _off(value, expected) for value, expected in pairs), default=0.0)


def _accuracy(totals: Totals) -> float:
    """Of an evaluation; 0 of a model that records none."""
    found = totals.metrics.get("accuracy")
    return 0.0 if found is None or found.result is None else found.result


def _off(value: float, expected: float) -> float:
    by = abs(value / expected - 1) if expected else (math.inf if value else 0.0)
    return by if by == by else math.inf
