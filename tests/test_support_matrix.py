"""What goes with what: every pair of techniques is refused by the real checks, or tested; a README says which.

    python tests/test_support_matrix.py        # writes the tables into bigtrain/engines/README.md

A pair is refused where `prepare` refuses a config that requests both. It is tested where a test of the equivalence
suite runs both together, which is read from the tests' own parameters. A pair that is neither fails here, and so does
a README that is out of date.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from bigtrain.config import UserError
from bigtrain.config.plugin import load_plugin
from bigtrain.run import load_config
from bigtrain.training.prepare import prepare

ROOT = Path(__file__).parent.parent
README = ROOT / "bigtrain" / "engines" / "README.md"
PLUGIN = ROOT / "configs" / "plugin" / "my_model.py"
BEGIN, END = "<!-- support matrix: begin -->", "<!-- support matrix: end -->"

LLAMA = {"arch": "llama", "layers": 4, "width": 32, "heads": 8, "kv_heads": 4, "context": 16}
ENGINES: dict[str, dict[str, Any]] = {
    "fsdp": {"engine": {"name": "fsdp"}, "model": LLAMA},
    **{
        f"deepspeed zero {stage}": {"engine": {"name": "deepspeed", "zero": stage}, "model": LLAMA}
        for stage in range(4)
    },
    **{
        f"accelerate {strategy}": {
            "engine": {"name": "accelerate", "strategy": strategy},
            "model": {"arch": "hf", "hf": "a-model", "context": 16},
        }
        for strategy in ("ddp", "fsdp2", "zero2")
    },
}
TECHNIQUES: dict[str, dict[str, Any]] = {
    "dp": {},
    "hsdp": {"layout": {"dp_replicate": 2}},
    "tp": {"layout": {"tp": 2}},
    "tp without sequence parallel": {"layout": {"tp": 2, "sequence_parallel": False}},
    "tp with the head gathered": {"layout": {"tp": 2, "loss_parallel": False}},
    "cp ulysses": {"layout": {"cp": 2}},
    "cp all_gather": {"layout": {"cp": 2, "cp_kind": "all_gather"}},
    "pp 1f1b": {"layout": {"pp": 2}},
    "pp interleaved": {"layout": {"pp": 2, "pp_schedule": "interleaved", "pp_stages_per_rank": 2}},
    "pp zero bubble": {"layout": {"pp": 2, "pp_schedule": "zero_bubble"}},
    "recompute full": {"engine": {"recompute": "full"}},
    "recompute selective": {"engine": {"recompute": "selective"}},
    "compile": {"engine": {"compile": True}},
    "offload": {"engine": {"offload": "optimizer"}},
    "document masks": {"data": {"document_mask": True}},
    "dropout": {"model": {"dropout": 0.1}},
    "plain module": {"model": {"arch": "my-model", "width": 32, "context": 16}},
}
"""What each sets in the YAML. A model section with an `arch` replaces the engine's own."""
ONE_OF = (
    ("cp ulysses", "cp all_gather"),
    ("pp 1f1b", "pp interleaved", "pp zero bubble"),
    ("recompute full", "recompute selective"),
    ("plain module", "dropout"),
)
"""Choices of one thing, which no config can combine; a plain module has dropout by its own code alone."""
MEANINGLESS = {frozenset(pair) for choices in ONE_OF for pair in itertools.combinations(choices, 2)}


def refusal(data: Path, engine: str, techniques: Iterable[str]) -> UserError | None:
    """Why a run with all of these would not start, by the checks of `bigtrain train`; None where it would."""
    asked: dict[str, Any] = {"name": "x", "data": {"train": str(data)}, "batch": {"size": 4}, "duration": "2 steps"}
    for sections in (ENGINES[engine], *(TECHNIQUES[technique] for technique in techniques)):
        for section, keys in sections.items():
            asked[section] = dict(keys) if "arch" in keys else {**asked.get(section, {}), **keys}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(asked, file)
        file.flush()
        try:
            load_plugin(str(PLUGIN))
            config = load_config(Path(file.name))
            prepare(config, verify=False)
        except UserError as error:
            return error
    return None


