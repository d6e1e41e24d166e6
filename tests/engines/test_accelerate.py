"""The accelerate engine computes what plain transformers and torch compute, by each strategy, and resumes exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from bigtrain.checkpoint.config import CheckpointConfig
from bigtrain.checkpoint.flat import FlatPart
from bigtrain.checkpoint.loader import find, load_found
from bigtrain.checkpoint.saver import Saver
from bigtrain.config import UserError
from bigtrain.data.loader import distribute
from bigtrain.engines.accelerate.config import AccelerateConfig
from bigtrain.engines.accelerate.engine import AccelerateEngine
from bigtrain.engines.config import ENGINES, Precision
from bigtrain.engines.contract import MicroBatch
from bigtrain.engines.support import check_support
from bigtrain.models.families.hf import Config
from bigtrain.optim.optimizers.adamw import AdamWConfig
from bigtrain.parallel.config import LayoutConfig
from bigtrain.parallel.mesh import Ranks
from bigtrain.testing.equivalence import put as fill_from_whole
from bigtrain.testing.ranks import RankError, RankPool
from tests.models.tiny_hf import CONTEXT, MASK_TOKEN, TASKS, VOCABULARY, config_of

BATCH = 7
"""It is not divisible by the number of ranks: there are fillers."""
STEPS = 3
COMPARED = 8

OF_OWN, OF_ALL = 1e-5, 1e-7
"""A gradient may differ by this share of its own norm plus this share of the norm of all."""
OF_NUMBERS = 1e-5

STRATEGIES = ("ddp", "fsdp2", "zero2")


@dataclass(frozen=True)
class Case:
    """A model, how it is run, and the settings of its steps."""

    path: Path
    strategy: Any = "ddp"
    precision: Precision = "fp32"
    micro_size: int | None = 2
    clip: float | None = 0.5
    steps: int = STEPS

    @property
    def config(self) -> Config:
        return config_of(self.path)


@dataclass
class Measured:
    """What a case gives on one rank; whole tensors on rank 0 alone."""

    numbers: list[tuple[float, float, float]]
    votes: list[float]
    evaluation: tuple[float, float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def global_batch(step: int) -> MicroBatch:
    rng = np.random.default_rng([3, step])
    batch = {
        "tokens": rng.integers(0, VOCABULARY, (BATCH, CONTEXT)),
        "targets": rng.integers(0, VOCABULARY, (BATCH, CONTEXT)),
        "weights": np.ones((BATCH, CONTEXT), np.float32),
        "keys": rng.integers(0, 2**62, BATCH),
    }
    batch["targets"][:, :-1] = batch["tokens"][:, 1:]
    batch["weights"][-1, 11:] = 0
    return batch


def micro_batches(case: Case, step: int, rank: int, ranks: int) -> list[MicroBatch]:
    """A rank's part; the content of fillers is as good as any other, so that counting it would show."""
    whole_batch, shape = global_batch(step), distribute(BATCH, ranks, case.micro_size or BATCH)
    missing = shape.per_rank * ranks - BATCH
    filled = {name: np.concatenate([array, array[:missing]]) for name, array in whole_batch.items()}
    filled["weights"][BATCH:] = 0
    slots, size = shape.slots(rank), shape.micro_batch
    firsts = range(slots.start, slots.stop, size)
    return [{name: array[first : first + size] for name, array in filled.items()} for first in firsts]


def build(case: Case) -> Any:
    return AccelerateConfig(strategy=case.strategy).build(
        case.config,
        VOCABULARY,
        AdamWConfig(lr=1e-3, clip=case.clip, eps=1e-6),
        layout=LayoutConfig(micro_size=case.micro_size),
        precision=case.precision,
        seed=5,
        ranks=Ranks.from_environment(),
    )


def whole(tensor: Tensor) -> Tensor:
    if isinstance(tensor, FlatPart):
        full = torch.zeros(tensor.shape)
        full.view(-1)[tensor.begin : tensor.begin + tensor.local.numel()] = tensor.local
        dist.all_reduce(full)
        return full
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def whole_state(engine: AccelerateEngine) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in engine.state().items()}


