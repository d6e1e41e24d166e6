"""DeepSpeed's ZeRO computes what FSDP computes in one process, and checkpoints move between the two."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from bigtrain.checkpoint.config import CheckpointConfig
from bigtrain.checkpoint.flat import Box, FlatPart
from bigtrain.checkpoint.loader import load
from bigtrain.checkpoint.saver import Saver
from bigtrain.config import UserError
from bigtrain.data.loader import distribute
from bigtrain.engines.config import EngineConfig, Precision
from bigtrain.engines.contract import MicroBatch, Reloaded
from bigtrain.engines.deepspeed.config import DeepSpeedConfig
from bigtrain.engines.deepspeed.settings import check_passthrough, deepspeed_config
from bigtrain.engines.deepspeed.start import import_deepspeed
from bigtrain.engines.fsdp.config import FSDPConfig
from bigtrain.engines.fsdp.engine import FSDPEngine
from bigtrain.models.config import FAMILIES
from bigtrain.models.contract import LossSum
from bigtrain.models.sums import Sums
from bigtrain.optim.config import ParameterGroup
from bigtrain.optim.optimizers.adamw import AdamWConfig
from bigtrain.parallel.config import LayoutConfig
from bigtrain.parallel.mesh import Ranks
from bigtrain.testing.ranks import RankPool

VOCABULARY, CONTEXT, BATCH, SEED = 61, 24, 7, 5
"""Neither the vocabulary nor the batch is divided by a number of ranks."""
OF_OWN, OF_ALL, OF_NUMBERS = 1e-5, 1e-7, 1e-5
LR = 1e-3
"""Small beside the weights: Adam's first steps would turn the rounding of tiny gradients into steps of their own."""

LLAMA = {"arch": "llama", "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 56, "dropout": 0.1}
EVERYTHING_SPREAD = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


@dataclass(frozen=True)
class Case:
    """A model, an engine, and the settings of its steps."""

    engine: EngineConfig = field(default_factory=FSDPConfig)
    model: dict[str, Any] = field(default_factory=lambda: LLAMA)
    micro_size: int | None = 2
    clip: float | None = 1.0
    precision: Precision = "fp32"
    steps: int = 3
    documents: bool = False

    def alone(self) -> Case:
        """The same under FSDP's engine in one process, in one pass, without fillers."""
        return replace(self, engine=FSDPConfig(), micro_size=None)


def zero(stage: Any, **keys: Any) -> DeepSpeedConfig:
    return DeepSpeedConfig(zero=stage, passthrough=EVERYTHING_SPREAD if stage == 3 else {}, **keys)


def micro_batches(case: Case, step: int) -> list[MicroBatch]:
    """This rank's part of the step's batch, its last sequence padded; fillers would show if they counted."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rng = np.random.default_rng([SEED, step])
    shape = distribute(BATCH, ranks, case.micro_size or BATCH)
    missing = shape.per_rank * ranks - BATCH
    batch = {
        "tokens": rng.integers(0, VOCABULARY, (BATCH, CONTEXT)),
        "targets": rng.integers(0, VOCABULARY, (BATCH, CONTEXT)),
        "weights": np.ones((BATCH, CONTEXT), np.float32),
        "keys": rng.integers(0, 2**62, BATCH),
    }
    batch["weights"][-1, CONTEXT // 3 :] = 0
    if case.documents:
        halves = np.arange(CONTEXT) >= CONTEXT // 2
        batch["documents"] = np.broadcast_to(halves.astype(np.int32), (BATCH, CONTEXT))
        batch["positions"] = np.broadcast_to(np.arange(CONTEXT) - halves * (CONTEXT // 2), (BATCH, CONTEXT))
    batch = {name: np.concatenate([array, array[:missing]]) for name, array in batch.items()}
    batch["weights"][BATCH:] = 0
    slots, size = shape.slots(rank), shape.micro_batch
    firsts = range(slots.start, slots.stop, size)
    return [{name: array[first : first + size] for name, array in batch.items()} for first in firsts]


def build(case: Case) -> Any:
    groups = (ParameterGroup(pattern="embedding.*", lr_scale=0.5), ParameterGroup(pattern="*.mlp.*", weight_decay=0.3))
    return case.engine.build(
        FAMILIES[case.model["arch"]](**case.model, context=CONTEXT),
        VOCABULARY,
        AdamWConfig(lr=LR, clip=case.clip, eps=1e-6, groups=groups),
        layout=LayoutConfig(micro_size=case.micro_size),
        precision=case.precision,
        seed=SEED,
        ranks=Ranks.from_environment(),
    )


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, on every rank."""
    if isinstance(tensor, FlatPart):
        full = torch.zeros(tensor.shape, dtype=tensor.dtype)
        full.view(-1)[tensor.begin : tensor.begin + tensor.local.numel()] = tensor.local
        dist.all_reduce(full)
        return full
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def whole_state(engine: Any) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in engine.state().items()}


