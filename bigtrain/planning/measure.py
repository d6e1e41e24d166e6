"""Measures this machine and writes a hardware entry for planning: `bigtrain bench hardware`.

    entry = measure_machine(ranks=2)
    Path("mine.yaml").write_text(entry_yaml(entry))          # bigtrain plan CONFIG --hardware mine.yaml

There is one process per GPU, or per core on a machine without GPUs. As in a run, all measure at the same time: large
matmuls in each precision, fused attention, a copy in memory, and collectives of several sizes. For a known GPU the
entry has the data sheet and the measured shares of it. For other devices the measured rates are the peaks.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bigtrain.hardware.cluster import Cluster, Link, Rates
from bigtrain.hardware.devices import Device, lookup
from bigtrain.hardware.this_machine import Machine, this_machine

PRECISIONS = ("fp32", "bf16", "fp16")
SMALLEST_PRODUCT, LARGEST_PRODUCT = 256, 16384
COPIED_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}
"""Bytes of a copied tensor, by device type; larger than the caches."""
EXCHANGED_BYTES = (1 << 12, 1 << 16, 1 << 20, 1 << 23)
KINDS = ("all_gather", "reduce_scatter", "all_reduce")
REPEATS = 5
SMALL_KERNELS = 200
FEWEST_BYTES_PER_S, LEAST_FLOPS = 1e6, 1e8
"""Smallest rates that a hardware entry accepts."""


@dataclass(frozen=True)
class Measured:
    """The measurements of one rank, while all ranks measured the same."""

    flops: dict[str, float]
    """FLOP/s of large matmuls, by precision."""
    attention: float
    """FLOP/s of fused causal attention in the fastest precision, counting only the causal half."""
    bandwidth: float
    """Memory bandwidth in bytes per second, reads plus writes."""
    launch_s: float
    """Time to start one small kernel."""
    exchanges: list[tuple[str, int, float]]
    """Collectives over all ranks: kind, bytes of the full buffer, seconds."""
    processors: int = 1
    """Streaming multiprocessors of the GPU; 1 for a core of a processor."""


def measure_machine(ranks: int | None = None, budget_s: float = 1.0, name: str | None = None) -> Cluster:
    """Measure this machine, and return its hardware entry.

    Args:
        ranks: Number of processes; None: one per GPU, or one per core without GPUs.
        budget_s: Time limit of each measurement of matmuls, attention and copies.
        name: Name of the entry; None: the host name.
    """
    machine = this_machine(use_torch=True)
    count = ranks or machine.n_devices or machine.cores
    return entry(machine, _on_ranks(count, budget_s), name or machine.hostname)


def entry(machine: Machine, found: Sequence[Measured], name: str) -> Cluster:
    """The hardware entry with the medians of the ranks' measurements."""
    count = len(found)
    flops = {
        precision: statistics.median(one.flops[precision] for one in found)
        for precision in PRECISIONS
        if all(precision in one.flops for one in found)
    }
    bandwidth = statistics.median(one.bandwidth for one in found)
    attention = statistics.median(one.attention for one in found)
    known = lookup(machine.device_name)
    if known is None:
        memory = machine.memory_bytes // count
        peaks = {precision: max(value, LEAST_FLOPS) for precision, value in flops.items()}
        device = Device(
            name=machine.device_name,
            reported_as=[machine.device_name],
            memory_bytes=memory,
            bandwidth_bytes_per_s=bandwidth,
            peak_flops=peaks,
        )
    else:
        device = known
    best = max(flops, key=lambda precision: flops[precision])
    peak = device.peak(best) or flops[best]
    latency, link = fit_link([one for rank in found for one in rank.exchanges], count)
    inside = Link(bytes_per_s=max(link, FEWEST_BYTES_PER_S), latency_s=latency)
    return Cluster(
        name=name,
        device=device,
        per_node=count,
        processors=found[0].processors,
        inside=inside,
        # Links to other nodes cannot be measured on one machine.
        between=inside,
        rates=Rates(
            matmul=_share(flops[best] / peak),
            attention=_share(attention / peak),
            memory=_share(bandwidth / device.bandwidth_bytes_per_s),
            link=1.0,
            network=1.0,
            launch_s=min(statistics.median(one.launch_s for one in found), 0.01),
        ),
    )


def fit_link(exchanges: Sequence[tuple[str, int, float]], ranks: int) -> tuple[float, float]:
    """Fit latency and bandwidth to measured collectives, by least squares of relative errors.

    The model is that of `links.Network.ring`: time = steps x latency + share x bytes / bandwidth.

    Args:
        exchanges: Kind, bytes of the full buffer, and seconds of each collective.
        ranks: Number of ranks of the collectives.

    Returns:
        The latency of one step of a collective in seconds, and the bandwidth in bytes per second.
    """
    if ranks == 1 or not exchanges:
        return 0.0, 1e12
    steps = min(ranks - 1, 2 * math.log2(ranks))
    rows, ones = [], []
    for kind, size, seconds in exchanges:
        times = 2 if kind == "all_reduce" else 1
        rows.append([times * steps / seconds, times * (ranks - 1) / ranks * size / seconds])
        ones.append(1.0)
    (latency, slowness), *_ = np.linalg.lstsq(np.array(rows), np.array(ones), rcond=None)
    largest = max(exchanges, key=lambda one: one[1])
    times = 2 if largest[0] == "all_reduce" else 1
    fallback = times * (ranks - 1) / ranks * largest[1] / largest[2]
    bandwidth = 1 / slowness if slowness > 0 else fallback
    return min(max(float(latency), 0.0), 1.0), min(float(bandwidth), 1e14)


