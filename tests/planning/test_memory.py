"""What a rank is said to hold is what it allocates, to the byte."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigtrain.engines.build import build_engine
from bigtrain.engines.config import DeepSpeedConfig, FSDPConfig, Precision, Recompute
from bigtrain.models.config import family
from bigtrain.models.decoder_config import DecoderConfig
from bigtrain.optim.config import AdamWConfig
from bigtrain.parallel.config import LayoutConfig
from bigtrain.parallel.mesh import Ranks
from bigtrain.planning.memory import Held, block_activation_bytes, held_bytes
from bigtrain.testing.equivalence import What, micro_batches
from bigtrain.testing.ranks import RankPool

VOCABULARY = 61
UNEVEN = {"arch": "llama", "layers": 2, "width": 30, "heads": 6, "head_width": 10, "kv_heads": 2, "mlp_width": 50}
EVEN = {"arch": "llama", "layers": 2, "width": 32, "heads": 8, "kv_heads": 4, "mlp_width": 56, "qk_norm": True}
GPT2 = {"arch": "gpt2", "layers": 2, "width": 32, "heads": 4, "dropout": 0.1}


def config(model: dict[str, Any], context: int = 24) -> DecoderConfig:
    built = family(model["arch"])(**model, context=context)
    assert isinstance(built, DecoderConfig)
    return built


@pytest.mark.parametrize("model", [UNEVEN, EVEN, GPT2, {**EVEN, "tied": True}, {**GPT2, "norm": "rmsnorm"}])
def test_the_shapes_are_those_of_the_model(model: dict[str, Any]) -> None:
    with torch.device("meta"):
        built = config(model).build(VOCABULARY)
    shapes = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    assert list(config(model).parameter_shapes(VOCABULARY).items()) == list(shapes.items())


# States


def engine_of(model: dict[str, Any], engine: FSDPConfig | DeepSpeedConfig, layout: LayoutConfig) -> Any:
    return build_engine(
        config(model), VOCABULARY, AdamWConfig(), engine=engine, layout=layout, precision="fp32", seed=1,
        ranks=Ranks.from_environment(),
    )  # fmt: skip


def storage_bytes(tensors: list[Any]) -> int:
    """Of all that these tensors keep alive on this rank."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors if tensor is not None]
    stores = [tensor.untyped_storage() for tensor in local]
    return sum({store._cdata: store.nbytes() for store in stores}.values())


def allocated(model: dict[str, Any], engine: FSDPConfig | DeepSpeedConfig, layout: LayoutConfig) -> Held:
    """After a step and the backward pass of the next."""
    running = engine_of(model, engine, layout)
    what = What(model)
    batches = micro_batches(what, 0, running.data_parallel_rank, running.data_parallel_size, 2)
    running.train_step(0, batches, 1e-3)
    running.backward(1, batches)
    parameters = list(running.model.parameters())
    found = Held(
        storage_bytes(parameters),
        storage_bytes([parameter.grad for parameter in parameters]),
        storage_bytes([value for state in running.optimizer.state.values() for value in state.values()]),
    )
    running.close()
    return found


FSDP = [
    pytest.param(UNEVEN, 2, {}, id="dp2, uneven"),
    pytest.param(UNEVEN, 4, {}, id="dp4, uneven", marks=pytest.mark.slow),
    pytest.param(UNEVEN, 4, {"dp_replicate": 2}, id="hsdp2x2, uneven", marks=pytest.mark.slow),
    pytest.param({**EVEN, "tied": True}, 2, {"tp": 2}, id="tp2, tied", marks=pytest.mark.slow),
    pytest.param(GPT2, 2, {"tp": 2, "sequence_parallel": False}, id="tp2, biases", marks=pytest.mark.slow),
    pytest.param(EVEN, 4, {"tp": 2}, id="tp2 x dp2"),
]


@pytest.mark.parametrize(("model", "count", "layout"), FSDP)
def test_a_rank_of_fsdp_holds_what_the_sharding_promises(
    ranks: RankPool, model: dict[str, Any], count: int, layout: dict[str, Any]
) -> None:
    chosen = LayoutConfig(**layout)
    found = ranks.run(allocated, model, FSDPConfig(), chosen, ranks=count)
    mesh = chosen.mesh(count)
    expected = [
        held_bytes(config(model), VOCABULARY, engine=FSDPConfig(), mesh=mesh, rank=rank) for rank in range(count)
    ]
    assert found == expected
    whole = held_bytes(config(model), VOCABULARY, engine=FSDPConfig(), mesh=LayoutConfig().mesh(1))
    assert whole.parameters == 4 * config(model).parameter_count(VOCABULARY)
    assert max(held.total for held in found) < 0.6 * whole.total


