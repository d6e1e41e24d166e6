"""Bytes from outside never crash a parser without a message: the kept corpus, and a few seconds of changes to it."""

from __future__ import annotations

import importlib.util
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SECONDS = 4.0


def _targets() -> Any:
    spec = importlib.util.spec_from_file_location("fuzz_targets", Path(__file__).with_name("targets.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


targets = _targets()


def fuzz(name: str, seconds: float, seed: int) -> int:
    """Run the corpus, then changed inputs until the time is over; how many."""
    corpus, chance, count = targets.kept(name), random.Random(seed), 0
    end = time.monotonic() + seconds
    for data in corpus:
        targets.run(name, data)
    while time.monotonic() < end:
        data = chance.choice(corpus)
        if name in targets.STRUCTURED and chance.random() < 0.5:
            data = targets.restructured(data, chance)
        else:
            data = targets.mutated(data, corpus, chance)
        try:
            targets.run(name, data)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}, after {data[:2000]!r}") from error
        count += 1
    return count


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_what_fuzzing_has_found_is_answered(name: str) -> None:
    assert fuzz(name, 0.0, 0) == 0  # The corpus alone; what is not answered raises.


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_no_input_crashes_a_parser_without_a_message(name: str) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}: {fuzz(name, SECONDS, seed)} inputs")


def test_a_crash_without_a_message_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(data: bytes) -> None:
        if data.count(b"{") != data.count(b"}"):
            raise KeyError("shardlist")

    monkeypatch.setitem(targets.TARGETS, "index", careless)
    with pytest.raises(AssertionError, match="KeyError"):
        fuzz("index", 30.0, seed=1)
