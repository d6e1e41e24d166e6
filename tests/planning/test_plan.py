"""Estimates, the search and what is shown of it: terms add up, more of a resource never hurts, output agrees."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bigtrain.cli import app
from bigtrain.config import UserError
from bigtrain.engines.deepspeed.config import DeepSpeedConfig
from bigtrain.engines.fsdp.config import FSDPConfig
from bigtrain.hardware.cluster import cluster
from bigtrain.models.families.llama import Config as Llama
from bigtrain.parallel.config import LayoutConfig
from bigtrain.planning.check import check_memory, check_memory_of_nodes, entry_of_accelerator
from bigtrain.planning.estimate import Job
from bigtrain.planning.page import plan_page
from bigtrain.planning.report import execution_yaml, numbers_text, plan_document, plan_text
from bigtrain.planning.search import search
from bigtrain.run import load_config

H100 = cluster("h100")
MODEL = Llama(layers=8, width=2048, heads=16, kv_heads=8, mlp_width=8192, context=4096)
JOB = Job(MODEL, 32_000, 32, FSDPConfig(), LayoutConfig(micro_size=2))
LAYOUTS: list[dict[str, Any]] = [
    {}, {"tp": 2}, {"pp": 4}, {"pp": 2, "pp_schedule": "interleaved", "pp_stages_per_rank": 2}, {"cp": 2},
    {"tp": 2, "pp": 2, "cp": 2}, {"dp_replicate": 2}, {"pp": 2, "pp_schedule": "zero_bubble"},
]  # fmt: skip


def with_layout(**keys: Any) -> Job:
    return replace(JOB, layout=LayoutConfig(micro_size=2, **keys))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_terms_of_memory_and_time_add_up(layout: dict[str, Any]) -> None:
    one = with_layout(**layout).estimate(H100, 8)
    memory, seconds = one.memory.plain(), one.seconds.plain()
    assert sum(memory.values()) == 2 * memory["total"]
    assert sum(seconds.values()) - seconds["hidden"] == pytest.approx(2 * seconds["total"])
    assert min(seconds.values()) >= 0
    assert one.mfu == pytest.approx(
        MODEL.flops_per_token(32_000).full * one.tokens_per_s / (8 * H100.device.peak_flops["bf16"])
    )
    assert one.mfu < H100.rates.matmul


def test_recompute_takes_less_memory_and_more_time() -> None:
    kept, selective, full = (
        replace(JOB, engine=FSDPConfig(recompute=kind)).estimate(H100, 8)  # type: ignore[arg-type]
        for kind in ("none", "selective", "full")
    )
    assert kept.memory.total > selective.memory.total > full.memory.total
    assert kept.seconds.total < selective.seconds.total < full.seconds.total


def test_zero_stages_take_less_and_less_memory() -> None:
    stages = [replace(JOB, engine=DeepSpeedConfig(zero=zero)).estimate(H100, 8) for zero in (0, 1, 2, 3)]
    held = [one.memory.parameters + one.memory.gradients + one.memory.optimizer for one in stages]
    assert held == sorted(held, reverse=True)


def test_a_pipeline_idles_less_with_more_passes_and_with_more_stages_a_rank() -> None:
    few = with_layout(pp=4).estimate(H100, 8)
    more = replace(with_layout(pp=4), layout=LayoutConfig(pp=4, micro_size=1)).estimate(H100, 8)
    interleaved = with_layout(pp=4, pp_schedule="interleaved", pp_stages_per_rank=2).estimate(H100, 8)
    assert more.seconds.bubble < few.seconds.bubble
    assert interleaved.seconds.bubble < few.seconds.bubble


def test_the_search_ranks_what_fits_and_only_that() -> None:
    found = search(JOB, H100, 16)
    assert found.best is not None
    times = [one.seconds.total for one in found.ranked]
    assert times[0] <= 1.01 * min(times)
    assert all(one.fits and one.sizes.world_size == 16 for one in found.ranked)
    for one in found.ranked[:20]:
        one.layout.check(MODEL, 32_000)


def test_the_search_of_slower_links_avoids_them() -> None:
    slow = H100.model_copy(update={"between": H100.between.model_copy(update={"bytes_per_s": 1e8})})
    fast, choked = search(JOB, H100, 16), search(JOB, slow, 16)
    assert fast.best is not None
    assert choked.best is not None
    same = replace(JOB, layout=fast.best.layout, engine=fast.best.engine).estimate(slow, 16)
    assert choked.best.seconds.total <= 1.01 * same.seconds.total


@pytest.mark.slow
def test_what_cannot_fit_names_the_term_and_what_would_do() -> None:
    large = replace(JOB, model=MODEL.model_copy(update={"layers": 60, "width": 12288, "heads": 96, "mlp_width": 49152}))
    document = plan_document(large, H100, 4, None)
    assert not document["fits"]
    text = plan_text(document)
    assert "nothing fits" in text
    assert re.search(r"it fits on \d+ GPUs", text)


def test_no_legal_layout_names_the_nearest_number_of_gpus() -> None:
    with pytest.raises(UserError, match=r"No layout .* is legal on 8191 GPUs") as caught:
        search(JOB, H100, 8191)
    near = int(re.search(r"Use (\d+) GPUs, the nearest number with a legal layout", str(caught.value)).group(1))  # type: ignore[union-attr]
    assert search(JOB, H100, near).legal


def test_a_device_without_the_precision_is_refused() -> None:
    device = H100.device.model_copy(update={"peak_flops": {"fp32": 1e13}})
    with pytest.raises(UserError, match="no units for bf16"):
        search(JOB, H100.model_copy(update={"device": device}), 8)


RUN = """
name: planned
model: {arch: llama, layers: 8, width: 2048, heads: 16, kv_heads: 8, mlp_width: 8192, context: 4096}
data: {train: shards}
batch: {size: 32}
duration: 1000 steps
"""


def test_terminal_json_and_page_agree_and_the_written_execution_loads(tmp_path: Path) -> None:
    file, out, page = tmp_path / "run.yaml", tmp_path / "best.yaml", tmp_path / "plan.html"
    file.write_text(RUN)
    arguments = ["plan", str(file), "--gpus", "8", "--vocab-size", "32000", "--sweep-gpus", "4..8"]
    done = CliRunner().invoke(app, [*arguments, "--json", "--out", str(out), "--page", str(page)])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    text = CliRunner().invoke(app, arguments).stdout
    html = page.read_text()
    for row in (document["executions"][0], *document["sweep"]):
        for value in numbers_text(row).values():
            assert value in text
            assert value in html
    assert plan_text(document) in text
    assert plan_page(document, "planned") == html
    merged = tmp_path / "merged.yaml"
    merged.write_text(RUN + out.read_text())
    loaded = load_config(merged)
    best = document["executions"][0]
    assert loaded.layout.mesh(8).tp == best["mesh"]["tp"]
    assert loaded.layout.micro_size == best["execution"]["layout"]["micro_size"]
    again = Job.of(loaded, 32_000).estimate(H100, 8)
    assert again.seconds.total == pytest.approx(best["step_s"])
    assert again.memory.total == best["memory_bytes"]["total"]
    assert execution_yaml(document, 8) == out.read_text()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{arch: vit, layers: 2, width: 64, heads: 2, image_size: 28, patch: 7}", "do not cover"),
        (None, "vocabulary is not known"),
    ],
)
def test_what_the_formulas_do_not_cover_is_reported(tmp_path: Path, model: str | None, message: str) -> None:
    file = tmp_path / "run.yaml"
    lines = RUN if model is None else re.sub(r"model: .*", f"model: {model}", RUN)
    file.write_text(lines)
    extra = [] if model is None else ["--vocab-size", "10"]
    done = CliRunner().invoke(app, ["plan", str(file), "--gpus", "8", *extra])
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_run_that_cannot_fit_is_refused_with_the_term_to_cut(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(RUN.replace("layers: 8", "layers: 400").replace("size: 32", "size: 64"))
    large = load_config(file)
    with pytest.raises(
        UserError, match=r"needs about \d+ GiB .* H100 SXM has 75 GiB; the largest part is \w+"
    ) as caught:
        check_memory(large, 32_000, 2, "NVIDIA H100 80GB HBM3")
    assert "bigtrain plan" in str(caught.value)
    check_memory(large, 32_000, 2, "a device that is not known")
    check_memory(load_config(file, ["model.layers=2", "layout.micro_size=1"]), 32_000, 2, "NVIDIA H100 80GB HBM3")


def test_a_cluster_of_one_kind_of_accelerator_refuses_what_cannot_fit(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(RUN.replace("layers: 8", "layers: 400").replace("size: 32", "size: 64"))
    large, small = load_config(file), load_config(file, ["model.layers=2", "layout.micro_size=1"])
    node = {"CPU": 64.0, "GPU": 8.0, "accelerator_type:H100": 1.0}
    with pytest.raises(UserError, match="H100 SXM has 75 GiB"):
        check_memory_of_nodes(large, None, 2, [node, node])
    check_memory_of_nodes(small, None, 2, [node])
    for unknown in ([{"CPU": 8.0}], [{"accelerator_type:XPU-9": 1.0}], [node, {"accelerator_type:H200": 1.0}]):
        check_memory_of_nodes(large, None, 2, unknown)


@pytest.mark.parametrize(
    ("kind", "device"),
    [
        ("H100", "H100 SXM"),
        ("A100", "A100 SXM 80GB"),
        ("A100-40G", "A100 SXM 40GB"),
        ("AMD-Instinct-MI300X", "MI300X"),
        ("", None),
    ],
)
def test_an_accelerator_by_the_name_that_ray_gives_it(kind: str, device: str | None) -> None:
    found = entry_of_accelerator(kind)
    assert (found and found.device.name) == device


CONFIGS = Path(__file__).parents[2] / "configs" / "large"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_large_configs_are_legal_and_fit(file: Path) -> None:
    loaded = load_config(file)
    gpus = loaded.job.nodes * int(loaded.job.procs_per_node)
    one = Job.of(loaded, 128_256).estimate(H100, gpus)
    assert file.stem.endswith(f"-{gpus}")
    assert one.fits
