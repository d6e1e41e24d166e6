"""The parts that single families have compute at each layout what they compute on one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigtrain.models.config import FAMILIES
from bigtrain.parallel.config import LayoutConfig
from bigtrain.testing.equivalence import How, What, deviations
from bigtrain.testing.ranks import RankPool

SHAPE: dict[str, Any] = {"layers": 2, "width": 32, "heads": 4}
GEMMA = {**SHAPE, "arch": "gemma3_text", "kv_heads": 2, "mlp_width": 56, "sliding_window": 8}
MODELS = {
    "gemma3": What({**GEMMA, "full_attention_every": 2, "score_width": 12}, documents=True),
    "phi": What({**SHAPE, "arch": "phi"}),
    "olmo2": What({**SHAPE, "arch": "olmo2", "kv_heads": 2, "mlp_width": 56}),
    "mup": What({**SHAPE, "arch": "llama", "mlp_width": 56, "mup": {"base_width": 12, "base_head_width": 4}}),
    "qwen2": What({**SHAPE, "arch": "qwen2", "kv_heads": 2, "mlp_width": 56}),
}
FAST = [("gemma3", How(2, {"tp": 2})), ("phi", How(2, {"pp": 2})), ("olmo2", How(2)), ("mup", How(2, {"tp": 2}))]
CASES = [
    *FAST,
    ("gemma3", How(2, {"pp": 2})),
    ("phi", How(2, {"tp": 2, "loss_parallel": False})),
    ("phi", How(2, {"cp": 2})),
    ("qwen2", How(2, {"tp": 2, "sequence_parallel": False})),
    ("mup", How(2)),
    ("mup", How(2, {"pp": 2})),
    ("mup", How(2, {"cp": 2})),
    ("mup", How(2, {}, {"name": "deepspeed", "zero": 1})),
    ("mup", How(2, {}, {"name": "deepspeed", "zero": 3})),
]


@pytest.mark.parametrize(
    ("model", "how"),
    [
        pytest.param(
            model,
            how,
            id=f"{model} {how.layout or how.engine or 'dp2'}",
            marks=[] if (model, how) in FAST else pytest.mark.slow,
        )
        for model, how in CASES
    ],
)
def test_a_layout_computes_what_one_process_computes(
    ranks: RankPool, recorded: Callable[[str, What], Path], model: str, how: How
) -> None:
    found = ranks.run(deviations, MODELS[model], how, recorded(model, MODELS[model]), ranks=how.ranks)
    assert not found[0].faults()


@pytest.mark.parametrize(
    ("model", "layout", "message"),
    [
        ({**GEMMA, "context": 24}, {"cp": 2}, "do not support a sliding window .*sliding_window 8.*: use cp 1"),
        ({**SHAPE, "arch": "olmo2", "context": 24}, {"tp": 2}, "qk_norm_over 'heads' normalises over the heads of all"),
    ],
)
def test_a_layout_that_an_option_does_not_go_with_is_refused(
    model: dict[str, Any], layout: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LayoutConfig(**layout).check(FAMILIES[model["arch"]](**model), 61)


def test_a_window_that_no_sequence_fills_goes_with_every_layout() -> None:
    LayoutConfig(cp=2).check(FAMILIES["gemma3_text"](**{**GEMMA, "context": 8}), 61)
