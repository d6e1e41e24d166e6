"""Measured rows of others as planning's own objects: what each program computes and exchanges in a step.

Their programs are not this package's. Each differs in the fields of `Program`, which say what its documentation and
code say; what a row does not print (micro-batch, recompute) is searched as its authors would have: the fastest by
prediction that fits the memory is taken, and the row is marked.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from bigtrain.models.decoder_config import DecoderConfig
from bigtrain.parallel.config import LayoutConfig, Mesh
from bigtrain.planning.communication import Collective, Kind, Term
from bigtrain.planning.kernels import Work
from bigtrain.planning.step import StageWork, Step
from bigtrain.planning.work import RankWork, Software, block_work, rank_works

REFERENCE = Path(__file__).with_name("reference")
DIVISION: dict[str, list[dict[str, list[Any]]]] = yaml.safe_load((REFERENCE / "division.yaml").read_text())


class _Decoder(DecoderConfig):
    """A shape without a family."""

    arch: str = "decoder"


@dataclass(frozen=True)
class Program:
    """What a training program does that matters to a step's time and memory."""

    software: Software
    sharding: str = "none"
    """none: gradients are summed once. zero1: reduced and gathered once. fsdp: as ZeRO-3, for each pass."""
    gradient_bytes: int = 4
    logit_bytes: int = 6
    """Of each logit at the peak."""
    sequence_parallel: bool = False
    overlaps: bool = False
    overlaps_tensor: bool = False
    """Whether exchanges of activations are pipelined with the products beside them."""


@dataclass(frozen=True, eq=False)
class Row:
    """One measured step."""

    table: str
    group: str
    """Source and GPU type, in one word each."""
    rates: str
    """Which calibrated constants count."""
    label: str
    model: DecoderConfig
    vocab: int
    layout: LayoutConfig
    sizes: Mesh
    program: Program
    micro_batches: int
    sequences: int
    measured_s: float
    mfu_flops: float
    """Model FLOPs of a step on one GPU, by which a constant MFU predicts."""
    calibrates: bool
    searched: tuple[str, ...] = ()
    """Inputs that the row does not print."""
    peak_bytes: float | None = None
    single_layer: bool = False
    network_bytes_per_s: float | None = None
    """Of one GPU between nodes, where a source states another than the entry's."""