def allocated_by_zero(model: dict[str, Any], engine: DeepSpeedConfig) -> Held:
    """As `allocated`; gradients by their numbers, since DeepSpeed keeps them inside larger buckets."""
    running = engine_of(model, engine, LayoutConfig())
    batches = micro_batches(What(model), 0, running.data_parallel_rank, running.data_parallel_size, 2)
    running.train_step(0, batches, 1e-3)
    running.backward(1, batches)
    zero, parameters = running.engine.optimizer, list(running.model.parameters())
    masters = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups"}
    weights = [*parameters, *(getattr(parameter, "ds_tensor", None) for parameter in parameters)]
    weights += getattr(zero, masters.get(engine.zero, "fp32_partitioned_groups_flat"), [])
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if engine.zero:
        gradients = [tensor for group in zero.averaged_gradients.values() for tensor in group or []]
    optimizer = [value for state in running.optimizer.state.values() for value in state.values()]
    found = Held(storage_bytes(weights), 4 * sum(tensor.numel() for tensor in gradients), storage_bytes(optimizer))
    running.close()
    return found


ZERO = [
    pytest.param(0, {}, marks=pytest.mark.slow),
    pytest.param(1, {}, marks=pytest.mark.slow),
    pytest.param(2, {}),
    pytest.param(3, {}, marks=pytest.mark.slow),
    pytest.param(3, {"stage3_param_persistence_threshold": 0}, id="3-nothing whole", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("stage", "zero"), ZERO)
def test_a_rank_of_zero_holds_what_the_stage_promises(ranks: RankPool, stage: Any, zero: dict[str, Any]) -> None:
    engine = DeepSpeedConfig(zero=stage, passthrough={"zero_optimization": zero})
    expected = held_bytes(config(UNEVEN), VOCABULARY, engine=engine, mesh=LayoutConfig().mesh(2))
    assert ranks.run(allocated_by_zero, UNEVEN, engine, ranks=2) == [expected] * 2


# Activations


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
        gc.collect()
        return sum({ref.cdata: size for ref, size in self._made if not ref.expired()}.values())


def kept_by_forward(
    model: dict[str, Any], layout: LayoutConfig, recompute: Recompute, precision: Precision, layers: int, context: int
) -> int:
    """Bytes alive between the forward and the backward pass of two sequences."""
    what = What({**model, "layers": layers}, context=context, batch=2)
    engine = build_engine(
        config(what.model, context), VOCABULARY, AdamWConfig(), engine=FSDPConfig(recompute=recompute), layout=layout,
        precision=precision, seed=1, ranks=Ranks.from_environment(),
    )  # fmt: skip
    (batch,) = micro_batches(what, 0, 0, 1, None)
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    with Living() as living:
        loss, _ = engine.model(tensors)
    found = living.bytes()
    loss.backward()
    engine.close()
    return found


ACTIVATIONS = [
    pytest.param(EVEN, 1, {}, "fp32", id="llama"),
    pytest.param(EVEN, 1, {}, "bf16", id="llama, bf16", marks=pytest.mark.slow),
    pytest.param(GPT2, 1, {}, "fp32", id="gpt2", marks=pytest.mark.slow),
    pytest.param(GPT2, 1, {}, "bf16", id="gpt2, bf16", marks=pytest.mark.slow),
    pytest.param({**GPT2, "mlp": "relu"}, 1, {}, "fp32", id="relu", marks=pytest.mark.slow),
    pytest.param(EVEN, 2, {"tp": 2}, "fp32", id="llama, tp2"),
    pytest.param(GPT2, 2, {"tp": 2}, "bf16", id="gpt2, tp2, bf16", marks=pytest.mark.slow),
    pytest.param(GPT2, 2, {"tp": 2, "sequence_parallel": False}, "fp32", id="gpt2, tp2 alone", marks=pytest.mark.slow),
    pytest.param(EVEN, 4, {"tp": 4}, "bf16", id="llama, tp4, bf16", marks=pytest.mark.slow),
]


RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
SIZES = ((3, 32), (2, 32), (3, 16), (2, 16))
"""Layers and context: their differences leave what one block keeps of 2 x 16 tokens. Weights in BF16, embedding and
head are in both models, or in both contexts."""


@pytest.mark.parametrize(("model", "count", "layout", "precision"), ACTIVATIONS)
def test_a_block_keeps_the_activations_of_the_formula(
    ranks: RankPool, model: dict[str, Any], count: int, layout: dict[str, Any], precision: Precision
) -> None:
    chosen = LayoutConfig(**layout)
    kept: dict[Recompute, int] = {}
    for recompute in RECOMPUTES:
        measured = [
            ranks.run(kept_by_forward, model, chosen, recompute, precision, *size, ranks=count) for size in SIZES
        ]
        much, less = (
            block_activation_bytes(
                config(model), tokens, precision=precision, recompute=recompute, layout=chosen, device="cpu"
            )
            for tokens in (2 * 32, 2 * 16)
        )
        for deep, shallow, deep_short, shallow_short in zip(*measured, strict=True):
            kept[recompute] = (deep - shallow) - (deep_short - shallow_short)
            assert kept[recompute] == much - less, recompute
    assert kept["none"] > kept["selective"] > 2 * kept["full"]
