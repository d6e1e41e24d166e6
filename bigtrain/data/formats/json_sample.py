"""Parses samples that are a single JSON object with token ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

from bigtrain.config import UserError
from bigtrain.data.formats.tar import TarSample

MAX_BYTES: Final = 16 << 20
"""Maximum bytes of the JSON of one sample, and of a line of a file."""
MAX_ID: Final = 2**31 - 1


def json_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        UserError: The data is too large, or no JSON object.
    """
    if len(data) > MAX_BYTES:
        raise UserError(f"the sample has more than {MAX_BYTES} bytes", where)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the sample is not JSON: {error}", where) from None
    if not isinstance(value, dict):
        raise UserError("the sample is not a JSON object", where)
    return value


def token_ids(value: dict[str, Any], key: str, where: str) -> list[int]:
    """The token ids under a key; at least one id.

    Raises:
        UserError: There are no valid token ids under the key.
    """
    ids = value.get(key)
    if not isinstance(ids, list) or not ids or not all(type(id) is int and 0 <= id <= MAX_ID for id in ids):
        raise UserError(f"the sample has no token ids under '{key}'", where, "Make it with bigtrain data pack.")
    return ids


def is_one(sample: TarSample, parse: Callable[[bytes, str], object]) -> bool:
    """Whether a sample has only a member `.json`, which `parse` accepts.

    Args:
        parse: Called with the bytes of the member and the sample's location; raises UserError to refuse them.
    """
    if sample.suffixes != {"json"}:
        return False
    try:
        parse(sample.read(sample.one("json"), MAX_BYTES), sample.where)
    except UserError:
        return False
    return True
