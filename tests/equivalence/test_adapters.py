"""Adapters beside frozen weights compute at each layout what they compute on one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bigtrain.testing.equivalence import How, What, deviations
from bigtrain.testing.ranks import RankPool

ALL = ["query", "key", "value", "output", "gate", "up", "down"]
LORA = {"name": "lora", "rank": 3, "alpha": 12.0, "targets": ALL}
MODEL = {"arch": "qwen2", "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 56, "adapter": LORA}
WHAT = What(MODEL)
LAYOUTS = {
    "dp2": How(2),
    "tp2": How(2, {"tp": 2}),
    "tp2 without sequence parallelism, selective recompute": How(
        2, {"tp": 2, "sequence_parallel": False}, {"recompute": "selective"}
    ),
    "cp2 with recompute": How(2, {"cp": 2}, {"recompute": "full"}),
    "pp2": How(2, {"pp": 2}),
}


@pytest.mark.parametrize(
    "layout", [name if name == "tp2" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_lora_at_a_layout_computes_what_one_process_computes(
    layout: str, ranks: RankPool, recorded: Callable[[str, What], Path]
) -> None:
    how = LAYOUTS[layout]
    found = ranks.run(deviations, WHAT, how, recorded("lora", WHAT), ranks=how.ranks)
    assert not found[0].faults()
