"""The memory of measured rows, and the choice of what they do not print: it must fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bigtrain.models.decoder_config import GATED
from tests.bench.plan_rows import Row, block_parameters


def candidates(row: Row) -> list[Row]:
    """The row with each choice of what it does not print; itself where all is printed."""
    if not row.searched:
        return [row]
    found = []
    layers, pp = row.model.layers, row.layout.pp
    batch = row.micro_batches * row.sequences
    micros = (
        [micro for micro in (1, 2, 4, 8) if batch % micro == 0] if "micro_batch" in row.searched else [row.sequences]
    )
    per_rank = (
        [v for v in range(1, layers + 1) if layers % (pp * v) == 0] if pp > 1 and "stages" in row.searched else [1]
    )
    kinds: tuple[Any, ...] = (
        ("none", "attention", "full") if "recompute" in row.searched else (row.program.software.recomputes,)
    )
    for micro in micros:
        for stages in per_rank:
            for kind in kinds:
                if stages > 1 and batch // micro % pp:
                    continue
                layout = row.layout.model_copy(
                    update={
                        "pp_stages_per_rank": stages,
                        "pp_schedule": "interleaved" if stages > 1 else "1f1b",
                        "pp_split": (layers // (pp * stages),) * (pp * stages) if pp > 1 else "auto",
                    }
                )
                program = replace(row.program, software=replace(row.program.software, recomputes=kind))
                one = replace(row, layout=layout, program=program, sequences=micro, micro_batches=batch // micro)
                if peak_bytes(one) <= 78e9:
                    found.append(one)
    return found or [row]


def peak_bytes(row: Row) -> float:
    """Bytes that a rank allocates at its peak, on the stage that needs most (Megatron's and FSDP's states)."""
    model, sizes, layout, program = row.model, row.sizes, row.layout, row.program
    data = sizes.data_parallel * sizes.cp
    block, pp = block_parameters(model) / sizes.tp, sizes.pp
    rows = model.padded_vocab(row.vocab) * model.width / sizes.tp
    most = 0.0
    for place in range(min(pp, 2)):
        blocks = model.layers // pp
        ends = (rows if place == 0 or model.tied else 0) + (rows if pp == 1 and not model.tied else 0)
        held = blocks * block + ends
        states = held * {"none": 18.0, "zero1": 6 + 12 / data, "fsdp": 16.0 / data}[program.sharding]
        if program.sharding == "fsdp":
            states += 2 * block * (2 + 4) + rows * 6
        passes = min(pp - place, row.micro_batches) if pp > 1 else 1
        if layout.pp_stages_per_rank > 1:
            passes = passes * (1 + (pp - 1) / (pp * layout.pp_stages_per_rank))
        kept = _kept_by_block(row) * blocks * passes
        tokens = row.sequences * model.context / sizes.cp
        last = tokens * model.padded_vocab(row.vocab) / sizes.tp * program.logit_bytes if place == pp - 1 else 0.0
        most = max(most, states + kept + last + _working(row))
    return most


def _working(row: Row) -> float:
    """What the backward pass of one MLP holds beside what is kept."""
    tokens = row.sequences * row.model.context / row.sizes.cp
    gated = row.model.mlp in GATED
    return tokens * 2 * ((3 if gated else 2) * row.model.hidden_width / row.sizes.tp + 2 * row.model.width)


def _kept_by_block(row: Row) -> float:
    model, sizes, software = row.model, row.sizes, row.program.software
    tokens = row.sequences * model.context / sizes.cp
    stream = sizes.tp if row.program.sequence_parallel else 1
    if software.recomputes == "full":
        return 2 * tokens * model.width / stream
    heads, keys = (count * model.width_of_head / sizes.tp for count in (model.heads, model.key_value_heads))
    gated = model.mlp in GATED
    if software.recomputes == "selective":
        # torchtitan keeps every second product (q, v, gate, down), attention's result, and the block's input.
        return tokens * 2 * (model.width + 2 * heads + keys + model.hidden_width / sizes.tp + model.width / stream)
    # Norms' inputs, what the columns multiply (a slice of it under sequence parallelism), q, k, v, the result, the MLP.
    kept = (
        2 * 2 * model.width / stream * 2
        + 2 * (2 * heads + 2 * keys)
        + 2 * (3 if gated else 2) * model.hidden_width / sizes.tp
    )
    pairs = 0.0 if software.attention == "fused" or software.recomputes == "attention" else 5.0
    return tokens * (kept + pairs * model.heads / sizes.tp * model.context)
