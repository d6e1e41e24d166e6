"""Checks that a layout and an engine compute what one process computes: one recipe (`What`), two executions (`How`).

    expected = pool.run(record, what, directory, ranks=1)[0]                 # one process, the full batch in one pass
    found = pool.run(deviations, what, how, directory, ranks=how.ranks)      # one result per rank; all are equal
    assert not found[0].faults()

Each compared step starts from the recorded weights and optimizer state, because Adam amplifies rounding errors. A free
run from the same seed, which never loads recorded state, is compared as well.
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
"""Tolerance of a gradient in FP32: OF_OWN times its own norm plus OF_ALL times the norm of all gradients. Sums over
ranks round differently. The second term is for small differences of large values, such as the gradient of a key's bias,
on which no output depends."""
OF_NUMBERS = 1e-5
"""Relative tolerance of losses and norms in FP32."""
UPDATES = 3
OF_UPDATE = 5e-3
"""Tolerance of a weight after `UPDATES` steps of the free run, relative to its change. Without its weight decay of 1.0,
a weight is off by 2e-2."""
OF_ROUNDING = 0.1
"""Share of Adam's largest possible change that is added to that change, for gradients that are only rounding errors."""
LR = 1e-3
ACCURACY = Measuring(frozenset({"accuracy"}))


_ADAMW = {"name": "adamw", "eps": 1e-6, "weight_decay": 1.0, "groups": [{"pattern": "*weight", "lr_scale": 0.5}]}


@dataclass(frozen=True)
class What:
    """What is trained. The last sequences of a batch have padding, and most sizes do not divide evenly."""

    model: dict[str, Any]
    documents: bool = False
    context: int = 24
    vocabulary: int = 61
    batch: int = 7
    steps: int = 8
    seed: int = 5
    clip: Any = 1.0
    """The value of `optimizer.clip`."""
    frozen: tuple[str, ...] = ()
    optimizer: dict[str, Any] = field(default_factory=lambda: dict(_ADAMW))
    """The section `optimizer`. With a smaller eps, Adam would turn gradients that are rounding errors into full steps.
    If a layout ignores the large weight decay or the two learning rates, updated weights show it."""
    precision: Precision = "fp32"
    plugin: str | None = None
    """The user's own code, as `--plugin` names it."""
    sources: int = 0
    """Number of sources of a mixture, to which the sequences belong in turn; 0: batches have no array `sources`."""


_LLAMA = {"arch": "llama", "layers": 2, "width": 32, "heads": 8, "kv_heads": 4, "mlp_width": 56}
_GPT2 = {"arch": "gpt2", "layers": 2, "width": 32, "heads": 4}
MODELS = {
    "llama-gqa-tied-qk-norm-documents": What(
        {**_LLAMA, "tied": True, "qk_norm": True, "dropout": 0.1}, documents=True, sources=3
    ),
    "llama-untied-dropout": What({**_LLAMA, "dropout": 0.1}, sources=3),
    "gpt2-dropout": What({**_GPT2, "dropout": 0.1}, sources=3),
}
"""Small models that together have all features that a layout may get wrong."""


@dataclass(frozen=True)
class How:
    """The execution: world size, layout and engine."""

    ranks: int = 1
    layout: dict[str, Any] = field(default_factory=dict)
    """The section `layout` without `micro_size`."""
    engine: dict[str, Any] = field(default_factory=dict)
    """The section `engine`; fsdp if it has no name."""
    micro_size: int | None = 2
    """Largest micro-batch in sequences; None: the rank's full share of the batch."""


@dataclass(frozen=True)
class Deviations:
    """Differences between a layout and one process. Lists have one relative difference for each compared step."""

    same_start: bool
    """Whether the initial weights are bitwise equal."""
    gradients: dict[str, float]
    """By parameter, the largest over the steps: norm of the difference, divided by the tolerance."""
    relative_gradients: dict[str, float]
    """By parameter, the largest over the steps: norm of the difference, divided by the norm of the gradient."""
    losses: list[float]
    source_losses: list[float]
    """The largest difference among a mixture's sources."""
    metrics: list[float]
    """The largest difference among named metrics; infinite if the names differ."""
    norms: list[float]
    weights: list[float]
    """Differences of the sums of the batch's weights."""
    free_losses: list[float]
    """Differences of the losses in the steps of the free run."""
    evaluation: float
    """The larger relative difference of loss and accuracy in an evaluation before the first step."""
    updates: dict[str, float] = field(default_factory=dict)
    """By parameter, after `UPDATES` steps of the free run: norm of the difference, divided by that of the change."""

    def faults(self) -> list[str]:
        """Messages about differences that exceed the tolerances of FP32; empty if there are none."""
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
    """Build the engine of this rank as a run does. Collective."""
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
    """The section `model` of `what`, as its family's config."""
    arch = what.model["arch"]
    if what.plugin:
        load_plugin(what.plugin)
    found = FAMILIES[arch]
    of_tokens = batch_kind(found).of_tokens
    return found(**what.model, **({"context": what.context} if of_tokens else {}))


