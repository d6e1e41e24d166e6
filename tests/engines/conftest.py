"""What the engines are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bigtrain.testing.ranks import RankPool


@pytest.fixture(scope="module")
def alone(request: pytest.FixtureRequest, ranks: RankPool) -> Callable[[Any], Any]:
    """What the module's `measure` gives for a case in one process, each case once."""
    known: dict[str, Any] = {}

    def run(case: Any) -> Any:
        single = case.alone()
        if repr(single) not in known:
            known[repr(single)] = ranks.run(request.module.measure, single, ranks=1)[0]
        return known[repr(single)]

    return run