def imported(path: str) -> ModuleType:
    """A file of tests, imported by its place."""
    name = "matrix_" + re.sub(r"\W", "_", path)
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def parameters(test: Any) -> Iterator[dict[str, Any]]:
    """The arguments of each case of a parametrised test."""
    choices = []
    for mark in test.pytestmark:
        if mark.name != "parametrize":
            continue
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        names, rows = [name.strip() for name in names], []
        for row in mark.args[1]:
            values = row.values if hasattr(row, "marks") else (row if len(names) > 1 else (row,))
            rows.append(dict(zip(names, values, strict=True)))
        choices.append(rows)
    for rows in itertools.product(*choices):
        yield {name: value for row in rows for name, value in row.items()}


def name_of(engine: Mapping[str, Any]) -> str:
    """The name in ENGINES of an engine's section."""
    name = engine.get("name", "fsdp")
    return f"deepspeed zero {engine['zero']}" if name == "deepspeed" else name


def of_layout(ranks: int, layout: Mapping[str, Any]) -> set[str]:
    """The techniques of a layout on so many ranks."""
    tp, cp, pp = (layout.get(axis, 1) for axis in ("tp", "cp", "pp"))
    found = {"dp"} if ranks > tp * cp * pp else set()
    found |= {"hsdp"} if layout.get("dp_replicate", 1) > 1 else set()
    found |= {"tp"} if tp > 1 else set()
    found |= {f"cp {layout.get('cp_kind', 'ulysses')}"} if cp > 1 else set()
    found |= {f"pp {layout.get('pp_schedule', '1f1b').replace('_', ' ')}"} if pp > 1 else set()
    if tp > 1:
        found |= set() if layout.get("sequence_parallel", True) else {"tp without sequence parallel"}
        found |= set() if layout.get("loss_parallel", True) else {"tp with the head gathered"}
    return found


def of_engine(keys: Mapping[str, Any]) -> set[str]:
    """The techniques of an engine's section."""
    kind = keys.get("recompute", "none")
    found = {f"recompute {kind}"} if kind != "none" else set()
    found |= {"compile"} if keys.get("compile", False) else set()
    return found | ({"offload"} if keys.get("offload", "none") != "none" else set())


def of_model(model: Mapping[str, Any], documents: bool) -> set[str]:
    """The techniques of a model and its data."""
    found = {"dropout"} if model.get("dropout", 0.0) else set()
    found |= {"plain module"} if model["arch"] == "my-model" else set()
    return found | ({"document masks"} if documents else set())


@cache
def evidence() -> dict[str, list[frozenset[str]]]:
    """What the tests run together, by engine: a set of techniques for each of their cases."""
    found: dict[str, list[frozenset[str]]] = {engine: [] for engine in ENGINES}
    for path, name in (
        ("equivalence/test_fsdp.py", "test_a_layout_computes_what_one_process_computes"),
        ("equivalence/test_deepspeed.py", "test_a_layout_computes_what_one_process_computes"),
        ("equivalence/test_plugin.py", "test_a_plain_module_computes_what_one_process_computes"),
    ):
        module = imported(path)
        for case in parameters(getattr(module, name)):
            what = module.of_layout(case["model"], case["layout"]) if "model" in case else module.WHAT
            how = module.LAYOUTS[case["layout"]]
            techniques = of_layout(how.ranks, how.layout) | of_engine(how.engine) | of_model(what.model, what.documents)
            found[name_of(how.engine)].append(frozenset(techniques))
    module = imported("engines/test_deepspeed.py")
    for name in (
        "test_zero_computes_what_one_process_computes",
        "test_document_masks_recompute_and_offload_together_change_nothing",
    ):
        for case in parameters(getattr(module, name)):
            model, keys = case.get("model", module.LLAMA), case["engine"].plain()
            techniques = {"dp"} | of_engine(keys) | of_model(model, case.get("documents", False))
            found[name_of(keys)].append(frozenset(techniques))
    module = imported("engines/test_accelerate.py")
    for case in parameters(module.test_two_ranks_compute_what_one_process_computes):
        found[f"accelerate {case['strategy']}"].append(frozenset({"dp"}))
    return found


def state(data: Path, engine: str, pair: frozenset[str]) -> str:
    """tested, refused, or neither."""
    if any(pair <= techniques for techniques in evidence()[engine]):
        return "tested"
    return "refused" if pair in MEANINGLESS or refusal(data, engine, pair) else "neither"


