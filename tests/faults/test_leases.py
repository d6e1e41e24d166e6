"""Two gangs that believe they hold one run: the older one publishes nothing."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from bigtrain.checkpoint import commit


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_gang_that_was_cut_off_publishes_nothing_and_ends(two_ranks: Any) -> None:
    # It is slow from its second step on, so that the new gang begins before its first save.
    slow = {"rank": 1, "kind": "sleep", "step": 2}
    old = two_ranks.start("fenced", 2, fault=slow)
    run = two_ranks.run("fenced")
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # As a launcher leaves it that took the run over while the first could not be reached, and has died since.
    lease = json.loads((run / "lease.json").read_text())
    lease |= {"number": lease["number"] + 1, "host": "elsewhere", "renewed": time.time() - 3600}
    (run / "lease.json").write_text(json.dumps(lease))
    said = two_ranks.finish(old, code=2)
    assert "Another launcher has taken over the run" in said
    assert two_ranks.events("fenced", "save_refused")
    assert not commit.list_checkpoints(run / "checkpoints")
    two_ranks.finish(two_ranks.start("fenced", 2))
    assert commit.published_lease(run / "checkpoints") == lease["number"] + 1
    two_ranks.assert_same("fenced", "undisturbed")
    two_ranks.assert_nothing_left("fenced")
