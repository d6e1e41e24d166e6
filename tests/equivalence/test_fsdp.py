"""Every layout of the fsdp engine computes what one process computes, and the comparison sees what goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from bigtrain.engines.contract import MicroBatch
from bigtrain.engines.fsdp import FSDPEngine
from bigtrain.testing.equivalence import Deviations, How, What, deviations, record
from bigtrain.testing.ranks import RankPool

LLAMA = {"arch": "llama", "layers": 2, "width": 32, "heads": 8, "kv_heads": 4, "mlp_width": 56}
GPT2 = {"arch": "gpt2", "layers": 2, "width": 32, "heads": 4}

MODELS = {
    "llama-gqa-tied-qk-norm-documents": What({**LLAMA, "tied": True, "qk_norm": True, "dropout": 0.1}, documents=True),
    "llama-untied-dropout": What({**LLAMA, "dropout": 0.1}),
    "gpt2-dropout": What({**GPT2, "dropout": 0.1}),
}

LAYOUTS = {
    "dp2": How(2),
    "hsdp2x2": How(4, {"dp_replicate": 2}),
    "tp2": How(2, {"tp": 2}),
    "tp4": How(4, {"tp": 4}),
    "tp2 without sequence parallel": How(2, {"tp": 2, "sequence_parallel": False}),
    "tp2 with the head gathered": How(2, {"tp": 2, "loss_parallel": False}),
    "tp2 with the head gathered, without sequence parallel": How(
        2, {"tp": 2, "loss_parallel": False, "sequence_parallel": False}
    ),
    "tp2 x dp2": How(4, {"tp": 2}),
    "tp2 x hsdp2": How(4, {"tp": 2, "dp_replicate": 2}),
    "tp2 x dp2 with recompute": How(4, {"tp": 2}, {"recompute": "full"}),
    "tp2 x hsdp2 with recompute and the head gathered, without sequence parallel": How(
        4, {"tp": 2, "dp_replicate": 2, "loss_parallel": False, "sequence_parallel": False}, {"recompute": "full"}
    ),
    "compiled": How(1, {}, {"compile": True}),
    "tp2, compiled": How(2, {"tp": 2}, {"compile": True}),
    "tp2 x hsdp2 with recompute and the head gathered, without sequence parallel, compiled": How(
        4,
        {"tp": 2, "dp_replicate": 2, "loss_parallel": False, "sequence_parallel": False},
        {"recompute": "full", "compile": True},
    ),
}


COMPILED = [
    ("llama-untied-dropout", "compiled"),
    ("llama-gqa-tied-qk-norm-documents", "tp2, compiled"),
    (
        "llama-untied-dropout",
        "tp2 x hsdp2 with recompute and the head gathered, without sequence parallel, compiled",
    ),
]
"""Half a minute each, nearly all of it in the compiler: one model a layout."""
ALL = [(model, layout) for model in MODELS for layout in LAYOUTS if "compiled" not in layout] + COMPILED
EACH_TECHNIQUE_ONCE = [
    ("llama-untied-dropout", "tp2"),
    ("gpt2-dropout", "tp2 without sequence parallel"),
    ("llama-gqa-tied-qk-norm-documents", "tp2 with the head gathered"),
    ("llama-untied-dropout", "tp2 x dp2"),
]
"""The fast tier; for dp2 and hsdp2x2 that is tests/engines/test_fsdp.py."""


@pytest.fixture(scope="session")
def recorded(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of one process's record of a model, each made once."""
    known: dict[str, Path] = {}

    def run(model: str) -> Path:
        if model not in known:
            known[model] = tmp_path_factory.mktemp(model)
            ranks.run(record, MODELS[model], known[model], ranks=1)
        return known[model]

    return run


@pytest.mark.parametrize(
    ("model", "layout"),
    [pytest.param(*pair, marks=[] if pair in EACH_TECHNIQUE_ONCE else pytest.mark.slow) for pair in ALL],
)
def test_a_layout_computes_what_one_process_computes(
    ranks: RankPool, recorded: Callable[[str], Path], model: str, layout: str
) -> None:
    how = LAYOUTS[layout]
    found = ranks.run(deviations, MODELS[model], how, recorded(model), ranks=how.ranks)
    assert not found[0].faults()
    assert all(other == found[0] for other in found), "the ranks disagree"


def changed(engine: FSDPEngine, change: Callable[[MicroBatch], MicroBatch]) -> None:
    """Let each micro-batch be changed on its way into the engine."""
    backward = engine.backward
    engine.backward = lambda step, batches: backward(step, [change(batch) for batch in batches])  # type: ignore[method-assign]


def keyed_by_rank(engine: FSDPEngine) -> None:
    rank = dist.get_rank()
    changed(engine, lambda batch: batch | {"keys": batch["keys"] + rank})


def padding_counts(engine: FSDPEngine) -> None:
    def filled(batch: MicroBatch) -> MicroBatch:
        weights = batch["weights"].copy()
        # The first token of the padding, in sequences that have any before it.
        row, place = np.nonzero((weights[:, 1:] == 0) & (weights[:, :-1] == 1))
        weights[row[:1], place[:1] + 1] = 1
        return batch | {"weights": weights}

    changed(engine, filled)


def averaged_twice(engine: FSDPEngine) -> None:
    for module in engine.model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(2.0)


def norm_weight_not_reduced(engine: FSDPEngine) -> None:
    engine._tensor_partial = [p for p in engine._tensor_partial if p is not engine.model.norm.weight]


def replicas_count_in_the_norm(engine: FSDPEngine) -> None:
    engine._counted = set(engine._parameters)


def losses_of_a_tensor_group_all_count(engine: FSDPEngine) -> None:
    engine._counts_loss = True


def qk_norms_not_reduced(engine: FSDPEngine) -> None:
    own = {id(p) for name, p in engine.model.named_parameters() if "query_norm" in name}
    engine._tensor_partial = [p for p in engine._tensor_partial if id(p) not in own]


FAULTS = {
    "a norm's weight not reduced under sequence parallel": (
        norm_weight_not_reduced, "tp2", 0, "gradient of norm.weight",
    ),
    "a head norm's weight not reduced": (
        qk_norms_not_reduced, "tp2 without sequence parallel", 0, "gradient of layers.0.attention.query_norm.weight",
    ),
    "replicated parameters counted tp times in the norm": (replicas_count_in_the_norm, "tp2", 2, "norms"),
    "losses counted tp times": (losses_of_a_tensor_group_all_count, "tp2", 1, "losses"),
    "a dropout mask keyed by rank": (keyed_by_rank, "tp2", 1, "gradient of"),
    "gradients averaged twice": (averaged_twice, "dp2", 1, "gradient of"),
    "a padding token counted": (padding_counts, "tp2", 2, "weights"),
}  # fmt: skip


def deviations_with(fault: str, what: What, how: How, directory: Path) -> Deviations:
    return deviations(what, how, directory, FAULTS[fault][0])


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_finds(ranks: RankPool, recorded: Callable[[str], Path], fault: str) -> None:
    _, layout, model, expected = FAULTS[fault]
    how, name = LAYOUTS[layout], list(MODELS)[model]
    found = ranks.run(deviations_with, fault, replace(MODELS[name], steps=2), how, recorded(name), ranks=how.ranks)[0]
    assert any(line.startswith(expected) for line in found.faults()), found.faults()
