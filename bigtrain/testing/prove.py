"""`bigtrain prove CONFIG [layout.x=...]` compares a run's layout with one process, on a smaller copy of its model.

The smaller model keeps what a layout may get wrong: grouped heads, ties, norms, biases, dropout, masks. A few steps in
FP32 on CPU processes are compared with one process that computes the full batch in one pass. The comparison covers
initial weights, all gradients, the gradient norm, the loss, and updated weights. In addition, a state is loaded into
the layout and read back.

Rules for the smaller run:

- Axes above 2 are halved until the layout has at most the given number of ranks.
- The number of layers is that of the stages, but at least 2, and at least a full period of layers that differ.
- The number of key heads is tp x cp, and query heads have the model's ratio to them, at most 4. Heads have width 8.
- Context, MLP and vocabulary are small. Models that are not decoders keep their sizes. `compile` is off.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bigtrain.config import UserError
from bigtrain.config.plugin import load_plugin
from bigtrain.models.config import ModelConfig
from bigtrain.models.decoder_config import DecoderConfig
from bigtrain.models.plain import PlainConfig
from bigtrain.parallel.config import LayoutConfig
from bigtrain.run import RunConfig, load_config
from bigtrain.testing.equivalence import How, What, build, deviations, gather, put, record
from bigtrain.testing.ranks import RankPool

MOST_RANKS = 16
HEAD_WIDTH = 8
MOST_HEADS_PER_KEY = 4
CONTEXT, VOCABULARY, BATCH, STEPS = 24, 61, 7, 3
LEAST_EPS = 1e-6
"""Smallest eps of Adam. A smaller one would turn gradients that consist of rounding errors into full steps."""
AXES = ("dp_replicate", "dp_shard", "cp", "pp", "tp")


def shrunk_layout(layout: LayoutConfig, ranks: int) -> tuple[dict[str, int], list[str]]:
    """Sizes of the mesh axes on at most `ranks` ranks, and messages about what was changed."""
    given = {axis: getattr(layout, axis) for axis in AXES}
    sizes = {axis: 2 if size == -1 else size for axis, size in given.items()}
    while math.prod(sizes.values()) > ranks:
        axis = max(AXES, key=lambda name: sizes[name])
        if sizes[axis] <= 2:
            axis = next(name for name in AXES if sizes[name] > 1)
        sizes[axis] = max(1, sizes[axis] // 2)
    changed = [
        f"layout.{axis}: {given[axis]} -> {sizes[axis]}" for axis in AXES if given[axis] not in (sizes[axis], -1)
    ]
    return sizes, changed


def shrunk_model(model: Any, layout: LayoutConfig) -> tuple[dict[str, Any], list[str]]:
    """The keys of a smaller section `model` without its context, and messages about what was changed."""
    plain = {key: value for key, value in model.plain().items() if key != "context"}
    if not isinstance(model, DecoderConfig):
        return plain, [f"a model of arch '{model.arch}' keeps its sizes"]
    keys = 1 if model.key_value_heads == 1 else layout.tp * layout.cp
    heads = keys * min(model.heads // model.key_value_heads, MOST_HEADS_PER_KEY)
    heads = math.lcm(heads, layout.tp * layout.cp)
    width = heads * HEAD_WIDTH
    periods = [every for every in (model.full_attention_every, model.no_rotary_every) if every]
    small: dict[str, Any] = {
        "layers": max(2, layout.stages, *periods),
        "width": width,
        "heads": heads,
        "mlp_width": layout.tp * (width // layout.tp + 3),
        "max_positions": None,
    }
    small["kv_heads"] = None if model.kv_heads is None else keys
    if model.head_width is not None:
        small["head_width"] = HEAD_WIDTH if model.head_width * model.heads == model.width else 2 * HEAD_WIDTH
    if model.sliding_window is not None:
        small["sliding_window"] = min(model.sliding_window, CONTEXT // 3)
    changed = [f"model.{key}: {plain[key]} -> {value}" for key, value in small.items() if plain[key] != value]
    return {**plain, **small}, changed


def plan_proof(config: RunConfig, ranks: int, plugin: str | None = None) -> tuple[What, How, list[str]]:
    """What is trained, how the layout runs it, and messages about what was changed.

    Args:
        config: The run's config.
        ranks: Largest number of ranks.
        plugin: The user's own code, as `--plugin` names it.

    Raises:
        UserError: The engine runs models of transformers, or the model has several parts.
    """
    if config.engine.runs_transformers:
        raise UserError(
            "A model of transformers cannot be proven: it does not run in native layouts",
            "engine.name",
            "Prove a run of the engine fsdp or deepspeed.",
        )
    if config.model.parts:
        raise UserError(
            f"A model of parts ({', '.join(config.model.parts)}) cannot be proven: each part is updated by its own "
            "loss",
            "model.arch",
            "Compare the losses of `bigtrain train` with --nproc 1 and --nproc 2.",
        )
    sizes, changed = shrunk_layout(config.layout, ranks)
    kept = {key: value for key, value in config.layout.plain().items() if key not in ("micro_size", "pp_split")}
    layout = LayoutConfig.model_validate({**kept, **sizes})
    model, smaller = shrunk_model(config.model, layout)
    multiple = layout.cp * math.lcm(2, layout.tp)
    context = -(-CONTEXT // multiple) * multiple
    optimizer = {key: value for key, value in config.optimizer.plain().items() if key not in ("lr", "clip", "frozen")}
    if "eps" in optimizer:
        optimizer["eps"] = max(optimizer["eps"], LEAST_EPS)
    engine = {**config.engine.plain(), **({"compile": False} if "compile" in config.engine.plain() else {})}
    what = What(
        model,
        documents=config.data.document_mask,
        context=context,
        vocabulary=VOCABULARY,
        batch=BATCH,
        steps=STEPS,
        clip=config.optimizer.plain()["clip"],
        frozen=tuple(config.optimizer.frozen),
        optimizer=optimizer,
        plugin=plugin,
    )
    changed += smaller
    changed.append(f"context {context}, vocabulary {VOCABULARY}, batch {BATCH}, {STEPS} steps, fp32")
    plain = layout.plain()
    plain.pop("micro_size")
    how = How(math.prod(sizes.values()), plain, engine, micro_size=None if _couples(config.model) else 1)
    return what, how, changed


def _couples(model: ModelConfig) -> bool:
    """Whether a model couples the samples of a batch (batch statistics, negatives), so it needs one micro-batch."""
    return isinstance(model, PlainConfig) and model.observed_facts(VOCABULARY, 0).couples


def resumed(what: What, how: How, directory: Path) -> list[str]:
    """Load a state that one process has recorded into this layout, and read it back. Collective.

    Returns:
        Messages about tensors that are missing or differ; empty if there are none.
    """
    engine = build(what, how)
    expected = load_file(directory / f"state-{what.steps - 1}.safetensors")
    put(engine.state(), expected)
    found = gather(engine.state())
    engine.close()
    missing = [f"{name} is missing after a resume" for name in expected.keys() - found.keys()]
    differ = [name for name, value in found.items() if name in expected and not torch.equal(value, expected[name])]
    return sorted(missing) + [f"{name} differs after a resume" for name in sorted(differ)]


def prove(what: What, how: How, pool: RankPool, directory: Path) -> list[str]:
    """Messages about differences between a layout and one process; empty if they agree.

    Args:
        what: What is trained.
        how: The layout and the engine.
        pool: At least `how.ranks` ranks.
        directory: Directory for the recorded results, which all ranks can read.
    """
    pool.run(record, what, directory, ranks=1)
    found = pool.run(deviations, what, how, directory, ranks=how.ranks)[0].faults()
    return found + pool.run(resumed, what, how, directory, ranks=how.ranks)[0]


def main(arguments: list[str]) -> int:
    """Run `bigtrain prove`, and return the exit code: 1 if the layout differs from one process."""
    parser = argparse.ArgumentParser(prog="bigtrain prove", description="Compare a run's layout with one process.")
    parser.add_argument("config", type=Path, help="A run's YAML.")
    parser.add_argument("overrides", nargs="*", help="key=value pairs laid over the file.")
    parser.add_argument("--ranks", type=int, default=8, help="CPU processes, at most (default: 8).")
    parser.add_argument("--plugin", help="Your own model: a .py file, a package or a module.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    options = parser.parse_intermixed_args(arguments)
    try:
        if not 1 <= options.ranks <= MOST_RANKS:
            raise UserError(f"{options.ranks} is not a valid number of ranks", "--ranks", f"Give 1 to {MOST_RANKS}.")
        if options.plugin:
            load_plugin(options.plugin)
        config = load_config(options.config, options.overrides)
        what, how, changed = plan_proof(config, options.ranks, options.plugin)
        with tempfile.TemporaryDirectory(prefix="bigtrain-prove-") as place:
            pool = RankPool(max(how.ranks, 1))
            try:
                faults = prove(what, how, pool, Path(place))
            finally:
                pool.close()
    except UserError as error:
        if options.json:
            print(json.dumps(error.as_json()))
        else:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps({"ranks": how.ranks, "changed": changed, "layout": how.layout, "faults": faults}))
    else:
        print("\n".join(f"shrunk: {line}" for line in changed))
        print(f"{how.ranks} processes against one, {what.steps} steps: {'they agree' if not faults else 'they differ'}")
        print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    # Ranks find functions by their module's name, but here that name is __main__. So the module is imported.
    from bigtrain.testing.prove import main as main_of_the_module

    sys.exit(main_of_the_module(sys.argv[1:]))