def entry_yaml(one: Cluster) -> str:
    """The content of a YAML file with an entry, for `--hardware`."""
    plain = {key: value for key, value in one.plain().items() if value is not None}
    head = "# Written by `bigtrain bench hardware`. Links to other nodes (`between`) were not measured: set them.\n"
    return head + yaml.safe_dump(plain, sort_keys=False)


def entry_text(one: Cluster) -> str:
    """An entry as text for a terminal."""
    device, rates = one.device, one.rates
    peaks = ", ".join(f"{precision} {value / 1e12:.3g}" for precision, value in device.peak_flops.items())
    return "\n".join([
        f"{one.name}: {one.per_node} x {device.name}, {device.memory_bytes / 2**30:.1f} GiB each",
        f"  products    {peaks} TFLOP/s, of which {rates.matmul:.0%} reached; attention {rates.attention:.0%}",
        f"  memory      {device.bandwidth_bytes_per_s / 1e9:.3g} GB/s, of which {rates.memory:.0%} reached",
        f"  collectives {one.inside.bytes_per_s / 1e9:.3g} GB/s, {one.inside.latency_s * 1e6:.3g} us a step",
        f"  host        {rates.launch_s * 1e6:.3g} us a kernel",
    ])  # fmt: skip


def _share(value: float) -> float:
    return min(max(value, 1e-6), 1.0)


def _on_ranks(count: int, budget_s: float) -> list[Measured]:
    import torch.multiprocessing as processes

    with tempfile.TemporaryDirectory() as place:
        processes.spawn(_rank, args=(count, place, budget_s), nprocs=count)
        found = [json.loads((Path(place) / f"{rank}.json").read_text()) for rank in range(count)]
    return [Measured(**{**one, "exchanges": [tuple(row) for row in one["exchanges"]]}) for one in found]


def _rank(rank: int, count: int, place: str, budget_s: float) -> None:
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // count))
    store = dist.FileStore(str(Path(place) / "store"), count)
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=count, store=store)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    found = _measure(device, budget_s)
    (Path(place) / f"{rank}.json").write_text(json.dumps(asdict(found)))
    dist.barrier()
    dist.destroy_process_group()


def _measure(device: Any, budget_s: float) -> Measured:
    import torch

    flops = {}
    for precision in PRECISIONS:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        flops[precision] = _product_flops(device, dtype, budget_s)
    best = max(flops, key=lambda precision: flops[precision])
    fastest = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[best]
    return Measured(
        flops,
        _attention_flops(device, fastest, budget_s),
        _copied_bytes_per_s(device, budget_s),
        _launch_s(device),
        _exchanges(device, budget_s),
        torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1,
    )


def _product_flops(device: Any, dtype: Any, budget_s: float) -> float:
    """The highest FLOP/s over square matmuls of growing size, until one takes a fifth of the budget."""
    import torch

    best, size = 0.0, SMALLEST_PRODUCT
    while size <= LARGEST_PRODUCT:
        left = torch.ones(size, size, dtype=dtype, device=device)
        seconds = _seconds(lambda left=left: left @ left, device, budget_s / 5)  # type: ignore[misc]
        best = max(best, 2 * size**3 / seconds)
        if seconds > budget_s / 5:
            break
        size *= 2
    return best


def _attention_flops(device: Any, dtype: Any, budget_s: float) -> float:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    tokens, heads, width = (4096, 32, 128) if device.type == "cuda" else (512, 4, 64)
    query = torch.ones(1, heads, tokens, width, dtype=dtype, device=device)
    seconds = _seconds(lambda: scaled_dot_product_attention(query, query, query, is_causal=True), device, budget_s)
    return 4 * heads * tokens * tokens * width / 2 / seconds


def _copied_bytes_per_s(device: Any, budget_s: float) -> float:
    import torch

    size = COPIED_BYTES[device.type]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device, budget_s)


def _launch_s(device: Any) -> float:
    import torch

    one = torch.zeros(8, device=device)

    def kernels() -> None:
        for _ in range(SMALL_KERNELS):
            one.add_(1)

    return _seconds(kernels, device, 0.1) / SMALL_KERNELS


def _exchanges(device: Any, budget_s: float) -> list[tuple[str, int, float]]:
    """Time each kind of collective at each size. Collective over all ranks."""
    import torch
    import torch.distributed as dist

    from bigtrain.parallel.collectives import all_gather, reduce_scatter

    ranks = dist.get_world_size()
    if ranks == 1:
        return []
    found = []
    for size in EXCHANGED_BYTES:
        whole = torch.ones(size // 4 // ranks * ranks, device=device)
        part = whole.chunk(ranks)[0].clone()
        actions: dict[str, Callable[[], Any]] = {
            "all_gather": lambda whole=whole, part=part: all_gather(whole, part),  # type: ignore[misc]
            "reduce_scatter": lambda whole=whole, part=part: reduce_scatter(part, whole),  # type: ignore[misc]
            "all_reduce": lambda whole=whole: dist.all_reduce(whole),  # type: ignore[misc]
        }
        for kind in KINDS:
            # Without a budget, so that all ranks repeat a collective equally often.
            found.append((kind, whole.nbytes, _seconds(actions[kind], device, None)))
    return found


def _seconds(action: Callable[[], Any], device: Any, budget_s: float | None) -> float:
    """Seconds of the fastest of up to `REPEATS` repeats, fewer if the budget is used up; None: no budget."""
    import torch

    def once() -> float:
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    first = once()
    if budget_s is not None and first > budget_s:
        return first
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < REPEATS and (budget_s is None or not times or time.perf_counter() - began < budget_s):
        times.append(once())
    return min(times)
