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
from typing import Any

import yaml

from bigtrain.checkpoint.manifest import MANIFEST_NAME, _checksum, read_manifest
from bigtrain.checkpoint.reader import read_metadata
from bigtrain.checkpoint.shards import METADATA_NAME
from bigtrain.config import CorruptionError, UserError
from bigtrain.data.formats.tar import BLOCK_BYTES, members
from bigtrain.data.index import parse_index
from bigtrain.data.scanning import scan_shard
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
    """The members of a tar, and the index of a shard of tokens, text or images; again with the right checksums."""
    for content in {data: None, _with_checksums(data): None}:
        path = _file("a.tar", content)
        for read in (lambda path=path: list(members(path)), lambda path=path: scan_shard(path, _BYTES)):
            try:
                read()
            except UserError as error:
                _answered(error)


def _with_checksums(data: bytes) -> bytes:
    """A tar whose headers, where they look like some, have the checksum that they should have."""
    value = bytearray(data)
    for at in range(0, len(value) - BLOCK_BYTES + 1, BLOCK_BYTES):
        if value[at + 257 : at + 262] == b"ustar":
            value[at + 148 : at + 156] = b" " * 8
            value[at + 148 : at + 156] = b"%06o\0 " % sum(value[at : at + BLOCK_BYTES])
    return bytes(value)


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


_ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 1 << 31, 1 << 63, 1 << 64, 10**30, 0.5, -0.0, 1e308, "", "a", "\0", "..", "/a",
    "../a.tar", "a.tar", "1e9", "-1", "nan", "é", "xxh3-128:0", "x" * 300, [], {}, [[]], [0], [-1, 0], {"": 0},
)  # fmt: skip
STRUCTURED = ("index", "manifest", "config")
"""Targets whose inputs can be changed value by value, as JSON; a config's YAML becomes JSON by it, which is YAML."""


def restructured(data: bytes, chance: random.Random) -> bytes:
    """JSON or YAML with a few of its values replaced, removed, doubled or moved; as it is where it is neither."""
    try:
        value = yaml.safe_load(data)
        for _ in range(chance.choice((1, 1, 2, 4))):
            value = _changed(value, chance)
        return json.dumps(value).encode()[:MAX_BYTES]
    except (ValueError, TypeError, RecursionError, yaml.YAMLError):
        return data


def _changed(root: Any, chance: random.Random) -> Any:
    places: list[tuple[Any, Any]] = []
    waiting = [root]
    # YAML's aliases can make a value that holds itself.
    while waiting and len(places) < 10_000:
        one = waiting.pop()
        for key in range(len(one)) if isinstance(one, list) else list(one) if isinstance(one, dict) else ():
            places.append((one, key))
            waiting.append(one[key])
    if not places:
        return chance.choice(_ODD)
    holder, key = chance.choice(places)
    kind = chance.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        other, at = chance.choice(places)
        holder[key] = json.loads(json.dumps(other.get(at) if isinstance(other, dict) else other[at]))
    elif kind == 2 and isinstance(holder[key], int):
        holder[key] += chance.choice((-1, 1, 1 << 20, 1 << 62))
    elif kind == 3 and isinstance(holder, list):
        holder.insert(key, json.loads(json.dumps(holder[key])))
    elif kind == 4 and isinstance(holder, dict):
        holder[chance.choice(("", "a", "name", "path", "bytes"))] = holder.pop(key)
    else:
        holder[key] = chance.choice(_ODD)
    return root


def mutated(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """An input with a few changes: bits, bytes, numbers; ranges removed, doubled or copied from another input."""
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
