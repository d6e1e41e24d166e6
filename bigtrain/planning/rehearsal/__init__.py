"""A rehearsal runs the real code of some ranks of a run at its full world size, in one process on fake tensors.

    document = rehearse(config, outputs, gpus=16_384)
    document["faults"]                                   # messages about what would go wrong; empty if nothing would

It runs the first, a middle and the last pp rank, one after the other. It compares each rank's memory and collectives
with the formulas of `bigtrain plan`, and checks what the rank would save in a checkpoint.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from bigtrain.config import UserError
from bigtrain.data.loader import distribute
from bigtrain.engines.fsdp.config import FSDPConfig
from bigtrain.hardware.cluster import cluster
from bigtrain.models.config import BlockCosts
from bigtrain.parallel.config import Mesh
from bigtrain.planning.communication import Collective, Passes, total
from bigtrain.planning.estimate import Job
from bigtrain.planning.rehearsal.checkpoint import checkpoint_faults
from bigtrain.planning.rehearsal.memory import KINDS
from bigtrain.planning.rehearsal.ranks import Plant, RehearsalError, Role, Seen, rehearsed

__all__ = ["rehearsal_text", "rehearse"]

FORMAT_VERSION = 1
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
MOST_PASSES = 2
"""Largest number of micro-batches that are rehearsed, as a multiple of pp; more would only repeat the same passes."""
HELD = ("parameters", "gradients", "optimizer")
"""The kinds of memory for which the formulas are exact."""


def rehearse(config: Any, outputs: int, gpus: int, plant: Plant | None = None) -> dict[str, Any]:
    """Rehearse the first, a middle and the last pp rank of a run.

    Args:
        config: The run's `RunConfig`.
        outputs: Number of vocabulary entries, or of classes.
        gpus: World size of the run.
        plant: Breaks each rank's engine, to test that the rehearsal finds the fault.

    Returns:
        Plain values, for JSON: `faults`, and for each rank its memory by kind and its collectives, each with the value
        of the formulas.

    Raises:
        UserError: The layout is not possible, or the engine or the model cannot be rehearsed.
    """
    role, sizes, batch_passes = _role(config, outputs, gpus)
    job = _formulas(config, outputs)
    faults: list[str] = []
    ranks, names = [], {}
    for place in sorted({0, sizes.pp // 2, sizes.pp - 1}):
        rank = place * (sizes.world_size // sizes.pp)
        where = f"rank {rank}" + (f" (stage {place} of {sizes.pp})" if sizes.pp > 1 else "")
        try:
            with rehearsed(role, rank, plant) as seen:
                row, found = _compared(seen, job, role, sizes, place)
                found += checkpoint_faults(seen.state)
                names[place] = set(seen.state)
                shared = seen.shared
        except RehearsalError as error:
            faults.append(f"{where}: {error}")
            continue
        found += _held_twice(names, place, shared)
        ranks.append({**row, "faults": found})
        faults += [f"{where}: {line}" for line in found]
    return {
        "format_version": FORMAT_VERSION,
        "kind": "bigtrain rehearsal",
        "gpus": gpus,
        "mesh": asdict(sizes),
        "passes": role.passes.count,
        "passes_of_a_step": batch_passes,
        "sequences": role.passes.sequences,
        "formulas": job is not None,
        "ranks": ranks,
        "faults": faults,
    }


def _role(config: Any, outputs: int, gpus: int) -> tuple[Role, Mesh, int]:
    engine = config.engine
    if not isinstance(engine, FSDPConfig):
        raise UserError(
            f"The engine '{engine.name}' starts its own threads and kernels, which do not run on fake tensors",
            "engine.name",
            "Rehearse with engine.name=fsdp, or run `bigtrain prove`.",
        )
    try:
        sizes = config.layout.mesh(gpus)
        config.layout.check(config.model, outputs)
    except ValueError as error:
        raise UserError(str(error), "layout", "Change --gpus or the layout.") from None
    context = config.model.context
    batch = config.batch.size.sequences(context)
    layout = config.layout
    shared = distribute(
        batch,
        sizes.data_parallel,
        layout.micro_size or batch,
        least=layout.least_micro_batches,
        multiple=layout.micro_batch_multiple,
    )
    passes = Passes(min(shared.n_micro, MOST_PASSES * sizes.pp), shared.micro_batch, context)
    role = Role(
        config.model,
        outputs,
        config.optimizer,
        # Blocks are not compiled, because tensors have no values. Compilation does not change collectives.
        engine.model_copy(update={"compile": False}),
        layout,
        config.precision,
        config.seed,
        config.data.document_mask,
        gpus,
        passes,
    )
    return role, sizes, shared.n_micro


def _formulas(config: Any, outputs: int) -> Job | None:
    try:
        return Job.of(config, outputs)
    except UserError:
        return None


def _compared(seen: Seen, job: Job | None, role: Role, sizes: Mesh, place: int) -> tuple[dict[str, Any], list[str]]:
    faults = _stage_faults(seen, role, place)
    exchanged = Counter(seen.collectives)
    promised: Counter[Collective] | None = None
    memory: dict[str, dict[str, int | None]] = {
        kind: {"rehearsed": seen.peak[kind], "formula": None} for kind in (*KINDS, "total")
    }
    if job is not None:
        promised = total(job.terms(sizes, role.passes, seen.rank, on_cpu=True))
        formula = job.memory(sizes, role.passes, place, cluster("cpu")).plain()
        formula["working"] += formula.pop("logits")
        formula["activations"] += formula.pop("messages")
        for kind in memory:
            memory[kind]["formula"] = formula[kind]
        for kind in HELD:
            found, expected = getattr(seen.held, kind), formula[kind]
            if found != expected:
                faults.append(f"{kind} take {found:,} bytes, but the formula says {expected:,}")
        for one in sorted(set(exchanged) | set(promised)):
            if exchanged[one] != promised[one]:
                faults.append(
                    f"{one.kind} over {_axes(one)} of {one.bytes:,} bytes: {exchanged[one]} times, but the formula "
                    f"says {promised[one]}"
                )
    rows = [
        {
            **asdict(one),
            "axes": list(one.axes),
            "rehearsed": exchanged[one],
            "formula": None if promised is None else promised[one],
        }
        for one in sorted(set(exchanged) | set(promised or ()))
    ]
    return {"rank": seen.rank, "stage": place, "blocks": seen.blocks, "memory": memory, "collectives": rows}, faults


def _stage_faults(seen: Seen, role: Role, place: int) -> list[str]:
    """Faults of stages whose number of blocks differs from the layout's."""
    costs: BlockCosts | None = role.model.block_costs(role.outputs)
    if costs is None or role.layout.stages == 1:
        return []
    expected = list(role.layout.split(costs)[place :: role.layout.pp])
    if seen.blocks == expected:
        return []
    if 0 in seen.blocks:
        return [f"a stage has no layers: its stages hold {seen.blocks} blocks, but the layout assigns them {expected}"]
    return [f"its stages hold {seen.blocks} blocks, the layout gives them {expected}"]