def measure(case: Case, fault: str = "") -> Measured:
    """`case.steps` steps with an evaluation before each, and the gradients of the first."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    plant(fault)
    engine = build(case)
    numbers, votes, gradients, evaluation = [], [], {}, (0.0, 0.0)
    step_of_strategy = engine.strategy.step

    def keep_and_step() -> None:
        gradients.update(engine.strategy.whole_gradients())
        step_of_strategy()
        engine.strategy.step = step_of_strategy

    engine.strategy.step = keep_and_step
    for step in range(case.steps):
        batch = micro_batches(case, step, rank, ranks)
        evaluation = engine.evaluate(iter([batch, batch])).sums
        result = engine.train_step(step, batch, lr=1e-2, vote=2.0**rank).read()
        numbers.append((result.loss, result.weight, result.gradient_norm))
        votes.append(result.votes)
    state = whole_state(engine)
    engine.close()
    return Measured(numbers, votes, evaluation, gradients if rank == 0 else {}, state if rank == 0 else {})


def plant(fault: str) -> None:
    """Have Accelerate fall back without a word, as it does by itself on a CPU."""
    import accelerate

    if fault == "unwrapped":
        accelerate.Accelerator.prepare = lambda self, model, optimizer: (model, optimizer)
    elif fault == "ddp":
        prepare = accelerate.Accelerator.prepare

        def fall_back(self: Any, *given: Any) -> Any:
            self.state.distributed_type = accelerate.utils.DistributedType.MULTI_CPU
            return prepare(self, *given)

        accelerate.Accelerator.prepare = fall_back


def plain_loop(case: Case) -> Measured:
    """transformers and torch alone, without a line of bigtrain but the tasks' definitions, written once more."""
    import transformers as hf

    kind = TASKS[case.path.name]
    classes = {
        "causal": hf.AutoModelForCausalLM,
        "masked": hf.AutoModelForMaskedLM,
        "seq2seq": hf.AutoModelForSeq2SeqLM,
    }
    model = classes[kind].from_pretrained(case.path, dtype=torch.float32).eval()  # eval: no dropout
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": AdamWConfig().weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=AdamWConfig().betas, eps=1e-6)
    numbers, gradients, evaluation = [], {}, (0.0, 0.0)
    for step in range(case.steps):
        batch = {name: torch.from_numpy(array) for name, array in global_batch(step).items()}
        loss, weight = plain_loss(model, kind, batch)
        evaluation = (2 * float(loss.detach()), 2 * float(weight))
        optimizer.zero_grad()
        (loss / weight).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip or float("inf"))
        if step == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        optimizer.step()
        numbers.append((float(loss.detach()), float(weight), float(norm)))
    weights = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    return Measured(numbers, [], evaluation, gradients, weights)


def plain_loss(model: Any, kind: str, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    tokens, targets, weights = batch["tokens"], batch["targets"], batch["weights"]
    if kind == "causal":
        logits = model(input_ids=tokens).logits
    elif kind == "masked":
        from bigtrain.models.random import keep_mask

        shown = keep_mask(torch.Size([*tokens.shape, 1]), 0.3, batch["keys"], 1).squeeze(-1)
        real = torch.cat([torch.ones(BATCH, 1), weights[:, :-1]], 1)
        logits = model(input_ids=tokens.masked_fill(~shown, MASK_TOKEN), attention_mask=real.long()).logits
        targets, weights = tokens, real * ~shown
    else:
        half = CONTEXT // 2
        targets, weights = targets[:, half - 1 :], weights[:, half - 1 :]
        started = torch.cat([torch.zeros(BATCH, 1, dtype=torch.int64), targets[:, :-1]], 1)
        logits = model(input_ids=tokens[:, :half], decoder_input_ids=started).logits
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return (losses * weights).sum(), weights.sum()


def norm_of(tensors: dict[str, Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors.values()]).norm())


