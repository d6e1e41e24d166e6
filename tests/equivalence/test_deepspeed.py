"""Every layout of the deepspeed engine computes what one process computes, and the comparison sees what goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bigtrain.engines.contract import MicroBatch
from bigtrain.models.sums import Sums
from bigtrain.testing.equivalence import MODELS, Deviations, How, What, deviations
from bigtrain.testing.ranks import RankPool

TOKENS_OF_A_RANK = 70
"""About as many as count, so that a gradient that is wrong has the right size."""
EVERYTHING_SPREAD = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def zero(
    ranks: int, stage: int, micro_size: int = 2, offload: str = "none", recompute: str = "none", **layout: Any
) -> How:
    engine = {"name": "deepspeed", "zero": stage, "offload": offload, "recompute": recompute}
    return How(ranks, layout, engine | ({"passthrough": EVERYTHING_SPREAD} if stage == 3 else {}), micro_size)


LAYOUTS = {
    **{f"ZeRO {stage}, dp2": zero(2, stage) for stage in range(4)},
    **{f"ZeRO {stage}, dp2, offload": zero(2, stage, offload="optimizer") for stage in (1, 2, 3)},
    **{f"ZeRO {stage}, tp2": zero(2, stage, tp=2) for stage in range(4)},
    **{f"ZeRO {stage}, tp2 x dp2": zero(4, stage, tp=2) for stage in range(4)},
    "ZeRO 3, tp2 x dp2, offload": zero(4, 3, offload="optimizer", tp=2),
    "ZeRO 2, tp2 without sequence parallel": zero(2, 2, tp=2, sequence_parallel=False),
    "ZeRO 3, tp2 with the head gathered": zero(2, 3, tp=2, loss_parallel=False),
    "ZeRO 3, tp2 x dp2 with recompute": zero(4, 3, recompute="full", tp=2),
    "ZeRO 2, tp2 with selective recompute": zero(2, 2, recompute="selective", tp=2),
    "ZeRO 3, tp2 x dp2 with selective recompute": zero(4, 3, recompute="selective", tp=2),
    "ZeRO 1, pp2 with selective recompute": zero(2, 1, recompute="selective", pp=2),
    "ZeRO 0, pp2": zero(2, 0, pp=2),
    "ZeRO 0, pp2 x dp2": zero(4, 0, pp=2),
    "ZeRO 1, pp2": zero(2, 1, pp=2),
    "ZeRO 1, pp2 with recompute": zero(2, 1, recompute="full", pp=2),
    "ZeRO 1, pp2 x dp2": zero(4, 1, pp=2),
    "ZeRO 1, pp4": zero(4, 1, micro_size=1, pp=4),
    "ZeRO 1, tp2 x pp2": zero(4, 1, tp=2, pp=2),
    "ZeRO 1, tp2 x pp2 x dp2": zero(8, 1, tp=2, pp=2),
}
WHOLE = {"sequence_parallel": False, "loss_parallel": False}
TOGETHER = {
    **{
        f"ZeRO {stage}, tp2 x dp2 with {recompute} recompute, plain tensor parallel": zero(
            4, stage, offload="optimizer" if stage else "none", recompute=recompute, tp=2, **WHOLE
        )
        for stage in range(4)
        for recompute in ("full", "selective")
    },
    **{
        f"ZeRO {stage}, tp2 x pp2 with {recompute} recompute, plain tensor parallel": zero(
            4, stage, recompute=recompute, tp=2, pp=2, **WHOLE
        )
        for stage in range(2)
        for recompute in ("full", "selective")
    },
}
"""For pairs of techniques that no layout above has (tests/test_support_matrix.py finds them)."""
LAYOUTS |= TOGETHER
WITH_ALL_MODELS = [
    *(f"ZeRO {stage}, dp2" for stage in range(4)),
    *(f"ZeRO {stage}, tp2" for stage in (1, 2, 3)),
    *("ZeRO 3, dp2, offload", "ZeRO 1, tp2 x dp2", "ZeRO 1, pp2"),
]
"""Each technique, and two together."""
WITH_MOST = "llama-gqa-tied-qk-norm-documents"
"""The model that has most of what layouts get wrong: for all the others, more of them together."""
ALL = [
    *((model, layout) for model in MODELS for layout in WITH_ALL_MODELS),
    *((WITH_MOST, layout) for layout in LAYOUTS if layout not in WITH_ALL_MODELS),
]
EACH_TECHNIQUE_ONCE = [
    ("llama-gqa-tied-qk-norm-documents", "ZeRO 1, pp2"),
]
"""The fast tier; for dp2 that is tests/engines/test_deepspeed.py."""


def tier(pair: tuple[str, str]) -> list[pytest.MarkDecorator]:
    """The mark of a row: the slow tier has the model with most, at each layout that is not three techniques at once."""
    if pair in EACH_TECHNIQUE_ONCE:
        return []
    each_change = pair[0] == WITH_MOST and pair[1] not in TOGETHER
    return [pytest.mark.slow if each_change else pytest.mark.exhaustive]


def of_layout(model: str, layout: str) -> What:
    """What is trained: the model, with as many layers as the layout's stages want."""
    what = MODELS[model]
    return replace(what, model=what.model | {"layers": 4}) if "pp" in LAYOUTS[layout].layout else what