def first_gradients(engine: Any, batch: list[MicroBatch]) -> dict[str, Tensor]:
    """The gradient of the sum of losses, of each parameter; nothing of it is left in the engine."""
    engine.backward(0, batch)
    if isinstance(engine, FSDPEngine):
        gradients = {name: whole(parameter.grad) for name, parameter in engine.model.named_parameters()}
        engine.optimizer.zero_grad()
        return gradients
    from deepspeed.utils import safe_get_full_grad

    named = list(engine.model.named_parameters())
    gradients = {name: safe_get_full_grad(parameter).float() * dist.get_world_size() for name, parameter in named}
    before = {name: tensor.clone() for name, tensor in whole_state(engine).items()}
    # DeepSpeed gives gradients up only in a step: one without effect, undone to the bit.
    one = torch.ones(())
    sums = Sums(one.device)
    sums.add(LossSum(one, one), {})
    engine.update(sums, lr=0.0)
    for name, tensor in engine.state().items():
        part(tensor).copy_(matching(before[name], tensor))
    engine.state_loaded()
    return gradients


def part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor of the state."""
    if isinstance(tensor, FlatPart):
        return tensor.local
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def matching(full: Tensor, tensor: Tensor) -> Tensor:
    """The same part of the full tensor."""
    if isinstance(tensor, FlatPart):
        return full.view(-1)[tensor.begin : tensor.begin + tensor.local.numel()]
    return full


@dataclass
class Measured:
    """What a case gives, on one rank; whole tensors on rank 0 alone."""

    numbers: list[tuple[float, float, float]]
    evaluation: tuple[float, float]
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]
    votes: float


def measure(case: Case, undo_averaging: bool = True) -> Measured:
    """Gradients of the first step, `case.steps` steps, an evaluation before the last, and the state at the end."""
    engine = build(case)
    if not undo_averaging:
        engine.data_parallel_size = 1
    numbers, evaluation, votes, gradients = [], (0.0, 0.0), 0.0, {}
    for step in range(case.steps):
        batch = micro_batches(case, step)
        if step == case.steps - 1:
            evaluation = engine.evaluate(iter([batch, batch])).sums
        if step == 0:
            gradients = first_gradients(engine, batch)
        result = engine.train_step(step, batch, LR, vote=2.0 ** dist.get_rank()).read()
        numbers.append((result.loss, result.weight, result.gradient_norm))
        votes = result.votes
    state = whole_state(engine)
    first = dist.get_rank() == 0
    engine.close()
    return Measured(numbers, evaluation, gradients if first else {}, state if first else {}, votes)


def errors(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Norm of each difference over what is allowed in FP32."""
    assert tensors.keys() == expected.keys()
    overall = norm_of(expected)
    return {
        name: float((tensors[name] - tensor).norm()) / (OF_OWN * float(tensor.norm()) + OF_ALL * overall)
        for name, tensor in expected.items()
    }


def norm_of(tensors: dict[str, Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors.values()]).norm())


def weights_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith("model.")}


def assert_same(measured: Measured, expected: Measured) -> None:
    for tensors, wanted in (
        (measured.gradients, expected.gradients),
        (weights_of(measured.state), weights_of(expected.state)),
    ):
        found = errors(tensors, wanted)
        worst = max(found, key=lambda name: found[name])
        assert found[worst] <= 1, f"{worst}: {found[worst]:.3g} times what is allowed"
    assert measured.state.keys() == expected.state.keys()
    steps = {float(tensor) for name, tensor in measured.state.items() if name.endswith(".step")}
    assert steps == {float(len(measured.numbers))}
    for mine, other in zip(measured.numbers, expected.numbers, strict=True):
        assert mine == pytest.approx(other, rel=OF_NUMBERS)
    assert measured.evaluation == pytest.approx(expected.evaluation, rel=OF_NUMBERS)