def worst_error(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference over what is allowed in FP32."""
    assert tensors.keys() == expected.keys()
    overall = norm_of(expected)
    return max(
        float((tensors[name] - tensor).norm()) / (OF_OWN * float(tensor.norm()) + OF_ALL * overall)
        for name, tensor in expected.items()
    )


def assert_same(measured: Measured, expected: Measured) -> None:
    assert worst_error(measured.gradients, expected.gradients) <= 1
    for mine, other in zip(measured.numbers, expected.numbers, strict=True):
        assert mine == pytest.approx(other, rel=OF_NUMBERS)
    assert measured.evaluation == pytest.approx(expected.evaluation, rel=OF_NUMBERS)


IN_ONE_PROCESS = [pytest.param(kind, marks=[] if kind == "bert" else pytest.mark.exhaustive) for kind in TASKS]
OVER_RANKS = [
    pytest.param(kind, marks=pytest.mark.slow if kind == "llama" else pytest.mark.exhaustive) for kind in TASKS
]


@pytest.mark.parametrize("kind", IN_ONE_PROCESS)
def test_one_process_computes_what_plain_transformers_and_torch_compute(
    ranks: RankPool, models: Callable[[str], Path], kind: str
) -> None:
    case = Case(models(kind))
    measured = ranks.run(measure, case, ranks=1)[0]
    expected = plain_loop(case)
    assert_same(measured, expected)
    weights = {name: measured.weights[name] for name in expected.weights}
    # Adam turns what rounding leaves of a gradient that is zero into a step, so the weights are compared as one.
    assert norm_of({name: weights[name] - expected.weights[name] for name in weights}) < 1e-4 * norm_of(weights)


SHARED = [("ddp", "bert"), ("fsdp2", "t5"), pytest.param("zero2", "qwen3", marks=pytest.mark.slow)]
"""Each strategy, and each task: masked, from a sequence to another, causal. All fifteen take eight steps below."""


@pytest.mark.parametrize(("strategy", "kind"), SHARED)
def test_two_ranks_compute_what_one_process_computes(
    ranks: RankPool, models: Callable[[str], Path], strategy: str, kind: str
) -> None:
    case = Case(models(kind), strategy)
    measured = ranks.run(measure, case, ranks=2)
    alone = ranks.run(measure, replace(case, micro_size=None), ranks=1)[0]
    assert_same(measured[0], alone)
    assert measured[0].weights.keys() == alone.weights.keys()
    assert (measured[1].numbers, measured[1].evaluation) == (measured[0].numbers, measured[0].evaluation)
    assert measured[0].votes == [3.0] * STEPS


@dataclass
class Step:
    """A step of `follow` on rank 0."""

    before: dict[str, Tensor]
    evaluation: tuple[float, float]
    numbers: tuple[float, float, float]
    gradients: dict[str, Tensor]


def put(state: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Fill an engine's state from whole tensors."""
    assert state.keys() == values.keys()
    for name, tensor in state.items():
        if isinstance(tensor, FlatPart):
            part = slice(tensor.begin, tensor.begin + tensor.local.numel())
            tensor.local.copy_(values[name].reshape(-1)[part])
        else:
            fill_from_whole({name: tensor}, {name: values[name]})


def follow(case: Case, befores: list[dict[str, Tensor]] | None) -> list[Step]:
    """COMPARED steps: each from the state before it that is given, or else one after the other."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    engine, found = build(case), []
    step_of_strategy = engine.strategy.step
    gradients: dict[str, Tensor] = {}

    def keep_and_step() -> None:
        gradients.update(engine.strategy.whole_gradients())
        step_of_strategy()

    engine.strategy.step = keep_and_step
    for step in range(COMPARED):
        if befores is not None:
            put(engine.state(), befores[step])
            engine.state_loaded()
        before, batch = whole_state(engine), micro_batches(case, step, rank, ranks)
        evaluation = engine.evaluate(iter([batch])).sums
        numbers = engine.train_step(step, batch, lr=1e-3).read()
        found.append(Step(before, evaluation, (numbers.loss, numbers.weight, numbers.gradient_norm), dict(gradients)))
    engine.close()
    return found if rank == 0 else []


@pytest.fixture(scope="module")
def followed_alone(ranks: RankPool) -> Callable[[Case], list[Step]]:
    """What `follow` finds in one process, where no strategy is at work: each model and precision once."""
    known: dict[Case, list[Step]] = {}

    def run(case: Case) -> list[Step]:
        single = replace(case, strategy="ddp", micro_size=None)
        if single not in known:
            known[single] = ranks.run(follow, single, None, ranks=1)[0]
        return known[single]

    return run


@pytest.mark.parametrize("kind", OVER_RANKS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_eight_steps_from_the_same_weights_and_eight_of_its_own_are_those_of_one_process(
    ranks: RankPool,
    models: Callable[[str], Path],
    followed_alone: Callable[[Case], list[Step]],
    strategy: str,
    kind: str,
) -> None:
    case = Case(models(kind), strategy)
    alone = followed_alone(case)
    compared = ranks.run(follow, case, [step.before for step in alone], ranks=2)[0]
    for mine, expected in zip(compared, alone, strict=True):
        assert all(torch.equal(mine.before[name], tensor) for name, tensor in expected.before.items())
        assert worst_error(mine.gradients, expected.gradients) <= 1
        assert mine.numbers == pytest.approx(expected.numbers, rel=OF_NUMBERS)
        assert mine.evaluation == pytest.approx(expected.evaluation, rel=OF_NUMBERS)
    free = ranks.run(follow, case, None, ranks=2)[0]
    losses, expected_losses = ([step.numbers[0] for step in found] for found in (free, alone))
    assert losses == pytest.approx(expected_losses, rel=OF_NUMBERS)


def save_and_go_on(case: Case, directory: Path, load_into: Case | None) -> list[Any]:
    """Two steps and a save, two more; and, from the save, the two again in a new engine, of another strategy maybe."""
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def steps(engine: AccelerateEngine, which: range) -> list[Any]:
        found = [engine.train_step(step, micro_batches(case, step, rank, ranks), lr=1e-2).read() for step in which]
        return [(numbers.loss, numbers.gradient_norm) for numbers in found]

    if load_into is None:
        engine = build(case)
        steps(engine, range(2))
        saver = Saver(directory, CheckpointConfig(asynchronous=False))
        saver.save(2, engine.state(), progress={}, config_hash="", identity="")
        saver.close()
        saved = whole_state(engine)
        numbers = steps(engine, range(2, 4))
    else:
        engine = build(load_into)
        found = find(directory)
        assert found is not None
        state = engine.state()
        load_found(found, state)
        engine.state_loaded()
        saved = whole_state(engine)
        numbers = steps(engine, range(2, 4))
    after = whole_state(engine)
    engine.close()
    return [numbers, saved, after] if rank == 0 else [numbers, {}, {}]


RESUMED = [
    ("gpt2", "fp32"),
    pytest.param("bert", "fp32", marks=pytest.mark.slow),
    pytest.param("t5", "bf16", marks=pytest.mark.exhaustive),
]
"""Each task, each precision; of all that a checkpoint holds, an architecture changes the names alone."""


@pytest.mark.parametrize(("kind", "precision"), RESUMED)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(
    ranks: RankPool, models: Callable[[str], Path], tmp_path: Path, strategy: str, kind: str, precision: Precision
) -> None:
    case = Case(models(kind), strategy, precision)
    before = ranks.run(save_and_go_on, case, tmp_path, None, ranks=2)[0]
    again = ranks.run(save_and_go_on, case, tmp_path, case, ranks=2)[0]
    assert again[0] == before[0]
    for mine, stored in zip(again[1:], before[1:], strict=True):
        assert mine.keys() == stored.keys()
        assert all(torch.equal(mine[name], stored[name]) for name in mine)
    steps = [tensor for name, tensor in before[1].items() if name.endswith(".step")]
    assert steps
    assert all(float(step) == 2 for step in steps)


MOVES = [("ddp", "zero2"), ("zero2", "fsdp2"), ("fsdp2", "ddp")]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), MOVES)
def test_a_run_moves_between_strategies(
    ranks: RankPool, models: Callable[[str], Path], tmp_path: Path, source: str, target: str
) -> None:
    case = Case(models("qwen3"), source)
    before = ranks.run(save_and_go_on, case, tmp_path, None, ranks=2)[0]
    moved = ranks.run(save_and_go_on, case, tmp_path, replace(case, strategy=target), ranks=2)[0]
    assert moved[1].keys() == before[1].keys()
    assert all(torch.equal(moved[1][name], before[1][name]) for name in before[1])
    assert np.allclose(moved[0], before[0], rtol=OF_NUMBERS, atol=0)


@pytest.mark.parametrize(
    ("strategy", "fault", "says"),
    [
        ("fsdp2", "ddp", "configured for fsdp2, but built a model that is DistributedDataParallel"),
        pytest.param("ddp", "unwrapped", "configured for ddp", marks=pytest.mark.slow),
        pytest.param("zero2", "unwrapped", "configured for zero2", marks=pytest.mark.slow),
    ],
)
def test_an_engine_silently_replaced_is_refused(
    ranks: RankPool, models: Callable[[str], Path], strategy: str, fault: str, says: str
) -> None:
    with pytest.raises(RankError, match=says):
        ranks.run(measure, Case(models("gpt2"), strategy), fault, ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_stays_close_to_fp32(ranks: RankPool, models: Callable[[str], Path], strategy: str) -> None:
    case = Case(models("llama"), strategy)
    exact = ranks.run(measure, case, ranks=2)[0]
    rounded = ranks.run(measure, replace(case, precision="bf16"), ranks=2)[0]
    assert {tensor.dtype for tensor in rounded.weights.values()} == {torch.float32}
    losses, expected = ([numbers[0] for numbers in found.numbers] for found in (rounded, exact))
    assert losses != expected
    assert np.allclose(losses, expected, rtol=5e-3)
    difference = {name: rounded.gradients[name] - exact.gradients[name] for name in exact.gradients}
    assert norm_of(difference) < 0.03 * norm_of(exact.gradients)


def deviations(steps: list[Step], expected: list[Step]) -> tuple[float, float, float]:
    """The largest relative deviations of a parameter's gradient, of losses and of norms.

    Gradients below a thousandth of all are skipped: that of a key's bias is zero but for rounding.
    """
    gradient = loss = norm = 0.0
    for mine, other in zip(steps, expected, strict=True):
        least = 1e-3 * norm_of(other.gradients)
        for name, tensor in other.gradients.items():
            if float(tensor.norm()) >= least:
                gradient = max(gradient, float((mine.gradients[name] - tensor).norm() / tensor.norm()))
        loss = max(loss, abs(mine.numbers[0] / other.numbers[0] - 1))
        norm = max(norm, abs(mine.numbers[2] / other.numbers[2] - 1))
    return gradient, loss, norm


BF16_BANDS = {"ddp": (3e-2, 5e-7, 6e-4), "zero2": (3e-2, 5e-7, 6e-4), "fsdp2": (0.4, 2e-3, 2.5e-2)}
"""In BF16, of a gradient, losses and norms: three times what tests/bench/results/bf16_bands.txt shows. FSDP2 gathers
norms and embeddings in BF16 too, so that the residual stream is rounded, most of all T5's."""


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["bert", "t5"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_stays_in_its_band(
    ranks: RankPool,
    models: Callable[[str], Path],
    followed_alone: Callable[[Case], list[Step]],
    strategy: str,
    kind: str,
) -> None:
    case = Case(models(kind), strategy, precision="bf16")
    alone = followed_alone(case)
    shared = ranks.run(follow, case, [step.before for step in alone], ranks=2)[0]
    for found, allowed in zip(deviations(shared, alone), BF16_BANDS[strategy], strict=True):
        assert found < allowed


@pytest.mark.parametrize(
    ("engine", "arch", "layout", "document_mask", "says"),
    [
        ("fsdp", "hf", {}, False, "does not run on the engine 'fsdp'"),
        ("accelerate", "llama", {}, False, "does not run on the engine 'accelerate'"),
        ("accelerate", "hf", {"dp_replicate": 2}, False, "only over layout.dp_shard"),
        ("accelerate", "hf", {}, True, "does not support a document mask"),
    ],
)
def test_what_does_not_go_together_is_refused(
    engine: str, arch: str, layout: dict[str, int], document_mask: bool, says: str
) -> None:
    section = ENGINES.read({"name": engine})
    check_support(AccelerateConfig(), "hf", LayoutConfig(), document_mask=False)
    with pytest.raises(UserError, match=says):
        check_support(section, arch, LayoutConfig(**layout), document_mask=document_mask)


@pytest.mark.parametrize(
    ("strategy", "key", "says"),
    [("ddp", "bucket_cap", "bucket_cap_mb"), ("fsdp2", "fsdp_version", "Remove it"), ("zero2", "stage", "Remove it")],
)
def test_settings_passed_through_are_checked(strategy: Any, key: str, says: str) -> None:
    from bigtrain.engines.accelerate import strategies

    arguments = {name: getattr(strategies, f"_{name}_arguments") for name in STRATEGIES}[strategy]
    with pytest.raises(UserError) as caught:
        arguments({key: 1}, torch.float32)
    assert says in str(caught.value)


def train_past_a_bad_step(case: Case, by_hand: bool) -> tuple[dict[str, Tensor], list[float]]:
    """Train four steps: the first and third have an infinite gradient on the last rank, or are skipped by hand."""
    engine = build(case)
    right, skipped = engine.strategy.backward, []
    for step in range(4):
        if step % 2 == 0 and by_hand:
            continue
        if step % 2 == 0 and dist.get_rank() == dist.get_world_size() - 1:
            engine.strategy.backward = lambda loss, last: right(loss * math.inf, last)  # type: ignore[method-assign]
        batch = micro_batches(case, step, engine.data_parallel_rank, engine.data_parallel_size)
        skipped.append(engine.train_step(step, batch, 1e-3).read().skipped)
        engine.strategy.backward = right  # type: ignore[method-assign]
    state = whole_state(engine)
    engine.close()
    return state, skipped


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bad_gradient_on_one_rank_is_as_if_no_rank_had_taken_the_step(
    strategy: str, models: Callable[[str], Path], ranks: RankPool
) -> None:
    case = Case(models("llama"), strategy)
    expected, _ = ranks.run(train_past_a_bad_step, case, True, ranks=2)[0]
    for state, skipped in ranks.run(train_past_a_bad_step, case, False, ranks=2):
        assert skipped == [1, 0, 1, 0]
        assert not [name for name, value in state.items() if not torch.equal(value, expected[name])]
