"""Clusters for the planner: accelerator, accelerators per node, links, and the share of the peak that kernels reach.

    cluster("h100")                     # a built-in entry, by its short name or its accelerator's name
    cluster("my-cluster.yaml")          # a user's file
    register(Cluster(...))              # from a plugin

A user's file holds the keys of `Cluster`. With `extends: h100` it starts from a known entry, so that it may hold, for
example, only a price.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml
from annotated_types import Ge, Gt, Le
from pydantic import ValidationError

from bigtrain.config import Section, UserError, nearest
from bigtrain.hardware.devices import Device, known_devices, lookup

Share = Annotated[float, Gt(0), Le(1)]
SUFFIXES = (".yaml", ".yml")


class Link(Section):
    """A connection between accelerators."""

    bytes_per_s: Annotated[float, Ge(1e6), Le(1e14)]
    """Bandwidth of one accelerator in one direction, in bytes per second, as the vendor states it."""

    latency_s: Annotated[float, Ge(0), Le(1)] = 5e-6
    """Smallest time of one step of a collective, in seconds, for any number of bytes."""


class Rates(Section):
    """Shares of data-sheet figures that kernels reach, calibrated on measured runs (tests/bench/plan_tables.py)."""

    matmul: Share = 0.75
    """Share of the matrix units' peak that large matrix products reach."""

    attention: Share = 0.5
    """Share of the matrix units' peak that fused attention reaches."""

    memory: Share = 0.8
    """Share of the memory bandwidth that memory-bound kernels reach."""

    link: Share = 0.75
    """Share of the bandwidth inside a node that collectives reach."""

    network: Share = 0.75
    """Share of the bandwidth between nodes that collectives reach."""

    launch_s: Annotated[float, Ge(0), Le(0.01)] = 6e-6
    """Time in which the host launches one kernel, in seconds."""

    pass_s: Annotated[float, Ge(0), Le(1)] = 0.0
    """Time that the host adds to each pass of a micro-batch (data, loss, schedule), in seconds."""

    step_s: Annotated[float, Ge(0), Le(10)] = 0.0
    """Time that the host adds to each step, in seconds."""

    interference: Annotated[float, Ge(0), Le(1)] = 0.1
    """Slowdown of computation by an overlapped collective, as a share of the collective's time."""


class Cluster(Section):
    """A cluster of equal nodes with equal accelerators."""

    name: str
    """The name for `--hardware`, such as "h100"."""

    device: Device
    """The accelerator; a file may also give the name of a known one."""

    per_node: Annotated[int, Ge(1), Le(1024)] = 8
    """Number of accelerators in one node, connected by the link `inside`."""

    processors: Annotated[int, Ge(1), Le(100_000)] = 132
    """Number of units of an accelerator that compute tiles of a matrix product in parallel (streaming
    multiprocessors)."""

    inside: Link
    """The link between accelerators of one node."""

    between: Link
    """The link between nodes, for each accelerator."""

    rates: Rates = Rates()
    """Shares of the peaks that kernels and collectives reach."""

    usable_memory: Share = 0.94
    """Share of the device's memory that a process can use; the driver, libraries and fragmentation take the rest."""

    usd_per_hour: Annotated[float, Gt(0), Le(10_000)] | None = None
    """Price of one accelerator for an hour in US dollars; None: the price of the device."""

    storage_bytes_per_s: Annotated[float, Ge(1e6), Le(1e15)] = 2e9
    """Rate at which one node writes a checkpoint, in bytes per second."""

    failures_per_device_hour: Annotated[float, Ge(0), Le(1)] = 2.0e-5
    """Unexpected interruptions per device and hour. Llama 3 on 16,384 H100s had one in 3.1 h (Dubey et al. 2024,
    section 3.3.4)."""

    @property
    def memory_bytes(self) -> int:
        """Memory of one accelerator that a process can use, in bytes."""
        return int(self.device.memory_bytes * self.usable_memory)

    @property
    def price(self) -> float | None:
        """Price of one accelerator for an hour in US dollars; None if not known."""
        return self.usd_per_hour if self.usd_per_hour is not None else self.device.usd_per_hour


_registered: dict[str, Cluster] = {}


def register(entry: Cluster) -> Cluster:
    """Add an entry, or replace the entry of the same name; for plugins."""
    _registered[_key(entry.name)] = entry
    return entry


def known_clusters() -> list[Cluster]:
    """All entries; entries of plugins are last."""
    return list({**_built_in(), **_registered}.values())


def cluster(name: str) -> Cluster:
    """Find a cluster.

    Args:
        name: Name of an entry, name of its accelerator, or path of a YAML file.

    Raises:
        UserError: No entry has the name (the message suggests a similar one), or the file cannot be read or has
            invalid values.
    """
    if name.endswith(SUFFIXES):
        return read_cluster(Path(name))
    entries = {**_built_in(), **_registered}
    found = entries.get(_key(name)) or _of_device(name, entries)
    if found is None:
        names = [one.name for one in entries.values()]
        near = nearest(_key(name), names)
        hint = f"Did you mean {near!r}? " if near else ""
        raise UserError(f"Unknown hardware {name!r}", "--hardware", f"{hint}Known: {', '.join(names)}, or a YAML file.")
    return found


def read_cluster(path: Path) -> Cluster:
    """Read a cluster from a user's YAML file.

    Raises:
        UserError: The file is not a YAML mapping, or a value is invalid; the message names the key.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"The file is not YAML: {error}", str(path)) from None
    if not isinstance(found, dict):
        raise UserError("The file is not a mapping of keys", str(path), "Give extends: h100, or the keys of an entry.")
    values: dict[str, Any] = {"name": path.stem, **found}
    if "extends" in values:
        values = _laid_over(cluster(str(values.pop("extends"))).plain(), values)
    return _validated(values, str(path))


def _laid_over(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = _laid_over(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _validated(values: dict[str, Any], where: str) -> Cluster:
    name = values.get("device")
    if isinstance(name, str):
        by_name = {device.name: device for device in known_devices()}
        device = by_name.get(name) or lookup(name)
        if device is None:
            near = nearest(name, by_name)
            hint = f"Did you mean {near!r}? " if near else ""
            raise UserError(f"Unknown device {name!r}", where, f"{hint}Known: {', '.join(by_name)}.")
        values = {**values, "device": device}
    try:
        return Cluster.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        given = "" if isinstance(first["input"], dict) else f" (given: {first['input']!r})"
        raise UserError(
            f"{key}: {first['msg']}{given}", where, "See `Cluster` in bigtrain/hardware/cluster.py."
        ) from None


def _of_device(name: str, entries: dict[str, Cluster]) -> Cluster | None:
    found = lookup(name)
    return next((one for one in entries.values() if found is not None and one.device.name == found.name), None)


def _key(name: str) -> str:
    return name.casefold().replace(" ", "-").replace("_", "-")


@cache
def _built_in() -> dict[str, Cluster]:
    text = resources.files("bigtrain.hardware").joinpath("clusters.yaml").read_text(encoding="utf-8")
    return {entry["name"]: _validated(entry, "clusters.yaml") for entry in yaml.safe_load(text)}
