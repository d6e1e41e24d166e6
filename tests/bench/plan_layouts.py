"""Whether the planner chooses the layouts that others measured to be best, or published."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from bigtrain.hardware.cluster import Cluster
from bigtrain.parallel.config import Mesh
from tests.bench.plan_calibrate import predicted_s
from tests.bench.plan_memory import peak_bytes
from tests.bench.plan_rows import Row

Machines = Callable[[str], Cluster]
MEMORY_BYTES = 76e9
TOO_SLOW, BEST = 1.05, 3


def layouts_report(rows: list[Row], machine_of: Machines) -> list[str]:
    """Both comparisons in words."""
    return [*measured_choices(rows, machine_of), *published_choices(rows, machine_of)]


def measured_choices(rows: list[Row], machine_of: Machines) -> Iterator[str]:
    """vTrain's single node: every layout was measured, so the choice has a measured price."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        if row.table == "vtrain_single":
            batch = row.micro_batches * row.sequences * row.sizes.data_parallel
            groups[row.model.width, row.model.layers, row.sizes.world_size, batch].append(row)
    groups = {key: members for key, members in groups.items() if len(members) > 1}
    if not groups:
        return
    losses = []
    for members in groups.values():
        chosen = min(members, key=lambda row: predicted_s(row, machine_of(row.rates)))
        losses.append(chosen.measured_s / min(row.measured_s for row in members))
    good = sum(loss <= TOO_SLOW for loss in losses)
    yield (
        f"vtrain_single: the first choice is at most 5 % slower than the measured best in {good} of {len(losses)} "
        f"(model, GPUs, batch): {good / len(losses):.0%}; at most {max(losses) - 1:.1%} slower"
    )


def published_choices(rows: list[Row], machine_of: Machines) -> Iterator[str]:
    """Layouts that publications chose, among all legal ones by prediction."""
    models: dict[tuple[str, int, int, int], Row] = {}
    for row in rows:
        if row.table == "vtrain_multi" or (
            "megatron" in row.rates and not row.single_layer and row.table != "simumax_b200"
        ):
            key = (row.group, row.model.width, row.model.layers, row.sizes.world_size)
            if key not in models or row.measured_s < models[key].measured_s:
                models[key] = row
    if not models:
        return
    good = slow = 0
    for row in models.values():
        on = machine_of(row.rates)
        times = sorted(predicted_s(one, on) for one in legal(row))
        own = predicted_s(row, on)
        place = sum(time < own * (1 - 1e-9) for time in times) + 1
        fine = place <= BEST or own <= TOO_SLOW * times[0]
        slower = sum(time > 1.1 * times[0] for time in times) / len(times)
        good, slow = good + fine, slow + (slower >= 0.5)
        layout = f"tp{row.sizes.tp} pp{row.sizes.pp} dp{row.sizes.data_parallel}"
        yield (
            f"{row.group:18} {row.label.split()[0]:10} {row.sizes.world_size:5} GPUs, {layout:16}: "
            f"place {place:2} of {len(times):3}, "
            f"{own / times[0] - 1:+.1%} from the best; {slower:.0%} of layouts more than 10 % slower"
            f"{'' if fine else '  MISSED'}"
        )
    yield (
        f"published layouts within the best three or 5 %: {good} of {len(models)}; "
        f"half of the layouts 10 % slower in {slow}"
    )


def legal(row: Row) -> Iterator[Row]:
    """The row at each legal tp and pp, each with its best searched micro-batch and stages."""
    world = row.sizes.world_size
    batch = row.micro_batches * row.sequences * row.sizes.data_parallel
    for tp in (1, 2, 4, 8):
        for pp in range(1, row.model.layers + 1):
            if row.model.layers % pp or world % (tp * pp) or row.model.heads % tp or batch % (world // (tp * pp)):
                continue
            data = world // (tp * pp)
            split: Any = (row.model.layers // pp,) * pp if pp > 1 else "auto"
            layout = row.layout.model_copy(
                update={
                    "tp": tp,
                    "pp": pp,
                    "dp_shard": data,
                    "pp_split": split,
                    "pp_stages_per_rank": 1,
                    "pp_schedule": "1f1b",
                }
            )
            searched = (*row.searched, "micro_batch", "stages")
            program = replace(row.program, sequence_parallel=row.program.sequence_parallel and tp > 1)
            one = replace(
                row,
                layout=layout,
                sizes=Mesh(pp=pp, dp_shard=data, tp=tp),
                micro_batches=batch // data,
                sequences=1,
                searched=tuple(dict.fromkeys(searched)),
                program=program,
            )
            if peak_bytes(one) <= MEMORY_BYTES and math.prod((tp, pp, data)) == world:
                yield one