ENGINES = [
    pytest.param(zero(0), id="zero 0"),
    pytest.param(zero(1), id="zero 1"),
    pytest.param(zero(2), id="zero 2"),
    pytest.param(zero(3), id="zero 3"),
    pytest.param(zero(1, offload="optimizer"), id="zero 1, offload"),
    pytest.param(zero(2, offload="optimizer"), id="zero 2, offload"),
    pytest.param(zero(3, offload="optimizer"), id="zero 3, offload"),
]


@pytest.mark.parametrize("engine", ENGINES)
def test_zero_computes_what_one_process_computes(
    ranks: RankPool, alone: Callable[[Case], Measured], engine: DeepSpeedConfig
) -> None:
    """An untied model with groups of parameters; tied ones are compared in tests/equivalence."""
    case = Case(engine)
    measured = ranks.run(measure, case, ranks=2)
    assert_same(measured[0], alone(case))
    assert (measured[1].numbers, measured[1].evaluation) == (measured[0].numbers, measured[0].evaluation)
    assert measured[0].votes == 3.0


@pytest.mark.parametrize(
    "engine", [pytest.param(zero(2), id="zero 2", marks=pytest.mark.slow), pytest.param(zero(3), id="zero 3")]
)
def test_clipping_follows_the_norm_over_all_ranks(
    ranks: RankPool, alone: Callable[[Case], Measured], engine: DeepSpeedConfig
) -> None:
    # In one pass too, while the others accumulate.
    case = Case(engine, clip=0.01, micro_size=None)
    assert_same(ranks.run(measure, case, ranks=2)[0], alone(case))
    moments = [alone(replace(case, clip=clip)).state["optimizer.norm.weight.exp_avg"] for clip in (0.01, 1.0)]
    assert float(moments[0].norm()) < 0.5 * float(moments[1].norm()), "the limit made no difference"


