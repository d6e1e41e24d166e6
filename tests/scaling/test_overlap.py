"""The finding of `data overlap`, carried into a law and its page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config import UserError
from bigtrain.scaling.fit import fit
from bigtrain.scaling.options import FitOptions
from bigtrain.scaling.overlap import overlap_of
from bigtrain.scaling.report import page

WriteRuns = Callable[..., Path]


def sweep_with(tmp_path: Path, share: float, fingerprint: str = "sha256:1") -> Path:
    """A sweep's directory and its shards, with a finding beside the held-out ones."""
    for name in ("train", "validation"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.json").write_text(json.dumps({"fingerprint": "sha256:1"}))
    finding = {"kind": "bigtrain overlap", "format_version": 1, "train": str(tmp_path / "train"),
               "validation": str(tmp_path / "validation"), "passages": 1000, "exact": round(800 * share),
               "near": round(200 * share), "share": share, "rule": "30%",
               "fingerprints": {"train": fingerprint}}  # fmt: skip
    (tmp_path / "validation/overlap.json").write_text(json.dumps(finding))
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / "sweep.yaml").write_text(
        f"name: s\nbase:\n  data: {{train: {tmp_path / 'train'}, validation: {tmp_path / 'validation'}}}\n"
    )
    return sweep


@pytest.mark.parametrize(
    ("share", "fingerprint", "message"),
    [(0.05, "sha256:1", "5.00% of the held-out passages"), (0.0, "sha256:1", None),
     (0.05, "sha256:2", "other training data")],
)  # fmt: skip
def test_a_sweeps_finding_is_found_and_warned_of(
    tmp_path: Path, share: float, fingerprint: str, message: str | None
) -> None:
    found, warnings = overlap_of(str(sweep_with(tmp_path, share, fingerprint)), None)
    assert found is not None
    assert found["share"] == share
    assert (message is None and not warnings) or (message is not None and message in warnings[0])


def test_nothing_is_printed_where_nothing_is_known_and_a_named_finding_must_exist(tmp_path: Path) -> None:
    assert overlap_of("runs.csv", None) == (None, [])
    with pytest.raises(UserError, match="There is no result of"):
        overlap_of("runs.csv", str(tmp_path))
    (tmp_path / "overlap.json").write_text("{}")
    with pytest.raises(UserError, match="not a result of"):
        overlap_of("runs.csv", str(tmp_path))


@pytest.mark.slow
def test_the_finding_stands_in_the_law_and_on_its_page(tmp_path: Path, write_runs: WriteRuns) -> None:
    sweep_with(tmp_path, 0.05)
    options = FitOptions(approach="a3", loss_function="huber", replicates=100, processes=1, starts=2,
                         overlap=str(tmp_path / "validation"))  # fmt: skip
    fitted = fit(str(write_runs(sizes=6)), options)
    law: dict[str, Any] = fitted.law
    assert law["overlap"]["exact"] == 40
    assert sum("held-out passages" in text for text in law["warnings"]) == 1
    assert "5.00% of 1000 held-out passages" in page(fitted)
