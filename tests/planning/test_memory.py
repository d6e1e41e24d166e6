"""The planned memory of a rank equals what it allocates, to the byte."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigtrain.engines.config import ENGINES
from bigtrain.engines.contract import MicroBatch
from bigtrain.models.config import FAMILIES
from bigtrain.models.decoder_config import DecoderConfig
from bigtrain.parallel.config import LayoutConfig, Recompute
from bigtrain.planning.memory import Held, block_activation_bytes, held_bytes, passes_in_flight
from bigtrain.testing.equivalence import How, What, build, micro_batches
from bigtrain.testing.ranks import RankPool

VOCABULARY = 61
UNEVEN = {"arch": "llama", "layers": 2, "width": 30, "heads": 6, "head_width": 10, "kv_heads": 2, "mlp_width": 50}
EVEN = {"arch": "llama", "layers": 2, "width": 32, "heads": 8, "kv_heads": 4, "mlp_width": 56, "qk_norm": True}
GPT2 = {"arch": "gpt2", "layers": 2, "width": 32, "heads": 4, "dropout": 0.1}


def config(model: dict[str, Any], context: int = 24) -> DecoderConfig:
    built = FAMILIES[model["arch"]](**model, context=context)
    assert isinstance(built, DecoderConfig)
    return built


@pytest.mark.parametrize("model", [UNEVEN, EVEN, GPT2, {**EVEN, "tied": True}, {**GPT2, "norm": "rmsnorm"}])
def test_the_shapes_are_those_of_the_model(model: dict[str, Any]) -> None:
    with torch.device("meta"):
        built = config(model).build(VOCABULARY)
    shapes = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    assert list(config(model).parameter_shapes(VOCABULARY).items()) == list(shapes.items())


# States


def storage_bytes(tensors: list[Any]) -> int:
    """Of all that these tensors keep alive on this rank."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors if tensor is not None]
    stores = [tensor.untyped_storage() for tensor in local]
    return sum({store._cdata: store.nbytes() for store in stores}.values())


def after_a_step(what: What, how: How) -> tuple[Any, list[MicroBatch]]:
    """An engine, and the micro-batches of this rank."""
    running = build(what, how)
    batches = micro_batches(what, how, 0, running.data_parallel_rank, running.data_parallel_size)
    running.train_step(0, batches, 1e-3)
    return running, batches


def optimizer_bytes(running: Any) -> int:
    return storage_bytes([value for state in running.optimizer.state.values() for value in state.values()])


def allocated(what: What, how: How) -> Held:
    """After a step and the backward pass of the next."""
    running, batches = after_a_step(what, how)
    running.backward(1, batches)
    parameters = list(running.model.parameters())
    gradients = storage_bytes([parameter.grad for parameter in parameters])
    found = Held(storage_bytes(parameters), gradients, optimizer_bytes(running))
    running.close()
    return found


def promised(what: What, how: How) -> list[Held]:
    """Of each rank."""
    model = config(what.model, what.context)
    layout = LayoutConfig(**how.layout)
    engine: Any = ENGINES.read(how.engine)
    sizes = layout.mesh(how.ranks)
    return [
        held_bytes(
            model, VOCABULARY, engine=engine, sizes=sizes, layout=layout, rank=rank, precision=what.precision,
            frozen=what.frozen,
        )
        for rank in range(how.ranks)
    ]  # fmt: skip


