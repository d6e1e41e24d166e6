"""The lines that are printed when a run starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TextIO

from bigtrain.checkpoint import commit
from bigtrain.hardware.this_machine import multiplies_bf16, this_machine
from bigtrain.jobs.check import CheckedRun
from bigtrain.jobs.placer_kinds import kind_of
from bigtrain.training.prepare import Prepared


def say_start(run: CheckedRun, count: int, stream: TextIO) -> None:
    """Print what is trained, on how many processes and from which checkpoint.

    Args:
        run: The run that starts.
        count: World size.
        stream: Receives the lines.
    """
    prepared = run.prepared
    config = prepared.config
    newest = run.newest
    kind = prepared.train.sample_kind
    per_step = prepared.batch_sequences * kind.units(prepared.context)
    init = config.init
    begins = "from step 0" if init.source is None else f"from {init.source} ({init.state})"
    where = f"resuming after step {newest}" if newest is not None else begins
    if prepared.is_mixture:
        epochs = ", ".join(f"{name} {count:.2f}" for name, count in prepared.epochs(prepared.total_steps).items())
    else:
        (count_of_all,) = prepared.epochs(prepared.total_steps).values()
        epochs = f"{count_of_all:.2f}"
    parameters = config.model.parameter_count(prepared.outputs)
    lines = [
        f"{config.name}: {parameters / 1e6:.2f}M parameters, {prepared.total_steps} steps of {per_step} {kind.unit} "
        f"({epochs} epochs), {count} process{'es' if count > 1 else ''}, {config.engine.name}{_axes(prepared, count)}, "
        f"{config.precision}, {where}",
    ]
    lines += [f"warning: {line}" for line in prepared.warnings()]
    if waste := _filler_share(prepared, count):
        lines.append(
            f"{waste:.1%} of each step is padding: {_divisor(prepared, count)} not divide a batch of "
            f"{prepared.batch_sequences}"
        )
    print("\n".join([*lines, *_surprises(run)]), file=stream, flush=True)


def _surprises(run: CheckedRun) -> Iterator[str]:
    """Warnings about the run: a copied or renamed directory, slow BF16, damaged or missing checkpoints."""
    directory = run.directory
    if directory.exists() and (started := directory.read_record().get("name", directory.name)) != directory.name:
        yield (
            f"{directory.path} is a copy of the run '{started}', or the run was renamed; it continues as "
            f"'{directory.name}'"
        )
    config = run.prepared.config
    by_bf16 = config.precision == "bf16" and kind_of(config.job).name == "local"
    if by_bf16 and not multiplies_bf16() and this_machine().n_devices == 0:
        yield (
            "warning: this processor has no instructions for BF16, so its matrix products are many times slower "
            "than in FP32; precision=fp32 is faster here"
        )
    for checkpoint in commit.list_checkpoints(directory.checkpoints) if run.back_to is None else ():
        newer = run.newest is None or checkpoint.step > run.newest
        if newer and (problems := commit.verify(checkpoint.path, hashes=False)):
            yield f"warning: {commit.passed_over(checkpoint, problems)}"
    missing = commit.missing_latest(directory.checkpoints)
    if missing is not None:
        yield f"warning: {missing}" + ("" if run.newest is None else f"; the run continues from step {run.newest}")


def _divisor(prepared: Prepared, count: int) -> str:
    return f"{count} ranks do" if prepared.config.layout.pp == 1 else "the micro-batches of its pipeline do"


def _axes(prepared: Prepared, count: int) -> str:
    """The axes of the mesh that have more than one rank: " (dp_shard 2 x tp 2)"."""
    sizes = vars(prepared.config.layout.mesh(count))
    named = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
    return f" ({named})" if named else ""


def _filler_share(prepared: Prepared, count: int) -> float:
    from bigtrain.data.loader import distribute

    ranks = prepared.config.layout.mesh(count).data_parallel
    layout = prepared.config.layout
    distribution = distribute(
        prepared.batch_sequences,
        ranks,
        layout.micro_size or prepared.batch_sequences,
        least=layout.least_micro_batches,
        multiple=layout.micro_batch_multiple,
    )
    return distribution.fillers / (distribution.fillers + prepared.batch_sequences)
