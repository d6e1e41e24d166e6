"""What `python -m tests.bench.bench_data` must reach, and its result as people read it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

TIMES_THE_FASTER = 2.0
FIRST_BATCH_S = 1.0
"""Beyond one round trip."""
WAITING_SHARE = 0.005
MEMORY_GROWTH = 0.05
"""From a tenth of the epoch to any later one."""
RESUME_S = 1.0
OF_THE_LIBRARY = 0.8
FETCHES = 1.05
INDEX_BYTES_A_SHARD = 1000


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the parts that were measured: {"target", "value", "at_most" or "at_least", "met"}."""
    found: list[dict[str, Any]] = []

    def at_most(target: str, value: float, limit: float) -> None:
        found.append({"target": target, "value": value, "at_most": limit, "met": value <= limit})

    def at_least(target: str, value: float, limit: float) -> None:
        found.append({"target": target, "value": value, "at_least": limit, "met": value >= limit})

    if disk := result.get("disk"):
        at_least("from disk, times the faster of the others", disk["to_the_faster"], TIMES_THE_FASTER)
    if http := result.get("http"):
        at_most("over HTTP, first batch, s", http["first_batch_s"], http["latency_s"] + FIRST_BATCH_S)
        at_most("share of the time that a consumer waits", http["waiting_share"], WAITING_SHARE)
        at_most("growth of memory after a tenth", http["memory_growth"], MEMORY_GROWTH)
        at_most("first batch at 90 %, s", http["first_batch_at_90_percent_s"], RESUME_S)
        at_most("fetches of a shard", http["fetches_of_a_shard"], FETCHES)
    if packed := result.get("packing"):
        at_least("packing, of the tokenizer library's speed", packed["to_the_library"], OF_THE_LIBRARY)
    if index := result.get("index"):
        at_most("bytes of memory a shard of an index", index["memory_bytes"] / index["shards"], INDEX_BYTES_A_SHARD)
    return found


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{result['device']}, load {result['load']}"]
    if "tokens" in result:
        lines.append(f"{result['tokens']:,} generated tokens in {result['shards']} shards")
    for part, describe in (("disk", _disk), ("http", _http), ("packing", _packing), ("index", _index)):
        if part in result:
            lines += ["", *describe(result[part])]
    lines.append("")
    for one in result["targets"]:
        limit = f"at most {one['at_most']:g}" if "at_most" in one else f"at least {one['at_least']:g}"
        lines.append(f"{'met' if one['met'] else 'NOT MET':9}{one['target']:44}{one['value']:>10,.4g}  ({limit})")
    return "\n".join(lines)


def _disk(disk: dict[str, Any]) -> Iterator[str]:
    yield f"from disk, one core, {disk['pairs']} rounds"
    for name, rate in disk["tokens_per_s"].items():
        yield f"  {name:12}{rate:>16,} tokens/s{disk['tokens_per_cpu_s'][name]:>16,} by processor time"
    yield (
        f"  bigtrain over the faster of the others: {disk['to_the_faster']:.2f}, "
        f"by processor time {disk['to_the_faster_by_cpu']:.2f}"
    )


def _http(http: dict[str, Any]) -> Iterator[str]:
    memory = http["memory_bytes_at_tenths"]
    late = f"{1000 * http['latency_s']:.0f} ms"
    yield f"over HTTP, answers after {late}, a cache of {http['cache_share']:.0%} of the data"
    yield f"  first batch after {http['first_batch_s']:.2f} s"
    yield (
        f"  a consumer of 1M tokens/s waits {http['waiting_share']:.2%} of {http['paced_s']:.0f} s "
        f"({http['paced_tokens']:,} tokens); the whole epoch took {http['seconds']:.0f} s"
    )
    yield (
        f"  memory {memory[0] / 1e6:.1f} MB at a tenth, {max(memory) / 1e6:.1f} MB at most, "
        f"{memory[-1] / 1e6:.1f} MB at the end"
    )
    yield f"  each shard fetched {http['fetches_of_a_shard']:.2f} times in an epoch"
    yield (
        f"  first batch at 90 %: {http['first_batch_at_90_percent_s']:.2f} s, "
        f"from disk {http['first_batch_at_90_percent_of_the_disk_s']:.2f} s"
    )


def _packing(packed: dict[str, Any]) -> Iterator[str]:
    yield (
        f"packing on {packed['cores']} cores: {packed['bytes_per_s'] / 1e6:.2f} MB/s of text, "
        f"{packed['to_the_library']:.2f} of the tokenizer library's own speed"
    )


def _index(index: dict[str, Any]) -> Iterator[str]:
    memory = f"{index['memory_bytes'] / 1e6:.0f} MB"
    yield f"the index of {index['shards']:,} shards: {memory}, read in {index['seconds']:.1f} s"