TOGETHER = [zero(stage, recompute="full", offload="optimizer" if stage else "none") for stage in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("engine", TOGETHER, ids=[f"zero {engine.zero}" for engine in TOGETHER])
@pytest.mark.parametrize("documents", [True])
def test_document_masks_recompute_and_offload_together_change_nothing(
    ranks: RankPool, alone: Callable[[Case], Measured], engine: DeepSpeedConfig, documents: bool
) -> None:
    case = Case(engine, documents=documents)
    assert_same(ranks.run(measure, case, ranks=2)[0], alone(case))


def test_one_process_under_zero_computes_the_same(ranks: RankPool, alone: Callable[[Case], Measured]) -> None:
    case = Case(zero(3))
    assert_same(ranks.run(measure, case, ranks=1)[0], alone(case))


BAND_GRADIENTS, BAND_NUMBERS = 6e-3, 5e-4
"""In BF16: of the norm of all gradients, and relative for losses and norms: three times what was seen."""


STAGES_IN_BF16 = [pytest.param(stage, marks=[] if stage == 3 else pytest.mark.slow) for stage in range(4)]


@pytest.mark.parametrize("stage", STAGES_IN_BF16)
def test_bf16_stays_in_the_band_of_one_process(ranks: RankPool, alone: Callable[[Case], Measured], stage: int) -> None:
    case = Case(zero(stage), precision="bf16")
    measured, expected = ranks.run(measure, case, ranks=2)[0], alone(case)
    apart = {name: measured.gradients[name] - tensor for name, tensor in expected.gradients.items()}
    assert norm_of(apart) <= BAND_GRADIENTS * norm_of(expected.gradients)
    for mine, other in zip(measured.numbers, expected.numbers, strict=True):
        assert mine == pytest.approx(other, rel=BAND_NUMBERS)
    masters = {name: tensor.dtype for name, tensor in measured.state.items()}
    assert set(masters.values()) == {torch.float32}


def held(case: Case) -> dict[str, tuple[int, int]]:
    """Bytes of this rank's part of each tensor of the state, and of the full tensor, after a step."""
    engine = build(case)
    engine.train_step(0, micro_batches(case, 0), LR)
    state = {name: tensor for name, tensor in engine.state().items() if not name.endswith(".step")}
    sizes = {name: (part(tensor).nbytes, tensor.shape.numel() * 4) for name, tensor in state.items()}
    stores = [part(tensor).untyped_storage() for tensor in state.values()]
    storages = {store.data_ptr(): store.nbytes() for store in stores}
    sizes["storage"] = (sum(storages.values()), sum(size for _, size in sizes.values()))
    sizes["weights"] = (sum(parameter.numel() for parameter in engine.model.parameters()), 0)
    engine.close()
    return sizes


@pytest.mark.parametrize("stage", range(4))
def test_a_rank_holds_what_the_stage_promises(ranks: RankPool, stage: int) -> None:
    parts = ranks.run(held, Case(zero(stage)), ranks=2)
    for name in set(parts[0]) - {"storage", "weights"}:
        (first, whole_bytes), (second, _) = parts[0][name], parts[1][name]
        assert first + second == (1 if stage else 2) * whole_bytes, name
    for sizes in parts:
        stored, everything = sizes["storage"]
        share = everything // 2 if stage else everything
        assert share <= stored <= share + 4 * 64 * 12, "more than the share and its padding"
        assert (sizes["weights"][0] == 0) == (stage == 3)


def save(case: Case, directory: str) -> tuple[dict[str, Tensor], list[float]]:
    """Three steps, a save, and the losses of the next three."""
    engine = build(case)
    for step in range(3):
        engine.train_step(step, micro_batches(case, step), LR)
    saver = Saver(Path(directory), CheckpointConfig(), may_publish=lambda: True)
    saver.save(3, engine.state(), progress={"step": 3}, config_hash="", identity="", mesh={}, lease=0)
    saver.close()
    state = whole_state(engine)
    losses = [engine.train_step(step, micro_batches(case, step), LR).read().loss for step in range(3, 6)]
    engine.close()
    return state, losses


def resume(case: Case, directory: str, refresh: bool = True) -> tuple[dict[str, Tensor], list[float]]:
    """The loaded state, and the losses of the three steps after it."""
    engine = build(case)
    load(Path(directory), 3, engine.state())
    if refresh and isinstance(engine, Reloaded):
        engine.state_loaded()
    state = whole_state(engine)
    losses = [engine.train_step(step, micro_batches(case, step), LR).read().loss for step in range(3, 6)]
    engine.close()
    return state, losses


MOVES = [
    pytest.param(zero(3), 2, FSDPConfig(), 1, id="zero 3 dp2 to fsdp 1"),
    pytest.param(FSDPConfig(), 1, zero(3), 2, id="fsdp 1 to zero 3 dp2"),
    pytest.param(FSDPConfig(), 2, zero(1), 3, id="fsdp 2 to zero 1 dp3", marks=pytest.mark.slow),
    pytest.param(
        zero(2, offload="optimizer"), 2, zero(3), 3, id="zero 2 dp2 offload to zero 3 dp3", marks=pytest.mark.slow
    ),
    pytest.param(zero(0), 2, zero(2), 2, id="zero 0 dp2 to zero 2 dp2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("before", "from_ranks", "after", "to_ranks"), MOVES)
def test_checkpoints_move_between_engines(
    ranks: RankPool, tmp_path: Path, before: EngineConfig, from_ranks: int, after: EngineConfig, to_ranks: int
) -> None:
    saved, losses = ranks.run(save, Case(before), str(tmp_path), ranks=from_ranks)[0]
    loaded, next_losses = ranks.run(resume, Case(after), str(tmp_path), ranks=to_ranks)[0]
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    assert {float(tensor) for name, tensor in loaded.items() if name.endswith(".step")} == {3.0}
    assert next_losses == pytest.approx(losses, rel=OF_NUMBERS)


def test_the_comparisons_see_an_average_and_stale_weights(
    ranks: RankPool, alone: Callable[[Case], Measured], tmp_path: Path
) -> None:
    case = Case(zero(2))
    with pytest.raises(AssertionError):
        assert_same(ranks.run(measure, case, False, ranks=2)[0], alone(case))
    _, losses = ranks.run(save, case, str(tmp_path), ranks=2)[0]
    _, stale = ranks.run(resume, case, str(tmp_path), False, ranks=2)[0]
    assert stale != pytest.approx(losses, rel=OF_NUMBERS)


@pytest.mark.parametrize("stage", STAGES_IN_BF16[1:])
def test_bf16_resumes_from_its_fp32_weights(ranks: RankPool, tmp_path: Path, stage: int) -> None:
    case = Case(zero(stage), precision="bf16")
    saved, losses = ranks.run(save, case, str(tmp_path), ranks=2)[0]
    loaded, next_losses = ranks.run(resume, case, str(tmp_path), ranks=2)[0]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    assert next_losses == losses


START = """
import sys, torch, numpy as np
from bigtrain.engines.deepspeed.config import DeepSpeedConfig
from bigtrain.models.config import FAMILIES
from bigtrain.optim.optimizers.adamw import AdamWConfig
from bigtrain.parallel.config import LayoutConfig
from bigtrain.parallel.mesh import Ranks
import bigtrain.engines.deepspeed.build as module
join = module.join_process_group
module.join_process_group = lambda *arguments: (print("joining", flush=True), join(*arguments))[1]
model = FAMILIES["gpt2"](arch="gpt2", layers=1, width=16, heads=2, context=8)
ranks = Ranks(0, 0, 1)
DeepSpeedConfig(zero=2).build(model, 11, AdamWConfig(),  layout=LayoutConfig(), precision="fp32", seed=1,
             ranks=ranks)
print("started", flush=True)
"""


@pytest.mark.slow
def test_a_kill_while_deepspeed_starts_leaves_nothing_that_the_next_start_waits_for(tmp_path: Path) -> None:
    extensions, binaries = tmp_path / "extensions", tmp_path / "bin"
    binaries.mkdir()
    # Without a compiler, and with the lock that a build of DeepSpeed's own leaves behind when it is killed.
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(extensions), "PATH": str(binaries), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    lock = extensions / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    command = [sys.executable, "-c", START]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        assert "joining" in iter(lambda: killed.stdout.readline().strip(), "")
        killed.kill()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stdout.split()[-1] == "started"
    assert list(extensions.rglob("*")) == [lock.parent, lock], "something was compiled"


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"gradient_clipping": 1.0}, "optimizer.clip"),
        ({"zero_optimization": {"stage": 1}}, "engine.zero"),
        ({"bf16": {"enabled": True}}, "precision"),
    ],
)
def test_keys_that_bigtrain_sets_are_refused_in_passthrough(keys: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        DeepSpeedConfig(passthrough=keys)


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"wall_clock_brakdown": True}, "wall_clock_breakdown"),
        ({"zero_optimization": {"reduce_buket_size": 5}}, "reduce_buket_size"),
        ({"zero_optimization": {"reduce_bucket_size": -5}}, "reduce_bucket_size"),
    ],
)
def test_passthrough_is_checked_by_deepspeed_itself(keys: dict[str, Any], what: str) -> None:
    device = torch.device("cpu")
    import_deepspeed(device)
    engine = DeepSpeedConfig(passthrough=keys)
    with pytest.raises(UserError, match=what) as refused:
        check_passthrough(deepspeed_config(engine, "fp32", device), keys)
    assert "passthrough" in str(refused.value)
    good = {"wall_clock_breakdown": False, "zero_optimization": {"reduce_bucket_size": 5}}
    check_passthrough(deepspeed_config(DeepSpeedConfig(passthrough=good), "fp32", device), good)


