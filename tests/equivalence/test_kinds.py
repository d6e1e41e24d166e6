"""Models of captions, images and arrays compute at every layout that takes them what one process computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bigtrain.testing.equivalence import How, What, deviations, record
from bigtrain.testing.ranks import RankPool

SERIES = Path(__file__).parents[2] / "configs" / "plugin" / "series_model.py"
IMAGE = {"image_size": 8, "patch": 4, "layers": 2, "width": 32, "heads": 4}
WHAT = {
    "captioner": What({"arch": "captioner", **IMAGE}, context=9),
    "vit": What({"arch": "vit", **IMAGE}),
    "arrays": What({"arch": "series-model", "length": 6, "features": 3, "targets": 2, "width": 32}, plugin=str(SERIES)),
}
LAYOUTS = {
    "dp2 with recompute": How(2, {}, {"recompute": "full"}),
    "dp4": How(4),
    "hsdp2x2 with selective recompute": How(4, {"dp_replicate": 2}, {"recompute": "selective"}),
    "dp2, compiled": How(2, {}, {"compile": True}),
}
FAST = ("captioner", "arrays"), "dp2 with recompute"


@pytest.fixture(scope="module")
def recorded(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of one process's record, each made once."""
    known: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in known:
            known[name] = tmp_path_factory.mktemp(name)
            ranks.run(record, WHAT[name], known[name], ranks=1)
        return known[name]

    return run


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[] if name in FAST[0] and layout == FAST[1] else pytest.mark.slow)
        for name in WHAT
        for layout in LAYOUTS
    ],
)
def test_other_kinds_compute_what_one_process_computes(
    ranks: RankPool, recorded: Callable[[str], Path], name: str, layout: str
) -> None:
    how = LAYOUTS[layout]
    found = ranks.run(deviations, WHAT[name], how, recorded(name), ranks=how.ranks)
    assert not found[0].faults()
    assert all(other == found[0] for other in found)
