from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtrain.tracking.goodput import PARTS
from bigtrain.tracking.history import read_columns
from bigtrain.tracking.metrics import MetricsFile
from bigtrain.tracking.page import PARTS_OF_A_WHOLE, Chart, Fact, Mark, Page, Series, downsample
from bigtrain.tracking.report import write_comparison, write_report
from bigtrain.tracking.report_charts import smooth

CANARY = "canary-7f3a"
EVIL = "</script><script>document.title='pwned'</script><b>&"


class _Links(HTMLParser):
    """The attributes by which a page fetches, its texts outside scripts, and its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.elements: list[str] = []
        self.text: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self._inside = tag if tag in ("script", "style") else ""
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text.append(data)


def _parse(text: str) -> _Links:
    parser = _Links()
    parser.feed(text)
    return parser


@pytest.fixture
def full_run(
    run_dir: Path,
    row: Callable[..., dict[str, Any]],
    event: Callable[..., dict[str, Any]],
    write_lines: Callable[..., None],
) -> Path:
    evaluated = {"val_loss": 2.4012, "val_bits_per_byte": 3.4642}
    rows = [
        row(step, loss=3.0 - 0.001 * step, mfu=0.421, **(evaluated if step == 500 else {})) for step in range(1, 501)
    ]
    write_lines(run_dir / "metrics.jsonl", *rows)
    write_lines(
        run_dir / "events.jsonl",
        event("started", 0, step=0, total_steps=500), event("fault", 300, step=300, rank=3, host="node-b", cause=EVIL),
        event("restarted", 301), event("resumed", 320, step=290), event("finished", 625, step=500),
    )  # fmt: skip
    (run_dir / "config.yaml").write_text(f"name: tiny\nnote: '{EVIL}'\napi_key: {CANARY}\nurl: s3://u:{CANARY}@h/x\n")
    (run_dir / "sample.txt").write_text(f"ROMEO: {EVIL}\n")
    return run_dir


def test_the_report_holds_the_runs_numbers(full_run: Path) -> None:
    path = write_report(full_run)
    text = " ".join(_parse(path.read_text()).text)
    for part in ("tiny", "500", "of 500", "50k", "2.5000", "2.4012", "3.4642 bits per byte", "42.1%", "10m25s", "80.0%",
                 "1 fault, 1 restart", "restarts", "20s", "node-b", "ROMEO"):  # fmt: skip
        assert part in text, part


def _charts(page: str) -> dict[str, tuple[str, list[str]]]:
    """The unit of each chart of a page and the names of its series, by its title."""
    found = re.findall(r'<h3>(.*?)(?: <span>(.*?)</span>)?</h3>.*?<script type="application/json">(.*?)</script>', page)
    return {
        title: (unit, [one["name"] for one in json.loads(spec)["series"]]) for title, unit, spec in found
    }  # fmt: skip


def test_what_is_counted_and_the_loss_have_the_units_of_the_model(
    run_dir: Path, row: Callable[..., dict[str, Any]]
) -> None:
    file = MetricsFile(run_dir / "metrics.jsonl")
    file.add_units({"tokens": "images", "tokens_per_s": "images/s", "loss": "nats per image"})
    for step in (1, 2, 3):
        file.append(row(step, accuracy=0.1 * step, **({"val_loss": 2.5, "val_accuracy": 0.25} if step == 3 else {})))
    page = write_report(run_dir).read_text()
    text = " ".join(_parse(page).text)
    for part in ("Images", "Images per second", "training, nats per image", "Validation accuracy", "0.2500"):
        assert part in text, part
    assert "oken" not in text
    charts = _charts(page)
    assert charts["Loss"] == ("nats per image", ["training", "validation"])
    assert charts["Throughput"] == ("images/s", ["images/s"])
    assert charts["accuracy"] == ("", ["training", "validation"])


def test_losses_of_parts_share_a_chart_and_are_no_sources(run_dir: Path, row: Callable[..., dict[str, Any]]) -> None:
    file = MetricsFile(run_dir / "metrics.jsonl")
    file.add_units({"tokens": "images", "loss": "of the critic"})
    for step in (1, 2, 3):
        of_parts = {"loss/critic": 0.5, "loss/maker": 2.0, "gradient_norm/critic": 1.0, "gradient_norm/maker": 3.0}
        file.append(row(step, **of_parts, **({"val_loss/critic": 0.7, "val_loss/maker": 1.25} if step == 3 else {})))
    page = write_report(run_dir).read_text()
    charts = _charts(page)
    assert charts["Loss"] == ("", ["critic", "critic, validation", "maker", "maker, validation"])
    assert charts["gradient_norm"] == ("", ["critic", "maker"])
    assert not {"Loss by source", "Validation loss by set", "Gradient norm"} & charts.keys()
    text = " ".join(_parse(page).text)
    for part in ("Final loss, maker", "2.0000", "Validation loss, maker", "1.2500"):
        assert part in text, part


def test_many_curves_of_one_kind_are_all_shown(run_dir: Path, row: Callable[..., dict[str, Any]]) -> None:
    file, names = MetricsFile(run_dir / "metrics.jsonl"), [f"set{number}" for number in range(6)]
    sources = {f"{key}/{name}": 1.0 for name in names for key in ("loss", "epochs", "val_loss", "weight_norm")}
    file.append(row(1, **sources))
    charts = _charts(write_report(run_dir).read_text())
    assert [charts[title][1] for title in ("Loss by source", "Validation loss by set", "weight_norm")] == [names] * 3


def test_texts_of_users_are_escaped_and_secrets_removed(full_run: Path) -> None:
    text = write_report(full_run).read_text()
    assert EVIL not in text
    assert "<script>document.title" not in text
    assert CANARY not in text
    assert text.count("&lt;script&gt;document.title=&#x27;pwned&#x27;") >= 3
    assert "b" not in _parse(text).elements


def test_the_report_fetches_nothing(full_run: Path) -> None:
    text = write_report(full_run).read_text()
    page = _parse(text)
    assert page.fetched == []
    assert not {"link", "img", "iframe", "base"} & set(page.elements)
    assert "default-src 'none'" in text
    assert "@import" not in text.split("</style>")[0]
    assert text.count('id="plotly"') == 1, "the library is inside, once"


def test_marks_stand_where_faults_and_restarts_were(full_run: Path) -> None:
    text = write_report(full_run).read_text()
    spec = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', text)[0])
    assert [(mark["x"], mark["color"]) for mark in spec["marks"]] == [(300, "fault"), (290, "restart")]
    assert spec["marks"][0]["text"].startswith("fault: &lt;/script&gt;")


def test_a_run_that_has_only_begun_has_a_report(run_dir: Path) -> None:
    text = write_report(run_dir).read_text()
    assert "n/a" not in " ".join(_parse(text).text)
    assert 'id="plotly"' not in text


def test_what_is_not_known_has_no_row(run_dir: Path, row: Callable[..., dict[str, Any]], write_lines: Any) -> None:
    write_lines(run_dir / "metrics.jsonl", row(1), row(2))
    text = write_report(run_dir).read_text()
    parts = _parse(text).text
    assert "MFU" not in parts
    assert "n/a" not in " ".join(parts)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_draws_every_chart_without_an_error(full_run: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000",
         "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", write_report(full_run).as_uri()],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "<title>tiny</title>" in done.stdout
    assert done.stdout.count('class="main-svg"') >= 2 * 7
    assert "CONSOLE" not in done.stderr, done.stderr


def test_downsampling_keeps_every_spike_and_its_size() -> None:
    x = np.arange(1_000_000)
    y = np.sin(x / 1e5)
    y[123_456], y[654_321] = 50.0, -50.0
    few_x, few_y = downsample(x, y, 3000)
    assert len(few_x) <= 3000
    assert (np.diff(few_x) > 0).all()
    assert {123_456, 654_321, 0, 999_999} <= set(few_x.astype(int).tolist())
    assert (few_y.max(), few_y.min()) == (50.0, -50.0)
    short_x, short_y = downsample([1, 2, 3], [1.0, float("nan"), 3.0])
    assert short_x.tolist() == [1, 3]
    assert short_y.tolist() == [1.0, 3.0]


def test_a_long_run_makes_a_page_that_is_not_larger(run_dir: Path, row: Callable[..., dict[str, Any]]) -> None:
    line = json.dumps(row(987_654_321, val_loss=1.5))
    with open(run_dir / "metrics.jsonl", "w") as file:
        file.writelines(line.replace("987654321", str(step)) + "\n" for step in range(1, 30_001))
    assert write_report(run_dir).stat().st_size < 1_500_000


def test_columns_hold_each_step_once_though_the_file_went_back(tmp_path: Path, write_lines: Any) -> None:
    write_lines(
        tmp_path / "m.jsonl",
        *({"step": s, "loss": 1.0, **({"val_loss": 2.0} if s == 3 else {})} for s in (1, 2, 3)),
    )
    write_lines(tmp_path / "m.jsonl", {"step": 2, "loss": 5.0}, {"step": 4, "loss": None})
    columns = read_columns(tmp_path / "m.jsonl")
    assert columns.step.tolist() == [1, 2, 4]
    np.testing.assert_array_equal(columns.get("loss"), [1.0, 5.0, np.nan])
    np.testing.assert_array_equal(columns.get("val_loss"), [np.nan] * 3)
    assert columns.last("loss") == 5.0


def test_the_mean_follows_a_straight_line_without_lag() -> None:
    values = np.arange(100.0)
    values[50] = np.nan
    mean = smooth(values, 11)
    np.testing.assert_allclose(mean[10:40], np.arange(10.0, 40.0))
    assert np.isfinite(mean).all()


def test_a_page_serves_other_reports_too() -> None:
    page = Page("Scaling law", "three approaches")
    page.headline([Fact("E", "1.69", "irreducible")])
    series = [Series("trials", [1e18, 1e19], [3.0, 2.5], 3)]
    page.charts(
        [Chart("Loss against compute", series, log_x=True, log_y=True, log_switch=True, marks=[Mark(1e19, "budget")])]
    )
    page.table(["N", "D"], [[1, None], ["<i>", 2.5]])
    text = page.render()
    assert 'value="log" aria-pressed="true"' in text
    assert "&lt;i&gt;" in text
    assert "irreducible" in text


def test_the_bar_has_a_colour_for_each_part_of_the_wall_time() -> None:
    css = resources.files("bigtrain.tracking").joinpath("page.css").read_text()
    assert len(PARTS) + 1 == PARTS_OF_A_WHOLE
    colors = dict(re.findall(r"\.(s\d) \{ background: var\((--[a-z0-9-]+)\)", css))
    assert set(colors) == {f"s{number}" for number in range(PARTS_OF_A_WHOLE)}
    assert len(set(colors.values())) == PARTS_OF_A_WHOLE


def test_a_straggler_has_one_row_and_recorded_metrics_a_chart_with_their_unit(
    run_dir: Path, row: Callable[..., dict[str, Any]], event: Callable[..., dict[str, Any]],
    write_lines: Callable[..., None],
) -> None:  # fmt: skip
    write_lines(run_dir / "metrics.jsonl", *(row(step, fan_speed=900 + step) for step in range(1, 9)))
    MetricsFile(run_dir / "metrics.jsonl").add_units({"fan_speed": "rpm"})
    reports = [event("straggler", 100 * n, step=100 * n, rank=3, host="a7", cause="slow") for n in range(1, 6)]
    write_lines(run_dir / "events.jsonl", event("started", 0, step=0), *reports, event("finished", 700, step=8))
    parts = _parse(write_report(run_dir).read_text()).text
    assert len([part for part in parts if part.startswith("straggler")]) == 1
    assert "slow; reported 5 times, up to step 500" in parts
    assert parts[parts.index("fan_speed ") + 1] == "rpm"


def test_two_runs_stand_side_by_side_with_what_differs(
    tmp_path: Path, row: Callable[..., dict[str, Any]], write_lines: Callable[..., None]
) -> None:
    for number, name in enumerate(("small", "large")):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "metrics.jsonl", *(row(step, loss=2.0 + number) for step in range(1, 9)))
        config = f"name: {name}\nseed: 1\nmodel: {{arch: llama, width: {64 << number}}}\napi_key: {CANARY}{number}\n"
        (tmp_path / name / "config.yaml").write_text(config)
    text = write_comparison(tmp_path / "small", tmp_path / "large", tmp_path / "both.html").read_text()
    parts = _parse(text).text
    assert parts[parts.index("model.width") : parts.index("model.width") + 3] == ["model.width", "64", "128"]
    assert "seed" not in parts
    assert CANARY not in text
    spec = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', text)[0])
    assert {series["name"] for series in spec["series"]} >= {"small", "large"}