@pytest.mark.parametrize(
    ("model", "layout"),
    [pytest.param(*pair, marks=tier(pair)) for pair in ALL],
)
def test_a_layout_computes_what_one_process_computes(
    ranks: RankPool, recorded: Callable[[str, What], Path], model: str, layout: str
) -> None:
    how, what = LAYOUTS[layout], of_layout(model, layout)
    found = ranks.run(deviations, what, how, recorded(model, what), ranks=how.ranks)
    assert not found[0].faults()
    assert all(other == found[0] for other in found), "the ranks disagree"


def replicas_count_in_the_norm(engine: Any) -> None:
    for parameter in engine.model.parameters():
        parameter.tensor_model_parallel = True


def mean_of_each_rank(engine: Any) -> None:
    """Losses divided by the rank's own tokens, as trainers do that average over ranks."""
    backward, pass_back = engine.backward, engine.engine.backward

    def averaged(step: int, micro_batches: list[MicroBatch]) -> Sums:
        weight = sum(float(batch["weights"].sum()) for batch in micro_batches)
        engine.engine.backward = lambda loss, **keys: pass_back(loss * (TOKENS_OF_A_RANK / weight), **keys)
        sums: Sums = backward(step, micro_batches)
        return sums

    engine.backward = averaged


def tied_gradient_of_each_end_alone(engine: Any) -> None:
    engine.engine.module.get_tied_weights_and_groups = list


def tied_copies_count_twice(engine: Any) -> None:
    object.__setattr__(engine._plan, "copies", frozenset())


def optimizer_of_a_rank_alone(engine: Any) -> None:
    """Gradients that are never reduced: what is left where a library drops its engine without a word."""
    engine.engine.enable_backward_allreduce = False
    engine.engine.allreduce_gradients = lambda *_, **__: None


FAULTS = {
    "replicated parameters counted tp times in the norm": (replicas_count_in_the_norm, "ZeRO 2, tp2", 2, "norms"),
    "a mean per rank with unequal tokens": (mean_of_each_rank, "ZeRO 2, dp2", 1, "gradient of"),
    "a tied embedding's gradient not summed over stages": (
        tied_gradient_of_each_end_alone, "ZeRO 1, pp2", 0, "gradient of embedding.weight",
    ),
    "a tied embedding counted twice in the norm": (tied_copies_count_twice, "ZeRO 1, pp2", 0, "norms"),
    "an engine silently replaced": (optimizer_of_a_rank_alone, "ZeRO 0, dp2", 1, "gradient of"),
}  # fmt: skip


def deviations_with(fault: str, what: What, how: How, directory: Path) -> Deviations:
    return deviations(what, how, directory, FAULTS[fault][0])


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_finds(ranks: RankPool, recorded: Callable[[str, What], Path], fault: str) -> None:
    _, layout, model, expected = FAULTS[fault]
    how, name = LAYOUTS[layout], list(MODELS)[model]
    what = replace(of_layout(name, layout), steps=2)
    found = ranks.run(deviations_with, fault, what, how, recorded(name, what), ranks=how.ranks)[0]
    assert any(line.startswith(expected) for line in found.faults()), found.faults()