def decoder(kind: str, **keys: Any) -> DecoderConfig:
    """A shape: "gpt" (LayerNorm, GELU, biases, learned positions, tied), "mpt" (no biases), "llama"."""
    kinds: dict[str, dict[str, Any]] = {
        "gpt": {"norm": "layernorm", "mlp": "gelu_tanh", "positions": "learned", "tied": True, "bias": True},
        "mpt": {"norm": "layernorm", "mlp": "gelu", "positions": "learned", "tied": True},
        "llama": {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rotary"},
    }
    return _Decoder(**kinds[kind], **keys)


def step_of(row: Row) -> Step:
    """The step of a row."""
    program, layout, sizes, model = row.program, row.layout, row.sizes, row.model
    if row.single_layer:
        one = block_work(model, row.sequences, layout, program.software, 2)
        return Step(
            (_stage(row, RankWork(1, False, False, (one.forward, one.again + one.backward), (Work(), Work()), (0,))),),
            sizes,
            1,
        )
    stages = []
    for work in rank_works(model, row.vocab, row.sequences, layout, program.software, 2):
        stages.append(_stage(row, work))
    return Step(
        tuple(stages),
        sizes,
        row.micro_batches,
        overlaps=program.overlaps,
        stages_per_rank=layout.pp_stages_per_rank,
        schedule=layout.pp_schedule,
        once_a_step=program.sharding != "fsdp",
        critical_share=1 / sizes.tp if program.overlaps_tensor else 1.0,
    )


def _stage(row: Row, work: RankWork) -> StageWork:
    blocks, first, last = work.blocks, work.is_first, work.is_last
    model, sizes, program, m = row.model, row.sizes, row.program, row.micro_batches
    tokens = row.sequences * model.context // sizes.cp
    stream = tokens * model.width * 2
    sequence_parallel = program.sequence_parallel and sizes.tp > 1
    again = blocks if program.software.recomputes == "full" else 0
    critical = []
    if sizes.tp > 1:
        if sequence_parallel:
            critical += [_term("all_gather", "tp", stream, m * (6 * blocks + 2 * again))]
            critical += [_term("reduce_scatter", "tp", stream, m * (4 * blocks + again))]
        else:
            critical += [_term("all_reduce", "tp", stream, m * (4 * blocks + 2 * again))]
        critical += [_term("all_reduce", "tp", stream, m * (first + last))]
    if sizes.cp > 1:
        ring = 2 * model.key_value_heads * model.width_of_head // sizes.tp * row.sequences * model.context * 2
        critical += [_term("all_gather", "cp", ring, m * blocks * 3)]
    messages = []
    if sizes.pp > 1:
        size = stream // (sizes.tp if sequence_parallel else 1)
        messages = [_term("send", "pp", size, m * row.layout.pp_stages_per_rank * ((not first) + (not last)))]
    block = block_parameters(model) // sizes.tp
    ends = (first + last) * model.padded_vocab(row.vocab) * model.width // sizes.tp
    if sizes.pp == 1 and model.tied:
        ends //= 2
    parameters = blocks * block + ends
    data = sizes.data_parallel * sizes.cp
    gathers, reductions = _of_data_ranks(program, m, blocks, block, ends) if data > 1 else ([], [])
    once = []
    if sizes.pp > 1 and model.tied and (first or last):
        once = [_term("all_reduce", "pp", ends * program.gradient_bytes, 1)]
    trained = parameters / (data if program.sharding != "none" else 1)
    if row.single_layer:
        trained = 0.0
    return StageWork(
        work.block,
        work.ends,
        tuple(critical),
        tuple(messages),
        tuple(gathers),
        tuple(reductions),
        tuple(once),
        blocks,
        trained,
        len(work.places),
    )


def _of_data_ranks(program: Program, m: int, blocks: int, block: int, ends: int) -> tuple[list[Term], list[Term]]:
    """What gathers parameters and what reduces gradients, of m micro-batches; sizes are numbers of parameters."""
    sizes, counts = (block, ends), (blocks, 1)
    gradients = [size * program.gradient_bytes for size in sizes]
    if program.sharding == "fsdp":
        gathers = [
            _term("all_gather", "dp_shard", block * 2, 2 * m * blocks),
            _term("all_gather", "dp_shard", ends * 2, m),
        ]
        return gathers, [_term("reduce_scatter", "dp_shard", g, m * n) for g, n in zip(gradients, counts, strict=True)]
    if program.sharding == "zero1":
        gathers = [_term("all_gather", "dp_shard", size * 2, n) for size, n in zip(sizes, counts, strict=True)]
        return gathers, [_term("reduce_scatter", "dp_shard", g, n) for g, n in zip(gradients, counts, strict=True)]
    return [], [_term("all_reduce", "dp_shard", (blocks * block + ends) * program.gradient_bytes, 1)]


def block_parameters(model: DecoderConfig) -> int:
    return sum(math.prod(shape) for name, shape in _shapes_of_a_block(model).items())


def _shapes_of_a_block(model: DecoderConfig) -> dict[str, tuple[int, ...]]:
    one = model.model_copy(update={"layers": 1})
    return {name: shape for name, shape in one.parameter_shapes(1).items() if name.startswith("layers.")}


def _term(kind: Kind, axis: str, size: int, count: int) -> Term:
    return Term(Collective(kind, (axis,), size), count, "")


def read(path: Path) -> Iterator[Row]:
    """The rows of a table, by the form of its columns.

    Raises:
        ValueError: Columns of no known table.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = set(rows[0])
    if "source" in columns:
        yield from filter(None, map(_published, rows))
    elif "peak_allocated_gib" in columns:
        yield from filter(None, map(_simumax, rows))
    elif {"hidden", "step_time_s", "params_B"} <= columns:
        yield from map(_vtrain, rows)
    else:
        raise ValueError(f"{path}: columns of no table that is known here: {', '.join(sorted(columns))}")


def calibrates(table: str, raw: dict[str, str]) -> bool:
    """Whether a row is on the calibration side of the committed division."""

    def same(value: str, listed: list[Any]) -> bool:
        return any(value == str(one) for one in listed)

    return any(all(same(raw[key], listed) for key, listed in rule.items()) for rule in DIVISION[table])


VTRAIN = Program(Software(attention="scores", recomputes="full", merged=True, loss="steps"))
MEGATRON_2021 = VTRAIN
MEGATRON_2024 = Program(
    Software(attention="fused", recomputes="none", merged=True, compiled=True),
    sharding="zero1",
    sequence_parallel=True,
    overlaps=True,
    overlaps_tensor=True,
)
SIMUMAX = replace(MEGATRON_2024, overlaps_tensor=False)
MPT = Program(Software(attention="fused", merged=True), sharding="fsdp", gradient_bytes=2, overlaps=True)
TORCHTITAN = Program(
    Software(recomputes="selective", products_again=0.5),
    sharding="fsdp",
    gradient_bytes=4,
    logit_bytes=10,
    overlaps=True,
)


def _vtrain(raw: dict[str, str]) -> Row:
    gpus, tp, dp, pp = (int(raw[key]) for key in ("gpus", "tp", "dp", "pp"))
    batch, micro = int(raw["global_batch"]), int(raw["micro_batch"])
    layers = int(raw["layers"])
    multi = gpus > 8
    model = decoder(
        "gpt",
        width=int(raw["hidden"]),
        heads=int(raw["heads"]),
        layers=layers,
        context=int(raw["seq_len"]),
        vocab_multiple=128 * tp if tp > 1 or multi else 1,  # unpadded at tp 1 of one node: no multiple of 8, and slow
    )
    table = "vtrain_multi" if multi else "vtrain_single"
    layout = LayoutConfig(
        tp=tp, pp=pp, dp_shard=dp, sequence_parallel=False, pp_split=(layers // pp,) * pp if pp > 1 else "auto"
    )
    label = f"h{model.width} l{layers} tp{tp} dp{dp} pp{pp} mb{micro} gb{batch}"
    rates = "a100-vtrain-cluster" if multi else "a100-vtrain"
    flops = model.flops_per_token(50257).full * batch * model.context / gpus
    mesh = Mesh(pp=pp, dp_shard=dp, tp=tp)
    return Row(
        table,
        f"{table} a100",
        rates,
        label,
        model,
        50257,
        layout,
        mesh,
        VTRAIN,
        batch // (dp * micro),
        micro,
        float(raw["step_time_s"]),
        flops,
        calibrates(table, raw),
        network_bytes_per_s=12.5e9,
    )


def _simumax(raw: dict[str, str]) -> Row | None:
    if raw["ep"] != "1" or "llama" not in raw["model"]:
        return None  # experts are not covered
    tp, cp, pp, dp, layers, seq = (int(raw[key]) for key in ("tp", "cp", "pp", "dp", "layers", "seq_len"))
    micro, count = int(raw["micro_batch"]), int(raw["micro_batches"])
    model = decoder("llama", width=8192, heads=64, kv_heads=8, mlp_width=28672, layers=layers, context=seq)
    layout = LayoutConfig(tp=tp, cp=cp, pp=pp, dp_shard=dp, pp_split=(layers // pp,) * pp if pp > 1 else "auto")
    mesh = Mesh(pp=pp, dp_shard=dp, cp=cp, tp=tp)
    return Row(
        "simumax_b200",
        "simumax b200",
        "b200-megatron",
        raw["case"],
        model,
        128256,
        layout,
        mesh,
        SIMUMAX,
        count,
        micro,
        float(raw["step_time_s"]),
        model.flops_per_token(128256).full * count * micro * seq * dp / 8,
        calibrates("simumax_b200", raw),
        peak_bytes=float(raw["peak_allocated_gib"]) * 2**30,
    )


def _published(raw: dict[str, str]) -> Row | None:
    source = raw["source"]
    if "tpu" in raw["gpu_type"]:
        return None
    if source.startswith("llm-foundry"):
        return _mpt(raw)
    if "torchtitan" in source:
        return _torchtitan(raw)
    return _megatron(raw)


def _mpt(raw: dict[str, str]) -> Row:
    kind, gpus, seq = raw["gpu_type"][:4], int(raw["gpus"]), int(raw["seq_len"])
    model = decoder("mpt", width=int(raw["hidden"]), heads=int(raw["heads"]), layers=int(raw["layers"]), context=seq)
    micro, batch = int(raw["micro_batch"]), int(raw["global_batch"])
    recompute = raw["recompute"]
    program = replace(MPT, software=replace(MPT.software, recomputes=recompute))
    label = f"{raw['model']} s{seq} g{gpus} mb{micro} {recompute}"
    return Row(
        "throughput_tables",
        f"mpt {kind}",
        f"{kind.strip('_')}-mpt",
        label,
        model,
        50368,
        LayoutConfig(),
        Mesh(dp_shard=gpus),
        program,
        batch // (gpus * micro),
        micro,
        float(raw["step_time_s"]),
        model.flops_per_token(50368).full * batch * seq / gpus,
        calibrates("throughput_tables", raw),
    )


def _torchtitan(raw: dict[str, str]) -> Row:
    gpus, seq, micro = int(raw["gpus"]), int(raw["seq_len"]), int(raw["micro_batch"])
    model = decoder("llama", width=4096, heads=32, kv_heads=8, mlp_width=14336, layers=32, context=seq)
    compiled = "compile;" in raw["source"]
    program = replace(TORCHTITAN, software=replace(TORCHTITAN.software, compiled=compiled, decomposed=not compiled))
    tokens = float(raw["tokens_per_s_per_gpu"])
    label = f"8B g{gpus} {'compile' if compiled else 'eager'}"
    return Row(
        "throughput_tables",
        "torchtitan h100",
        "h100-torchtitan",
        label,
        model,
        128256,
        LayoutConfig(),
        Mesh(dp_shard=gpus),
        program,
        1,
        micro,
        micro * seq / tokens,
        model.flops_per_token(128256).full * micro * seq,
        calibrates("throughput_tables", raw),
        peak_bytes=float(raw["mem_GB"]) * 2**30,
    )


@dataclass(frozen=True)
class _Study:
    """What rows of Megatron-LM share that one study published."""

    group: str
    rates: str
    program: Program
    searched: tuple[str, ...]
    step_s: float


def _megatron_study(raw: dict[str, str], model: DecoderConfig, vocab: int, flops: float) -> _Study:
    """The study of a row; `flops` are a GPU's of a step."""
    if "weak scaling" in raw["source"]:
        searched = ("micro_batch", "stages", "recompute")
        step_s = flops / (float(raw["tflops_per_gpu"]) * 1e12)
        return _Study("megatron h100", "h100-megatron", MEGATRON_2024, searched, step_s)
    if "SC21" in raw["source"]:
        # The paper's own count of FLOPs, which holds the recomputation (Narayanan et al. 2021, section 5.1).
        layers, width, seq = int(raw["layers"]), model.width, int(raw["seq_len"])
        share = 1 + seq / (6 * width) + vocab / (16 * layers * width)
        counted = 96 * int(raw["global_batch"]) * seq * layers * width**2 * share
        step_s = counted / int(raw["gpus"]) / (float(raw["tflops_per_gpu"]) * 1e12)
        return _Study("sc21 a100", "a100-megatron", MEGATRON_2021, ("micro_batch", "stages"), step_s)
    how = raw["recompute"]
    again = "full" if how.startswith("full") else "attention" if how.startswith("selective") else "none"
    program = Program(
        Software(attention="scores", recomputes=again, merged=True, loss="steps"),
        sequence_parallel="sequence parallel" in how and "no sequence" not in how,
    )
    searched = () if raw["pp"] == "1" else ("stages",)
    return _Study("korthikanti a100", "a100-megatron", program, searched, float(raw["step_time_s"]))


def _megatron(raw: dict[str, str]) -> Row:
    gpus, seq, layers = int(raw["gpus"]), int(raw["seq_len"]), int(raw["layers"])
    dp, tp, pp = (int(raw[key]) for key in ("dp", "tp", "pp"))
    vocab = int(raw["vocab"] or 51200)
    model = decoder(
        "gpt", width=int(raw["hidden"]), heads=int(raw["heads"]), layers=layers, context=seq, vocab_multiple=tp
    )
    batch = int(raw["global_batch"])
    flops = model.flops_per_token(vocab).full * batch * seq / gpus
    study = _megatron_study(raw, model, vocab, flops)
    micro = int(raw["micro_batch"] or 1)
    split: Any = (layers // pp,) * pp if pp > 1 else "auto"
    layout = LayoutConfig(tp=tp, pp=pp, dp_shard=dp, sequence_parallel=study.program.sequence_parallel, pp_split=split)
    return Row(
        "throughput_tables",
        study.group,
        study.rates,
        f"{raw['model']} g{gpus} tp{tp} pp{pp} {raw['recompute']}",
        model,
        vocab,
        layout,
        Mesh(pp=pp, dp_shard=dp, tp=tp),
        study.program,
        max(1, batch // (dp * micro)),
        micro,
        study.step_s,
        flops,
        calibrates("throughput_tables", raw),
        study.searched,
        single_layer=raw["model"].endswith("one layer"),
    )


def skipped(path: Path) -> dict[str, int]:
    """Rows of a table that are not covered, by the reason."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    counts = {
        "TPU": sum("tpu" in row.get("gpu_type", "") for row in rows),
        "models with experts": sum(row.get("ep", "1") != "1" or "deepseek" in row.get("model", "") for row in rows),
    }
    return {why: count for why, count in counts.items() if count}