def alone(data: Path, engine: str) -> list[str]:
    """The techniques that an engine takes at all."""
    return [technique for technique in TECHNIQUES if not refusal(data, engine, (technique,))]


def tables(data: Path) -> str:
    """The section of the README."""
    lines = [
        "✓: compared with one process by the tests. –: refused before a process is started, with the sizes or the",
        "choice that would work. On a GPU nothing has been tested.",
        "",
    ]
    names = list(TECHNIQUES)
    lines += ["| | " + " | ".join(ENGINES) + " |", "|---" * (len(ENGINES) + 1) + "|"]
    for name in names:
        cells = ["–" if refusal(data, engine, (name,)) else "✓" for engine in ENGINES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    taken = alone(data, "fsdp")
    lines += ["", "Two at a time, on fsdp; a choice of one thing (–) cannot be made twice:", ""]
    lines += ["| | " + " | ".join(taken) + " |", "|---" * (len(taken) + 1) + "|"]
    for row, first in enumerate(taken):
        cells = [
            "✓" if state(data, "fsdp", frozenset({first, second})) == "tested" else "–" for second in taken[: row + 1]
        ]
        lines.append(f"| {first} | " + " | ".join(cells + [""] * (len(taken) - row - 1)) + " |")
    lines += ["", "On the other engines any two of a column go together, but for those below.", ""]
    lines += ["<details><summary>Why each is refused, as the command says it</summary>", ""]
    lines += ["| | on | message |", "|---|---|---|"]
    lines += [f"| {techniques} | {engines} | {said} |" for techniques, engines, said in refused(data)]
    return "\n".join([*lines, "", "</details>"])


def refused(data: Path) -> Iterator[tuple[str, str, str]]:
    """Techniques, and pairs whose halves are taken, with the engines that refuse them and what they say."""
    engines_of: dict[tuple[str, str], list[str]] = {}
    for engine in ENGINES:
        taken = alone(data, engine)
        pairs = [pair for pair in itertools.combinations(taken, 2) if frozenset(pair) not in MEANINGLESS]
        for techniques in (*((name,) for name in TECHNIQUES if name not in taken), *pairs):
            error = refusal(data, engine, techniques)
            if error is not None:
                said = f"{error.what.rstrip('.')}. {error.fix or ''}".strip().replace("|", "/").replace("\n", " ")
                engines_of.setdefault((" + ".join(techniques), said), []).append(engine)
    together: dict[tuple[str, str], list[str]] = {}
    for (asked, said), engines in engines_of.items():
        together.setdefault((listed(engines), said), []).append(asked)
    for (names, said), all_asked in together.items():
        yield "; ".join(all_asked), names, said


def listed(engines: list[str]) -> str:
    """Engines by name, those of all variants by the name that they share."""
    for name in ("deepspeed", "accelerate"):
        if engines == [engine for engine in ENGINES if engine.startswith(name)]:
            return name
    return ", ".join(engines)


def written(text: str, section: str) -> str:
    """The README with the section put between its marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


@pytest.fixture(scope="module")
def data(text_shards: Path) -> Path:
    return text_shards / "train"


@pytest.mark.parametrize("engine", ENGINES)
def test_every_pair_of_techniques_is_tested_or_refused(data: Path, engine: str) -> None:
    taken = alone(data, engine)
    pairs = [frozenset(pair) for pair in itertools.combinations_with_replacement(taken, 2)]
    assert [sorted(pair) for pair in pairs if state(data, engine, pair) == "neither"] == []


def test_what_is_tested_is_not_refused(data: Path) -> None:
    for engine, cases in evidence().items():
        for techniques in cases:
            assert refusal(data, engine, techniques) is None, (engine, techniques)


def test_the_readme_has_the_tables(data: Path) -> None:
    text = README.read_text()
    assert written(text, tables(data)) == text, "run: python tests/test_support_matrix.py"


def main() -> None:
    """Write the tables into bigtrain/engines/README.md."""
    from bigtrain.data.packing.documents import pack
    from bigtrain.data.tokenizers import Tokenizer

    with tempfile.TemporaryDirectory() as place:
        pack([Path(os.__file__)], Path(place) / "shards", Tokenizer.open("bytes"))
        README.write_text(written(README.read_text(), tables(Path(place) / "shards" / "train")))


if __name__ == "__main__":
    main()
