"""A measured machine becomes an entry that can be planned with."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from bigtrain.hardware.cluster import cluster, read_cluster
from bigtrain.hardware.this_machine import Machine
from bigtrain.parallel.config import Mesh
from bigtrain.planning.links import Network
from bigtrain.planning.measure import KINDS, Measured, entry, entry_text, entry_yaml, fit_link, measure_machine

LAPTOP = Machine("laptop", "A Processor", 0, 4, 16 << 30)
FOUND = Measured({"fp32": 6e10, "bf16": 2e9}, 3e10, 1e10, 2e-6, [])


def exchanges(ranks: int, latency_s: float, bytes_per_s: float) -> list[tuple[str, int, float]]:
    """What a ring of this latency and bandwidth takes."""
    on = cluster("cpu")
    link = on.inside.model_copy(update={"latency_s": latency_s, "bytes_per_s": bytes_per_s})
    on = on.model_copy(update={"inside": link, "rates": on.rates.model_copy(update={"link": 1.0})})
    network = Network(on, Mesh(dp_shard=ranks))
    return [(kind, size, network.ring(kind, size, ranks, ranks)) for kind in KINDS for size in (4096, 1 << 20, 1 << 24)]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_fit_of_a_link_inverts_the_time_of_its_collectives(ranks: int) -> None:
    latency, bandwidth = fit_link(exchanges(ranks, 3e-5, 2e9), ranks)
    assert latency == pytest.approx(3e-5, rel=1e-6)
    assert bandwidth == pytest.approx(2e9, rel=1e-6)


def test_one_process_has_no_link() -> None:
    latency, bandwidth = fit_link([], 1)
    assert latency == 0
    assert math.isfinite(bandwidth)


def test_an_unknown_processor_gets_what_was_measured(tmp_path: Path) -> None:
    ranks = [replace(FOUND, exchanges=exchanges(4, 1e-4, 1e9))] * 4
    one = entry(LAPTOP, ranks, "mine")
    assert one.device.peak_flops == {"fp32": 6e10, "bf16": 2e9}
    assert one.device.memory_bytes == 4 << 30
    assert one.rates.matmul == one.rates.memory == 1.0
    assert one.rates.attention == pytest.approx(0.5)
    assert one.inside.bytes_per_s == pytest.approx(1e9)
    file = tmp_path / "mine.yaml"
    file.write_text(entry_yaml(one))
    assert read_cluster(file) == one
    assert "A Processor" in entry_text(one)


def test_a_known_gpu_keeps_its_data_sheet_and_gets_shares_of_it() -> None:
    gpu = Machine("node", "NVIDIA H100 80GB HBM3", 8, 96, 1 << 40)
    peak, bandwidth = 989e12, cluster("h100").device.bandwidth_bytes_per_s
    measured = Measured({"fp32": 4e13, "bf16": 0.7 * peak}, 0.4 * peak, 0.9 * bandwidth, 5e-6, [], processors=114)
    one = entry(gpu, [measured] * 8, "node")
    assert one.device == cluster("h100").device
    assert one.rates.matmul == pytest.approx(0.7, rel=0.01)
    assert one.rates.memory == pytest.approx(0.9)
    assert (one.per_node, one.processors) == (8, 114)


@pytest.mark.slow
def test_this_machine_measures_itself(tmp_path: Path) -> None:
    one = measure_machine(ranks=2, budget_s=0.05, name="here")
    file = tmp_path / "here.yaml"
    file.write_text(entry_yaml(one))
    assert read_cluster(file) == one
    assert one.per_node == 2
    assert one.device.peak_flops["fp32"] > 1e8
    assert one.inside.bytes_per_s > 1e6
