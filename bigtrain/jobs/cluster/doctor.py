"""`bigtrain doctor`: finds causes of failures and slow runs before a run starts.

On a cluster, the driver collects facts from every node (`bigtrain.jobs.cluster.probe`). The checks of these answers
are plain functions.
"""

from __future__ import annotations

import contextlib
import secrets
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from bigtrain.config import UserError
from bigtrain.jobs.cluster import probe

CLOCK_S: Final = 5.0
"""Allowed difference between clocks in seconds; a lease is renewed every 10 s and expires after 60 s."""
LEAST_DISK_BYTES: Final = 1 << 30
LEAST_SHARED_MEMORY_BYTES: Final = 64 << 20
SLOW_SHARE: Final = 0.25
"""A pair of nodes with less than this share of the median bandwidth is slow."""
ANSWER_S: Final = 60.0


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    where: str
    """The node, or the pair of nodes, that was checked."""
    state: str
    """One of ok, note (runs work nevertheless) and failed."""
    value: str
    """What was found."""
    fix: str | None = None
    """What the user can do about it."""


def local_checks(runs_dir: Path, secrets_file: str | None) -> list[Check]:
    """Check this machine."""
    place = runs_dir if runs_dir.is_dir() else Path.cwd()
    answer = probe.describe(str(place), ".", secrets_file)
    return [check for check in node_checks(answer["host"], answer, answer) if check.name not in ("shared", "clock")]


def node_checks(where: str, answer: dict[str, Any], head: dict[str, Any]) -> list[Check]:
    """Check the answer of one node, and compare it with the answer of the head node.

    Args:
        where: The node's name for the user.
        answer: What `probe.describe` returned on the node.
        head: What `probe.describe` returned on the head node.
    """
    checks = [_versions(where, answer["versions"], head["versions"]), _clock(where, answer), _shared(where, answer)]
    checks += [_disk(where, answer["disk"]), _shared_memory(where, answer["shared_memory_bytes"])]
    differing = {
        name: answer["communication"].get(name)
        for name in sorted({*answer["communication"], *head["communication"]})
        if answer["communication"].get(name) != head["communication"].get(name)
    }
    shown = ", ".join(f"{name}={value}" for name, value in sorted(answer["communication"].items())) or "none set"
    checks.append(
        Check(
            "collectives", where, "note", f"differs from the head: {differing}", "Set the same variables on all nodes."
        )
        if differing
        else Check("collectives", where, "ok", f"NCCL and gloo variables: {shown}")
    )
    checks += _wandb(where, answer)
    return checks


def network_checks(measured: dict[tuple[str, str], float | str]) -> list[Check]:
    """Check the bandwidths between nodes.

    Args:
        measured: For each pair (sender, receiver) the bandwidth in bytes per second, or a text that says why the
            measurement failed.
    """
    rates = [rate for rate in measured.values() if isinstance(rate, float)]
    usual = statistics.median(rates) if rates else 0.0
    checks = []
    for (sender, receiver), rate in measured.items():
        where = f"{sender} -> {receiver}"
        if isinstance(rate, str):
            checks.append(Check("network", where, "failed", rate, "Open all TCP ports between the nodes."))
        elif rate < SLOW_SHARE * usual:
            value = f"{rate / 1e6:.0f} MB/s, but the median is {usual / 1e6:.0f} MB/s"
            checks.append(Check("network", where, "failed", value, "Check this link."))
        else:
            checks.append(Check("network", where, "ok", f"{rate / 1e6:.0f} MB/s"))
    return checks


def cluster_checks(runs_dir: Path, secrets_file: str | None, say: Callable[[str], None]) -> list[Check]:
    """Check all nodes of the Ray cluster that this process is connected to, and the network between them.

    Args:
        runs_dir: The directory of runs, which all nodes must share.
        secrets_file: Path of the secrets file on the nodes.
        say: Prints one line for the user.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerAddress"])
    names = _names(nodes)
    mark = f".bigtrain-doctor-{secrets.token_hex(4)}"
    checks, answers = [], {}
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        (runs_dir / mark).touch()
        head = probe.describe(str(runs_dir), mark, secrets_file)
        describe = ray.remote(num_cpus=0, max_retries=0)(probe.describe)
        for node in nodes:
            name = names[node["NodeID"]]
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked = time.time()
            try:
                answer = ray.get(
                    describe.options(scheduling_strategy=there).remote(str(runs_dir), mark, secrets_file),
                    timeout=ANSWER_S,
                )
            except (ray.exceptions.RayError, TimeoutError) as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                checks.append(Check("node", name, "failed", lines[0], "Check the node's raylet."))
                continue
            # The node read its clock at some time between the request and the answer.
            answer["clock_s"] = max(asked - answer["time"], answer["time"] - time.time(), 0.0)
            answers[node["NodeID"]] = answer
            checks += node_checks(name, answer, head)
            say(f"{name} has answered")
    finally:
        with contextlib.suppress(OSError):
            (runs_dir / mark).unlink()
    return checks + network_checks(_bandwidths([node for node in nodes if node["NodeID"] in answers], names))


def missing_keys(secrets_file: str | None) -> dict[str, list[str]]:
    """Names of keys that ranks would not find, by node; a node that does not answer is skipped.

    Raises:
        UserError: The secrets file cannot be read on a node.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    names = _names(nodes)
    ask = ray.remote(num_cpus=0, max_retries=0)(probe.keys)
    asked = {
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            secrets_file
        ): names[node["NodeID"]]
        for node in nodes
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
    missing = {}
    for reference in answered:
        try:
            found = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            continue
        except ray.exceptions.RayError:
            continue
        if lacking := [name for name, there in found.items() if not there]:
            missing[asked[reference]] = lacking
    return missing