def global_batch(what: What, step: int) -> MicroBatch:
    """The global batch of a step: sequences with padding of different lengths and, if requested, several documents."""
    rng = np.random.default_rng([what.seed, step])
    model = section(what) if what.model else ModelConfig(arch="any", context=what.context)
    batch = batch_kind(model).example_batch(model, what.vocabulary, what.batch, rng, what.documents)
    if what.sources:
        batch["sources"] = np.eye(what.sources, dtype=np.float32)[np.arange(what.batch) % what.sources]
    return batch


def micro_batches(what: What, how: How, step: int, rank: int, ranks: int) -> list[MicroBatch]:
    """The micro-batches of one data-parallel rank.

    Padding sequences have weights of 0, but real content, so that results change if a layout counts them.
    """
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
    """Run all steps in one process, with the full batch in one pass, and record the results for `deviations`.

    Args:
        directory: Directory for gradients and results of each step, and for the states before each step and at the end.
    """
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
    """Compare this layout with what `record` has written. Collective.

    Args:
        plant: Function that breaks the engine, to test that the comparison finds the fault.
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
            # In the first step one of an adapter's two matrices has a gradient of zero, because the other one is zero.
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
    """A step's results, and the full gradients of the sum of losses; weights do not change. Collective."""
    batch = micro_batches(what, how, step, engine.data_parallel_rank, engine.data_parallel_size)
    if not isinstance(engine, FSDPEngine):
        return _computed_by_deepspeed(engine, batch, step)
    sums = engine.backward(step, batch)
    gradients = {name: parameter.grad for name, parameter in engine.model.named_parameters()}
    whole = gather({name: gradient for name, gradient in gradients.items() if gradient is not None})
    numbers = engine.reduce_and_scale(sums, vote=0.0).read()
    return numbers, whole


def forget(engine: Any) -> None:
    """Clear the gradients before the next compared step. DeepSpeed does so itself, and with offload keeps tensors."""
    if isinstance(engine, FSDPEngine):
        engine.optimizer.zero_grad()


def _computed_by_deepspeed(engine: Any, batch: list[MicroBatch], step: int) -> tuple[StepNumbers, dict[str, Tensor]]:
    """`compute` for DeepSpeed, which passes gradients only to its optimizer: a step with a learning rate of zero.

    The step changes the optimizer's state, but each compared step begins with `put`.
    """
    used: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        # Copies, because in BF16 DeepSpeed sets gradients to zero after their use.
        used.update({name: _copy(gradient) for name, gradient in engine.gradients().items()})

    watch = engine.optimizer.register_step_pre_hook(keep)
    # Before the engine's own hook, which scales and clips.
    engine.optimizer._optimizer_step_pre_hooks.move_to_end(watch.id, last=False)
    numbers = engine.train_step(step, batch, lr=0.0).read()
    watch.remove()
    return numbers, {name: tensor * engine.data_parallel_size for name, tensor in gather(used).items()}


def update(engine: FSDPEngine) -> None:
    """Run the part of `train_step` that follows `compute`: the optimizer's step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = LR * group["lr_scale"]
    engine.optimizer.step()
    engine.optimizer.zero_grad()


def _copy(value: Tensor) -> Tensor:
    if isinstance(value, FlatPart):
        return FlatPart(value.local.clone(), value.begin, value.shape, value.box, value.written)
    return value.clone()


def gather(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gather full tensors from all ranks, those of other stages too. Collective.

    Elements are NaN where the copies of two ranks differ.
    """
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
                # NaN is equal to nothing, so every comparison fails.
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
    # No collective is needed here: `gather` collects the pieces of all tensors in one.
    _, at = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    return shape, [(tuple(at), value.to_local().detach())]


def put(state: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    """Copy full tensors into tensors of any layout, in place. `whole` may have more names than this rank's `state`."""
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
    """By parameter, the norm of the difference from the expected weight, divided by that of the expected change.

    Weights are skipped if their gradient is so small that the tolerance `OF_ALL` exceeds `OF_UPDATE` of it. Adam may
    turn such rounding errors into full steps.
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
    """The largest relative difference among a step's named metrics; infinite if the names differ."""
    known = {name.removeprefix("metric ") for name in facts if name.startswith("metric ")}
    if numbers.metrics.keys() != known:
        return math.inf
    results = {name: value.result for name, value in numbers.metrics.items()}
    pairs = [(value, float(facts[f"metric {name}"][step])) for name, value in results.items()]
    return max((math.inf if value is None else _off(value, expected) for value, expected in pairs), default=0.0)


def _accuracy(totals: Totals) -> float:
    """Accuracy of an evaluation; 0 if the model does not record it."""
    found = totals.metrics.get("accuracy")
    return 0.0 if found is None or found.result is None else found.result


def _off(value: float, expected: float) -> float:
    by = abs(value / expected - 1) if expected else (math.inf if value else 0.0)
    return by if by == by else math.inf
