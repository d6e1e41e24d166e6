"""What one process computes, for all that is compared with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bigtrain.testing.equivalence import What, record
from bigtrain.testing.ranks import RankPool

STEPS = 8


@pytest.fixture(scope="session")
def recorded(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, What], Path]:
    """The directory of one process's record of a model, each made once."""
    known: dict[tuple[str, int], Path] = {}

    def run(model: str, what: What) -> Path:
        key = model, what.model["layers"]
        if key not in known:
            known[key] = tmp_path_factory.mktemp(model)
            ranks.run(record, replace(what, steps=STEPS), known[key], ranks=1)
        return known[key]

    return run
