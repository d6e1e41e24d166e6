"""How far BF16 goes apart between layouts: the band, over seeds, that the slow tests hold every layout to.

    python tests/bench/bf16_bands.py [--seeds 4] [--of TEXT] > tests/bench/results/bf16_bands.txt

Each layout of the equivalence suite is compared with one process, both in BF16, from the same weights at each step;
Accelerate's strategies likewise, on tiny models of transformers, over 8 steps of one seed.
FP32 is the proof that they compute the same thing; here sums over ranks round at other places, and this is by how much.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bigtrain.testing.equivalence import MODELS, Deviations, How, deviations, record
from bigtrain.testing.ranks import RankPool

TESTS = Path(__file__).parent.parent
MODEL = "llama-gqa-tied-qk-norm-documents"
STEPS = 2
WIDTH = 86
"""Characters of a layout's name."""
UNIT = 2.0**-8
"""Of BF16: what one rounding may change, relative."""


def suite(path: str) -> ModuleType:
    """A file of the tests, for its layouts and what it compares them by."""
    if str(TESTS.parent) not in sys.path:
        sys.path.append(str(TESTS.parent))
    name = path.replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{path}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def layouts() -> dict[str, How]:
    """All of both engines that are not compiled: those round as the same ones that are not."""
    every = {f"fsdp, {name}": how for name, how in suite("equivalence/test_fsdp").LAYOUTS.items()}
    every |= {f"deepspeed, {name}": how for name, how in suite("equivalence/test_deepspeed").LAYOUTS.items()}
    return {name: how for name, how in every.items() if not how.engine.get("compile")}


def measure(pool: RankPool, how: How, directory: Path, seed: int) -> Deviations:
    """One layout and one seed; what one process computes is recorded in `directory` once."""
    what = replace(MODELS[MODEL], model=MODELS[MODEL].model | {"layers": 4}, precision="bf16", steps=STEPS, seed=seed)
    place = directory / str(seed)
    if not place.exists():
        place.mkdir()
        pool.run(record, what, place, ranks=1)
    return pool.run(deviations, what, how, place, ranks=how.ranks)[0]


def measure_strategy(pool: RankPool, accelerate: ModuleType, case: Any) -> tuple[float, float, float]:
    """A strategy of Accelerate at two ranks beside one process: one gradient, loss, norm; the worst of 8 steps."""
    alone = pool.run(accelerate.follow, replace(case, micro_size=None), None, ranks=1)[0]
    shared = pool.run(accelerate.follow, case, [step.before for step in alone], ranks=2)[0]
    return accelerate.deviations(shared, alone)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--of", default="", help="only layouts with this text in their name")
    given = parser.parse_args()
    chosen = {name: how for name, how in layouts().items() if given.of in name}
    accelerate, tiny = suite("engines/test_accelerate"), suite("models/tiny_hf")
    strategies = [
        (f"accelerate, {strategy} over 2, {kind}", strategy, kind)
        for strategy in accelerate.STRATEGIES
        for kind in tiny.TASKS
    ]
    print(f"{MODEL}, 4 layers, BF16, {given.seeds} seeds, {STEPS} steps each; torch {torch.__version__}, CPU")
    print(f"largest relative deviation from one process in BF16; one unit of BF16 is {UNIT:.1e}\n")
    print(f"{'layout':{WIDTH}} {'one gradient':>12} {'loss':>9} {'norm':>9}")
    with tempfile.TemporaryDirectory() as directory, RankPool(8) as pool:
        for name, how in chosen.items():
            found = [measure(pool, how, Path(directory), seed) for seed in range(given.seeds)]
            gradient = max(max(each.relative_gradients.values()) for each in found)
            loss = max(max(*each.losses, each.evaluation) for each in found)
            norm = max(max(each.norms) for each in found)
            print(f"{name:{WIDTH}} {gradient:12.1e} {loss:9.1e} {norm:9.1e}", flush=True)
        for name, strategy, kind in strategies:
            if given.of in name:
                case = accelerate.Case(tiny.make(kind, Path(directory, kind)), strategy, precision="bf16")
                gradient, loss, norm = measure_strategy(pool, accelerate, case)
                print(f"{name:{WIDTH}} {gradient:12.1e} {loss:9.1e} {norm:9.1e}", flush=True)


if __name__ == "__main__":
    main()
