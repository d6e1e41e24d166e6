from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bigtrain.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    _checksum,
    read_manifest,
    write_manifest,
)
from bigtrain.config import CorruptionError, UserError

HASH = "xxh3:" + "0" * 32


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        step=7,
        files={"__0_0.distcp": FileRecord(bytes=3, hash=HASH)},
        config_hash="c",
        identity="i",
        progress={"tokens": 10**15},
        lease=2,
    )


def rewrite(directory: Path, change: dict[str, Any]) -> None:
    """Change a manifest and give it the right checksum again."""
    value = json.loads((directory / MANIFEST_NAME).read_text()) | change
    value.pop("checksum", None)
    (directory / MANIFEST_NAME).write_text(json.dumps(value | {"checksum": _checksum(value)}))


def test_what_is_written_is_read(tmp_path: Path, manifest: Manifest) -> None:
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest


def test_a_manifest_with_keys_that_are_no_longer_written_is_read(tmp_path: Path, manifest: Manifest) -> None:
    write_manifest(tmp_path, manifest)
    rewrite(tmp_path, {"rng": {}, "position": {}})
    assert read_manifest(tmp_path) == manifest


def test_every_flipped_bit_is_found(tmp_path: Path, manifest: Manifest) -> None:
    write_manifest(tmp_path, manifest)
    path = tmp_path / MANIFEST_NAME
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert read_manifest(tmp_path) == manifest
        except UserError:
            continue
        # White space outside of strings is the only byte that carries nothing.
        assert chr(whole[place]) in " \n"


def test_a_newer_format_is_refused_as_such(tmp_path: Path, manifest: Manifest) -> None:
    write_manifest(tmp_path, manifest)
    rewrite(tmp_path, {"format_version": FORMAT_VERSION + 1, "unheard_of": 1})
    with pytest.raises(UserError, match="format version 2") as caught:
        read_manifest(tmp_path)
    assert not isinstance(caught.value, CorruptionError)


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": "7"},
        {"unknown": 1},
        {"files": {"../../etc/passwd": {"bytes": 1, "hash": HASH}}},
        {"files": {"a/b": {"bytes": 1, "hash": HASH}}},
        {"files": {"..": {"bytes": 1, "hash": HASH}}},
        {"files": {"a": {"bytes": 1, "hash": "md5:0"}}},
        {"progress": 5},
    ],
)
def test_a_malformed_manifest_is_corruption_even_with_a_right_checksum(
    tmp_path: Path, manifest: Manifest, change: dict[str, Any]
) -> None:
    write_manifest(tmp_path, manifest)
    rewrite(tmp_path, change)
    with pytest.raises(CorruptionError):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"a":' + b"[" * 100 + b"]" * 100 + b"}",
        b"{}" + b" " * (65 << 20),
    ],
    ids=["empty", "a list", "torn", "binary", "bottomless", "deep", "huge"],
)
def test_what_is_no_manifest_is_corruption(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(CorruptionError):
        read_manifest(tmp_path)


def test_a_link_is_not_followed(tmp_path: Path, manifest: Manifest) -> None:
    write_manifest(tmp_path, manifest)
    (tmp_path / MANIFEST_NAME).rename(tmp_path / "elsewhere")
    (tmp_path / MANIFEST_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptionError, match="missing"):
        read_manifest(tmp_path)