def test_impossible_engines_are_refused() -> None:
    with pytest.raises(ValueError, match="zero 1, 2 or 3"):
        DeepSpeedConfig(zero=0, offload="optimizer")


@pytest.mark.parametrize("shape", [(7,), (5, 3), (3, 2, 4)])
def test_a_run_of_elements_is_cut_into_rectangles_that_cover_it_once(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(int(np.prod(shape)), dtype=torch.float32)
    for begin in range(len(numbers) + 1):
        for end in range(begin, len(numbers) + 1):
            held = FlatPart(numbers[begin:end], begin, shape)
            found = []
            for (offset, sizes), piece in held.pieces():
                box = tuple(slice(at, at + size) for at, size in zip(offset, sizes, strict=True))
                assert torch.equal(numbers.view(shape)[box], piece)
                found += piece.flatten().tolist()
            assert found == numbers[begin:end].tolist()


def test_a_run_inside_a_box_is_cut_into_rectangles_of_the_whole() -> None:
    whole = torch.arange(6 * 5, dtype=torch.float32).view(6, 5)
    box = Box((2, 1), (3, 4))
    line = whole[2:5, 1:5].reshape(-1)
    for begin in range(13):
        for end in range(begin, 13):
            pieces = FlatPart(line[begin:end], begin, (6, 5), box).pieces()
            for (row, column), sizes in (rectangle for rectangle, _ in pieces):
                assert (row >= 2, column >= 1, row + sizes[0] <= 5, column + sizes[1] <= 5) == (True,) * 4
            values = [
                torch.equal(whole[at[0] : at[0] + size[0], at[1] : at[1] + size[1]], piece)
                for (at, size), piece in pieces
            ]
            assert all(values)
            assert sum(piece.numel() for _, piece in pieces) == end - begin
