"""Entries of hardware to plan for: by name, from a user's file, from a plugin; absurd values are refused by key."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.config import UserError
from bigtrain.hardware.cluster import cluster, known_clusters, register


def test_every_built_in_entry_is_found_by_its_name_and_its_device() -> None:
    assert {"a100", "a100-40", "h100", "h200", "b200", "mi300x", "cpu"} <= {one.name for one in known_clusters()}
    assert cluster("H100") is cluster("h100")
    assert cluster("NVIDIA H100 80GB HBM3").name == "h100"


def test_an_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(UserError, match="Unknown hardware 'h10'") as caught:
        cluster("h10")
    assert "'h100'" in str(caught.value)


def test_a_users_file_extends_an_entry(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: h100\nusd_per_hour: 2.1\nbetween: {bytes_per_s: 100e+9}\nrates: {matmul: 0.6}\n")
    mine, base = cluster(str(file)), cluster("h100")
    assert (mine.name, mine.price, mine.between.bytes_per_s, mine.rates.matmul) == ("mine", 2.1, 100e9, 0.6)
    assert mine.rates.memory == base.rates.memory
    assert mine.device == base.device


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("extends: h100\nper_node: 0\n", "per_node"),
        ("extends: h100\nrates: {matmul: 1.7}\n", "rates.matmul"),
        ("extends: h100\ninside: {bytes_per_s: -1}\n", "inside.bytes_per_s"),
        ("extends: h100\ndevice: {memory_bytes: 5}\n", "device.memory_bytes"),
        ("extends: h100\nspeed: 3\n", "speed"),
        ("device: H100 SMX\n", "Unknown device"),
        ("- h100\n", "not a mapping"),
        ("extends: h1000\n", "Unknown hardware"),
    ],
)
def test_absurd_values_are_refused_by_key(tmp_path: Path, text: str, key: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=key):
        cluster(str(file))


def test_a_plugin_registers_an_entry() -> None:
    own = cluster("h100").model_copy(update={"name": "our-pod", "per_node": 4})
    register(own)
    assert cluster("Our Pod") is own
