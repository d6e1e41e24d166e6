"""Reads and writes law.json, the result of `bigtrain scaling fit`; this needs neither SciPy nor torch."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.config import UserError
from bigtrain.scaling.law import FloatArray
from bigtrain.storage import write_json

FORMAT_VERSION = 1
KIND = "bigtrain scaling law"
_ENCODING = "base64 of float64, little-endian, row by row"


def pack(values: FloatArray) -> dict[str, Any]:
    """An array of replicates as a JSON object that keeps every bit."""
    data = np.ascontiguousarray(values, dtype="<f8").tobytes()
    return {"shape": list(values.shape), "encoding": _ENCODING, "data": base64.b64encode(data).decode()}


def unpack(packed: dict[str, Any]) -> FloatArray:
    """The inverse of `pack`."""
    data = np.frombuffer(base64.b64decode(packed["data"], validate=True), dtype="<f8")
    return data.reshape(packed["shape"]).astype(np.float64)


def write_law(path: Path, law: dict[str, Any]) -> None:
    """Write a law as JSON; numbers that are not finite become null."""
    write_json(path, finite(law))


def read_law(path: Path) -> dict[str, Any]:
    """Read a law that `bigtrain scaling fit` has written.

    Args:
        path: law.json, or the directory that holds it.

    Raises:
        UserError: The file does not exist, is not a law, or has a newer format.
    """
    file = path / "law.json" if path.is_dir() else path
    try:
        law = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no law at '{path}'", str(file), "Write one: bigtrain scaling fit") from None
    except ValueError as error:
        raise UserError(f"The file is not JSON: {error}", str(file)) from None
    if not isinstance(law, dict) or law.get("kind") != KIND:
        raise UserError("The file is not a law", str(file), "Give the law.json that `bigtrain scaling fit` wrote.")
    if law.get("format_version", 0) > FORMAT_VERSION:
        raise UserError(
            f"The law has format {law['format_version']}, but this bigtrain reads up to {FORMAT_VERSION}", str(file),
            "Use a newer bigtrain.",
        )  # fmt: skip
    return law


def finite(value: Any) -> Any:
    """A value in plain Python types for JSON, with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {str(name): finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, np.ndarray):
        return finite(value.tolist())
    if isinstance(value, np.generic):
        return finite(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