def _held_twice(names: dict[int, set[str]], place: int, shared: frozenset[str]) -> list[str]:
    """Faults of parameters that two stages save, except those of a tied embedding."""
    return [
        f"{name} is saved by stage {other} too"
        for other, held in names.items()
        if other != place
        for name in sorted(held & names[place])
        if not any(one in name for one in shared)
    ]


def _axes(one: Collective) -> str:
    return " x ".join(one.axes) or "no axis"


def _size(count: int) -> str:
    unit, name = next((one for one in UNITS if count >= one[0]), UNITS[-1])
    return f"{count / unit:.4g} {name}"


def rehearsal_text(document: dict[str, Any]) -> str:
    """The document as text for a terminal."""
    axes = " ".join(f"{axis} {size}" for axis, size in document["mesh"].items() if size > 1) or "one process"
    lines = [
        f"rehearsed on {document['gpus']} ranks ({axes}): {document['passes']} of {document['passes_of_a_step']} "
        f"passes of {document['sequences']} sequences, fake tensors, kernels of a CPU"
    ]
    if not document["formulas"]:
        lines.append("the formulas do not cover this model: nothing to compare with")
    for row in document["ranks"]:
        blocks = " + ".join(map(str, row["blocks"]))
        lines.append(f"rank {row['rank']}, stage {row['stage']}: {blocks} blocks")
        lines.append(f"  {'memory at the peak':28} {'rehearsed':>12} {'formula':>12}")
        for kind, one in row["memory"].items():
            formula = "" if one["formula"] is None else _size(one["formula"])
            lines.append(f"  {kind:28} {_size(one['rehearsed']):>12} {formula:>12}")
        lines.append(f"  {'collectives of a step':28} {'bytes':>16} {'rehearsed':>10} {'formula':>8}")
        for one in row["collectives"]:
            formula = "" if one["formula"] is None else str(one["formula"])
            name = f"{one['kind']} over {' x '.join(one['axes']) or 'no axis'}"
            lines.append(f"  {name:28} {one['bytes']:16,} {one['rehearsed']:10} {formula:>8}")
    lines += [f"fault: {line}" for line in document["faults"]] or [
        "no faults: the run starts, and does what the plan says"
    ]
    return "\n".join(lines)
