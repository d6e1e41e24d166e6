"""What is fuzzed: each parser of bytes from outside, and what it may answer with.

A target returns, or raises what says where the input is wrong; any other exception is a finding.
"""

from __future__ import annotations

import json
import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from bigtrain.checkpoint.manifest import MANIFEST_NAME, _checksum, read_manifest
from bigtrain.checkpoint.reader import read_metadata
from bigtrain.checkpoint.shards import METADATA_NAME
from bigtrain.config import CorruptionError, UserError
from bigtrain.data.index import parse_index
from bigtrain.data.scanning import scan_shard
from bigtrain.data.tar import members
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.run import load_config

CORPUS = Path(__file__).parent / "corpus"
MAX_BYTES = 1 << 16
_PLACE = tempfile.TemporaryDirectory(prefix="fuzz-")
_BYTES = Tokenizer.open("bytes")


def _file(name: str, data: bytes) -> Path:
    path = Path(_PLACE.name) / name
    path.write_bytes(data)
    return path


def _answered(error: UserError) -> None:
    if not error.what:
        raise AssertionError("an error without a message") from error


def tar(data: bytes) -> None:
    """The members of a tar, and the index of a shard of tokens, text or images."""
    path = _file("a.tar", data)
    for read in (lambda: list(members(path)), lambda: scan_shard(path, _BYTES)):
        try:
            read()
        except UserError as error:
            _answered(error)


def index(data: bytes) -> None:
    """index.json; one whose fingerprint is wrong is also looked at without that check."""
    try:
        found = parse_index(data, Path(_PLACE.name), "index.json")
        found.sequence_counts(7)
        found.as_json()
    except UserError as error:
        _answered(error)


def manifest(data: bytes) -> None:
    """A checkpoint's manifest.json as it is, and again with the checksum that it should have."""
    contents = [data]
    try:
        value = json.loads(data)
        if isinstance(value, dict):
            value.pop("checksum", None)
            contents.append(json.dumps({**value, "checksum": _checksum(value)}).encode())
    except (ValueError, RecursionError):
        pass
    for content in contents:
        path = _file(MANIFEST_NAME, content)
        try:
            assert read_manifest(path.parent).total_bytes >= 0
        except UserError as error:
            _answered(error)


def metadata(data: bytes) -> None:
    """DCP's .metadata, a pickle."""
    path = _file(METADATA_NAME, data)
    try:
        read_metadata(path.parent)
    except CorruptionError as error:
        _answered(error)


def config(data: bytes) -> None:
    """A run's YAML."""
    try:
        loaded = load_config(_file("run.yaml", data))
    except UserError as error:
        _answered(error)
    else:
        loaded.plain()


TARGETS: dict[str, Callable[[bytes], None]] = {
    "tar": tar, "index": index, "manifest": manifest, "metadata": metadata, "config": config,
}  # fmt: skip


def kept(name: str) -> list[bytes]:
    """The corpus of a target: sound inputs, and what fuzzing has found to matter."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def mutated(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """An input changed in a few places: bits, bytes, numbers, stretches left out, doubled or taken from another."""
    value = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        at = chance.randrange(len(value) + 1)
        end = min(len(value), at + chance.choice((1, 2, 8, 64, 512)))
        kind = chance.randrange(7)
        if kind == 0 and at < len(value):
            value[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            value[at:end] = bytes(chance.randrange(256) for _ in range(end - at))
        elif kind == 2:
            del value[at:end]
        elif kind == 3:
            value[at:at] = value[at:end]
        elif kind == 4:
            value[at:end] = chance.choice(
                (b"\0", b"\xff", b"-1", b"9" * 20, b"null", b"[]", b"{}", b"\xff" * 8, b"1e999")
            )
        elif kind == 5:
            other = chance.choice(others)
            begin = chance.randrange(len(other) + 1)
            value[at:end] = other[begin : begin + chance.choice((4, 32, 512))]
        else:
            value = value[:at]
    return bytes(value[:MAX_BYTES])


def run(name: str, data: bytes) -> None:
    """Run a target on one input; an AssertionError or any other exception than its own is a finding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        TARGETS[name](data)