def result(checks: list[Check]) -> dict[str, Any]:
    """The object that `bigtrain doctor --json` prints."""
    failed = sum(check.state == "failed" for check in checks)
    return {"checks": [asdict(check) for check in checks], "failed": failed}


def _bandwidths(nodes: list[dict[str, Any]], names: dict[str, str]) -> dict[tuple[str, str], float | str]:
    """Measure the bandwidth of each pair of nodes, one after the other, so that measurements do not share a link."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    kind = ray.remote(num_cpus=0)(probe.NetworkProbe)
    ends = {
        node["NodeID"]: kind.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(node["NodeManagerAddress"])
        for node in nodes
    }
    measured: dict[tuple[str, str], float | str] = {}
    for index, sender in enumerate(ends):
        for receiver in list(ends)[index + 1 :]:
            pair = (names[sender], names[receiver])
            try:
                place = ray.get(ends[receiver].listen.remote(), timeout=ANSWER_S)
                measured[pair] = ray.get(ends[sender].send.remote(*place), timeout=ANSWER_S)
            except (ray.exceptions.RayError, TimeoutError) as error:
                measured[pair] = type(error).__name__
    return measured


def _names(nodes: list[dict[str, Any]]) -> dict[str, str]:
    """Names of nodes for the user, by node id: host and address, and the id's start if several nodes share these."""
    shown = {node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in nodes}
    common = {name for name in shown.values() if list(shown.values()).count(name) > 1}
    return {id: f"{name} {id[:6]}" if name in common else name for id, name in shown.items()}


def _versions(where: str, versions: dict[str, str], head: dict[str, str]) -> Check:
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    if versions != head:
        return Check(
            "versions", where, "failed", f"{shown}; the head has other versions", "Use one image on all nodes."
        )
    return Check("versions", where, "ok", shown)


def _clock(where: str, answer: dict[str, Any]) -> Check:
    off = float(answer.get("clock_s", 0.0))
    if off > CLOCK_S:
        return Check("clock", where, "failed", f"at least {off:.1f} s off the head's clock", "Run an NTP client.")
    return Check("clock", where, "ok", f"within {max(off, 0.1):.1f} s of the head's clock")


def _shared(where: str, answer: dict[str, Any]) -> Check:
    if not answer["sees_mark"]:
        return Check(
            "shared", where, "failed", "does not see the head's directory of runs", "Mount the same storage there."
        )
    return Check("shared", where, "ok", "sees the head's directory of runs")


def _disk(where: str, disk: dict[str, Any]) -> Check:
    if "error" in disk:
        return Check("disk", where, "failed", f"cannot be written: {disk['error']}", "See --runs-dir.")
    shown = f"{disk['free_bytes'] / 1e9:.1f} GB free"
    if disk["write_bytes_per_s"] is not None:
        shown += f", {disk['write_bytes_per_s'] / 1e6:.0f} MB/s synced"
    if disk["free_bytes"] < LEAST_DISK_BYTES:
        return Check("disk", where, "failed", shown, "Free disk space for checkpoints.")
    return Check("disk", where, "ok", shown)


def _shared_memory(where: str, free: int | None) -> Check:
    shown = "none" if free is None else f"{free / 1e6:.0f} MB free"
    if free is None or free < LEAST_SHARED_MEMORY_BYTES:
        return Check("/dev/shm", where, "failed", shown, "Give containers more: --shm-size, or an emptyDir of Memory.")
    return Check("/dev/shm", where, "ok", shown)


def _wandb(where: str, answer: dict[str, Any]) -> list[Check]:
    if "keys_error" in answer:
        return [Check("keys", where, "failed", answer["keys_error"].splitlines()[0], "See --secrets-file.")]
    key, reachable = answer["keys"]["WANDB_API_KEY"], answer["wandb_reachable"]
    value = f"{'a' if key else 'no'} key, the server is {'in' if reachable else 'out of'} reach"
    if key and reachable:
        return [Check("wandb", where, "ok", value)]
    return [Check("wandb", where, "note", value, "Runs record offline there; see --secrets-file.")]