TIED = {**EVEN, "tied": True}
FOUR = {"layers": 4}
ALL_GATHER = {"cp": 2, "cp_kind": "all_gather"}
INTERLEAVED = {"pp": 2, "pp_schedule": "interleaved", "pp_stages_per_rank": 2}
FSDP = [
    pytest.param(UNEVEN, 2, {}, id="dp2, uneven"),
    pytest.param(UNEVEN, 4, {}, id="dp4, uneven", marks=pytest.mark.exhaustive),
    pytest.param(UNEVEN, 4, {"dp_replicate": 2}, id="hsdp2x2, uneven", marks=pytest.mark.slow),
    pytest.param(TIED, 2, {"tp": 2}, id="tp2, tied", marks=pytest.mark.slow),
    pytest.param(GPT2, 2, {"tp": 2, "sequence_parallel": False}, id="tp2, biases", marks=pytest.mark.exhaustive),
    pytest.param(EVEN, 4, {"tp": 2}, id="tp2 x dp2"),
    pytest.param(UNEVEN, 2, {"cp": 2}, id="cp2 ulysses", marks=pytest.mark.slow),
    pytest.param(UNEVEN, 2, ALL_GATHER, id="cp2 all_gather", marks=pytest.mark.slow),
    pytest.param(UNEVEN, 4, {"cp": 2}, id="cp2 x dp2", marks=pytest.mark.exhaustive),
    pytest.param(EVEN, 4, {"cp": 2, "tp": 2}, id="cp2 x tp2", marks=pytest.mark.exhaustive),
    pytest.param(TIED | FOUR, 2, {"pp": 2}, id="pp2, tied"),
    pytest.param(GPT2 | FOUR, 2, {"pp": 2, "pp_split": (1, 3)}, id="pp2, explicit split", marks=pytest.mark.exhaustive),
    pytest.param(UNEVEN | FOUR, 2, INTERLEAVED, id="pp2 interleaved", marks=pytest.mark.slow),
    pytest.param(TIED | FOUR, 4, {"pp": 2, "tp": 2}, id="pp2 x tp2, tied", marks=pytest.mark.slow),
    pytest.param(UNEVEN | FOUR, 4, {"pp": 2}, id="pp2 x dp2", marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize(("model", "count", "layout"), FSDP)
def test_a_rank_of_fsdp_holds_what_the_sharding_promises(
    ranks: RankPool, model: dict[str, Any], count: int, layout: dict[str, Any]
) -> None:
    what, how = What(model), How(count, layout)
    found = ranks.run(allocated, what, how, ranks=count)
    assert found == promised(what, how)
    (whole,) = promised(what, How())
    assert whole.parameters == 4 * config(model).parameter_count(VOCABULARY)
    assert max(held.total for held in found) < 0.8 * whole.total


@pytest.mark.parametrize(("count", "layout"), [(2, {}), (4, {"tp": 2})])
def test_what_is_frozen_has_no_gradient_and_no_moments(ranks: RankPool, count: int, layout: dict[str, Any]) -> None:
    what, how = What(EVEN, frozen=("layers.0.*", "embedding.*", "layers.1.mlp.*")), How(count, layout)
    found = ranks.run(allocated, what, how, ranks=count)
    assert found == promised(what, how)
    assert 3 * max(held.gradients for held in found) < 2 * min(held.parameters for held in found)


def allocated_by_zero(what: What, how: How) -> Held:
    """As `allocated`; gradients by their numbers, since DeepSpeed keeps them inside larger buckets."""
    running, batches = after_a_step(what, how)
    zero, parameters = running.engine.optimizer, list(running.model.parameters())
    if "pp" in how.layout:
        # The pipeline's step is all of it in one: the gradients as the optimizer is given them, group by group.
        gradients: list[Any] = []
        running.optimizer.register_step_pre_hook(
            lambda optimizer, *_: gradients.extend(p.grad for g in optimizer.param_groups for p in g["params"])
        )
        running.train_step(1, batches, 1e-3)
    else:
        running.backward(1, batches)
        gradients = [parameter.grad for parameter in parameters]
        if how.engine["zero"]:
            spread = getattr(zero, "averaged_gradients", {})
            gradients = [tensor for group in spread.values() for tensor in group or []]
            gradients += getattr(zero, "fp32_groups_gradients_flat", [])
    weights = [*parameters, *(getattr(parameter, "ds_tensor", None) for parameter in parameters)]
    for masters in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        weights += getattr(zero, masters, [])
    numbers = sum(tensor.numel() for tensor in gradients if tensor is not None)
    found = Held(storage_bytes(weights), 4 * numbers, optimizer_bytes(running))
    running.close()
    return found


NOTHING_WHOLE = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
ZERO = [
    pytest.param(What(UNEVEN), 0, 2, {}, {}, id="0", marks=pytest.mark.exhaustive),
    pytest.param(What(UNEVEN), 1, 2, {}, {}, id="1", marks=pytest.mark.exhaustive),
    pytest.param(What(UNEVEN), 2, 2, {}, {}, id="2", marks=pytest.mark.slow),
    pytest.param(What(UNEVEN), 3, 2, {}, {}, id="3", marks=pytest.mark.slow),
    pytest.param(What(UNEVEN), 3, 2, {}, NOTHING_WHOLE, id="3, nothing whole", marks=pytest.mark.exhaustive),
    pytest.param(What(UNEVEN, precision="bf16"), 1, 2, {}, {}, id="1, bf16", marks=pytest.mark.exhaustive),
    pytest.param(What(UNEVEN, precision="bf16"), 2, 2, {}, {}, id="2, bf16", marks=pytest.mark.exhaustive),
    pytest.param(What(UNEVEN, precision="bf16"), 3, 2, {}, {}, id="3, bf16", marks=pytest.mark.slow),
    pytest.param(What(UNEVEN), 1, 4, {"tp": 2}, {}, id="1, tp2 x dp2", marks=pytest.mark.exhaustive),
    pytest.param(What(TIED), 2, 4, {"tp": 2}, {}, id="2, tp2 x dp2, tied", marks=pytest.mark.slow),
    pytest.param(What(UNEVEN), 3, 4, {"tp": 2}, {}, id="3, tp2 x dp2", marks=pytest.mark.slow),
    pytest.param(
        What(UNEVEN), 3, 4, {"tp": 2}, NOTHING_WHOLE, id="3, tp2, nothing whole", marks=pytest.mark.exhaustive
    ),
    pytest.param(What(TIED), 1, 2, {"pp": 2}, {}, id="1, pp2, tied", marks=pytest.mark.slow),
    pytest.param(What(GPT2), 1, 4, {"pp": 2}, {}, id="1, pp2 x dp2", marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize(("what", "stage", "count", "layout", "passthrough"), ZERO)
def test_a_rank_of_zero_holds_what_the_stage_promises(
    ranks: RankPool, what: What, stage: int, count: int, layout: dict[str, Any], passthrough: dict[str, Any]
) -> None:
    how = How(count, layout, {"name": "deepspeed", "zero": stage, "passthrough": passthrough})
    assert ranks.run(allocated_by_zero, what, how, ranks=count) == promised(what, how)


# Activations


SAME_READS = 10


class Living(TorchDispatchMode):
    """Which storages made under it are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._made.append((StorageWeakRef(storage), storage.nbytes()))
        return result

    def bytes(self) -> int:
        """Once gloo's threads have let go of what they exchanged, which they do some time after they have."""
        gc.collect()
        reads = [self._alive()]
        while len(reads) < SAME_READS or len(set(reads[-SAME_READS:])) > 1:
            time.sleep(0.02)
            reads.append(self._alive())
        return reads[-1]

    def _alive(self) -> int:
        return sum({ref.cdata: size for ref, size in self._made if not ref.expired()}.values())


def kept_by_forwards(whats: list[What], how: How) -> list[int]:
    """Bytes alive between the forward and the backward pass of all sequences of each."""
    found = []
    for what in whats:
        engine = build(what, how)
        (batch,) = micro_batches(what, how, 0, 0, 1)
        with Living() as living:
            sums = engine.model(engine._batch(batch))
        found.append(living.bytes())
        del sums
    engine.close()
    return found


MASK = {"documents": True}
BF16 = {"precision": "bf16"}
ACTIVATIONS = [
    pytest.param(EVEN, 1, {}, {}, id="llama"),
    pytest.param(EVEN, 1, {}, BF16, id="llama, bf16", marks=pytest.mark.exhaustive),
    pytest.param(GPT2, 1, {}, {}, id="gpt2", marks=pytest.mark.exhaustive),
    pytest.param(GPT2, 1, {}, BF16, id="gpt2, bf16", marks=pytest.mark.exhaustive),
    pytest.param({**GPT2, "mlp": "relu"}, 1, {}, {}, id="relu", marks=pytest.mark.exhaustive),
    pytest.param(EVEN, 1, {}, MASK | BF16, id="documents, bf16", marks=pytest.mark.exhaustive),
    pytest.param(EVEN, 2, {"tp": 2}, {}, id="llama, tp2", marks=pytest.mark.slow),
    pytest.param(EVEN, 2, {"tp": 2}, MASK, id="llama, tp2, documents", marks=pytest.mark.exhaustive),
    pytest.param(GPT2, 2, {"tp": 2}, BF16, id="gpt2, tp2, bf16", marks=pytest.mark.exhaustive),
    pytest.param(GPT2, 2, {"tp": 2, "sequence_parallel": False}, {}, id="gpt2, tp2 alone", marks=pytest.mark.slow),
    pytest.param(EVEN, 4, {"tp": 4}, BF16, id="llama, tp4, bf16", marks=pytest.mark.exhaustive),
    pytest.param(EVEN, 2, {"cp": 2}, {}, id="cp2 ulysses", marks=pytest.mark.slow),
    pytest.param(EVEN, 2, {"cp": 2}, MASK | BF16, id="cp2 ulysses, documents, bf16", marks=pytest.mark.exhaustive),
    pytest.param(EVEN | {"kv_heads": 2}, 4, {"cp": 4}, {}, id="cp4 ulysses, copied heads", marks=pytest.mark.slow),
    pytest.param(EVEN, 2, ALL_GATHER, {}, id="cp2 all_gather", marks=pytest.mark.slow),
    pytest.param(EVEN, 2, ALL_GATHER, MASK | BF16, id="cp2 all_gather, documents, bf16", marks=pytest.mark.slow),
    pytest.param(GPT2, 2, ALL_GATHER, BF16, id="gpt2, cp2 all_gather, bf16", marks=pytest.mark.exhaustive),
    pytest.param(EVEN, 4, {"tp": 2, "cp": 2}, {}, id="tp2 x cp2 ulysses", marks=pytest.mark.exhaustive),
    pytest.param(EVEN, 4, {"tp": 2} | ALL_GATHER, BF16, id="tp2 x cp2 all_gather, bf16", marks=pytest.mark.slow),
]


RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
SIZES = ((3, 32), (2, 32), (3, 16), (2, 16))
"""Layers and context: their differences leave what one block keeps of contexts 32 and 16. Weights in BF16, embedding
and head are in both models, or in both contexts."""


@pytest.mark.parametrize(("model", "count", "layout", "options"), ACTIVATIONS)
def test_a_block_keeps_the_activations_of_the_formula(
    ranks: RankPool, model: dict[str, Any], count: int, layout: dict[str, Any], options: dict[str, Any]
) -> None:
    chosen = LayoutConfig(**layout)
    kept: dict[Recompute, int] = {}
    for recompute in RECOMPUTES:
        how = How(count, layout, {"recompute": recompute}, micro_size=None)
        whats = [What({**model, "layers": layers}, context=context, batch=2, **options) for layers, context in SIZES]
        measured = ranks.run(kept_by_forwards, whats, how, ranks=count)
        for rank, (deep, shallow, deep_short, shallow_short) in enumerate(measured):
            much, less = (
                block_activation_bytes(
                    config(model, context),
                    2,
                    precision=options.get("precision", "fp32"),
                    recompute=recompute,
                    layout=chosen,
                    documents="documents" in options,
                    place=chosen.mesh(count).coordinates(rank)["cp"],
                    device="cpu",
                )
                for context in (32, 16)
            )
            kept[recompute] = (deep - shallow) - (deep_short - shallow_short)
            assert kept[recompute] == much - less, (recompute, rank)
    assert kept["none"] > kept["selective"] > 2 * kept["full"]


class Kept:
    """A tensor, until autograd lets it go."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class KeptByBlocks:
    """Bytes of what autograd keeps of the blocks' passes that are not yet undone."""

    def __init__(self) -> None:
        self.now = self.most = self.all = 0

    def watch(self, block: torch.nn.Module) -> None:
        """Count what this block keeps."""
        hooks: list[Any] = []

        def enter(*_: Any) -> None:
            hooks.append(torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept.tensor))
            hooks[-1].__enter__()

        block.register_forward_pre_hook(enter)
        block.register_forward_hook(lambda *_: hooks.pop().__exit__())

    def _keep(self, tensor: Tensor) -> Kept:
        size = tensor.numel() * tensor.element_size()
        self.all += size
        self._add(size)
        kept = Kept(tensor.detach())  # with its graph it would keep itself
        weakref.finalize(kept, self._add, -size)
        return kept

    def _add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


def kept_by_pipeline(what: What, how: How) -> tuple[int, int]:
    """Bytes that the blocks of this rank keep in a step: at the peak, and in all passes together."""
    engine = build(what, how)
    kept = KeptByBlocks()
    for stage in engine.model:
        for _, block in stage.blocks():
            kept.watch(block)
    engine.backward(0, micro_batches(what, how, 0, 0, 1))
    gc.collect()
    assert kept.now == 0
    engine.close()
    return kept.most, kept.all


PIPELINES = [
    pytest.param(4, {"pp": 2}, id="1f1b", marks=pytest.mark.slow),
    pytest.param(4, {"pp": 4}, id="1f1b, pp4", marks=pytest.mark.exhaustive),
    pytest.param(6, INTERLEAVED, id="interleaved", marks=pytest.mark.exhaustive),
    pytest.param(6, {"pp": 2, "pp_schedule": "zero_bubble"}, id="zero_bubble", marks=pytest.mark.slow),
    pytest.param(8, {"pp": 4, "pp_schedule": "zero_bubble"}, id="zero_bubble, pp4", marks=pytest.mark.exhaustive),
    pytest.param(6, INTERLEAVED | {"pp_schedule": "zero_bubble"}, id="zero_bubble, 2 stages", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("count", "layout"), PIPELINES)
def test_a_pipeline_keeps_the_passes_of_its_schedule(ranks: RankPool, count: int, layout: dict[str, Any]) -> None:
    chosen = LayoutConfig(**layout)
    what = What({**GPT2, "layers": 4}, batch=count)
    found = ranks.run(kept_by_pipeline, what, How(chosen.pp, layout, micro_size=1), ranks=chosen.pp)
    for place, (most, together) in enumerate(found):
        one = together / (count * chosen.pp_stages_per_rank)
        passes = passes_in_flight(chosen, place, count)
        # zero_bubble lets a little of a pass go before its weights' gradients are made.
        least = 0.99 * passes if chosen.pp_schedule == "zero_bubble" else passes
        assert least <= most / one <= passes, place
