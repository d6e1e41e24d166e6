"""bigtrain's losses against those of a plain PyTorch loop that shares no code with it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
import webdataset

from bigtrain.models.init import initialise
from bigtrain.run import load_config
from bigtrain.storage import read_lines
from bigtrain.testing import plain_loop
from bigtrain.training.prepare import Prepared, prepare

STEPS = 50
LR, EPS, WARMUP = 1e-3, 1e-6, 20
"""Settings under which 50 free-running steps do not amplify rounding: the plain loop in FP32 stays within 1e-6 of
itself in FP64. At lr 3e-3 and eps 1e-8 those two differ by 6e-5, which would hide an error of a loop."""
SAME_PROCESS = 1e-6
"""Relative: a few units in the last place of FP32."""
MORE_PROCESSES = 1e-5
"""Relative: sums over ranks are taken in another order, and Adam carries the difference on."""


def read_batches(shard: str, steps: Iterable[list[str]], context: int) -> Iterator[plain_loop.Batch]:
    """The batches that lists of sample ids SOURCE/SHARD/DOCUMENT:OFFSET name, read from one shard."""
    samples = webdataset.WebDataset(shard, shardshuffle=False).decode()
    documents = [torch.tensor(sample["npy"].astype("int64")) for sample in samples]
    stream = torch.cat(documents)
    starts = [0, *torch.tensor([len(document) for document in documents]).cumsum(0).tolist()]
    for ids in steps:
        rows, weights = torch.zeros(len(ids), context + 1, dtype=torch.int64), torch.zeros(len(ids), context)
        for row, sample_id in enumerate(ids):
            document, offset = map(int, sample_id.rsplit("/", 1)[1].split(":"))
            piece = stream[starts[document] + offset :][: context + 1]
            rows[row, : len(piece)], weights[row, : len(piece) - 1] = piece, 1
        yield rows[:, :-1], rows[:, 1:], weights


def reference_losses(prepared: Prepared, samples: list[list[str]]) -> list[float]:
    config = prepared.config
    model = config.model.build(prepared.outputs)
    initialise(model, config.seed)
    plain = plain_loop.Llama(
        prepared.outputs, config.model.layers, config.model.width, config.model.heads, 4 * config.model.width,
        config.model.context,
    )  # fmt: skip
    plain.load_state_dict(plain_loop.named_weights(model.state_dict()))
    matrices = [parameter for parameter in plain.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in plain.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=EPS,
    )
    shard = str(Path(config.data.train) / "shard-000000.tar")
    losses = []
    for step, batch in enumerate(read_batches(shard, samples, config.model.context)):
        lr = LR * min(1.0, (step + 1) / WARMUP)
        losses.append(float(plain_loop.train_step(plain, optimizer, batch, lr, clip=1.0)))
    return losses


@pytest.fixture(scope="module")
def short_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So little text that 50 steps go round it more than twice, and meet its padded last sequence each time."""
    from bigtrain.data.packing.documents import pack
    from bigtrain.data.tokenizers import Tokenizer

    library = Path(os.__file__).parent
    out = tmp_path_factory.mktemp("short") / "shards"
    pack([library / "this.py", library / "stat.py", library / "keyword.py"], out, Tokenizer.open("bytes"))
    return out


@pytest.mark.parametrize(
    ("nproc", "micro_size", "tolerance"),
    [
        pytest.param(1, None, SAME_PROCESS, id="one process"),
        pytest.param(
            1, 3, SAME_PROCESS, id="one process, accumulation with a ragged batch", marks=pytest.mark.exhaustive
        ),
        pytest.param(2, 2, MORE_PROCESSES, id="two processes, accumulation", marks=pytest.mark.exhaustive),
        pytest.param(4, None, MORE_PROCESSES, id="four processes, filled up", marks=pytest.mark.slow),
    ],
)
def test_losses_equal_those_of_a_plain_loop(
    bigtrain: Callable,
    write_config: Callable,
    short_shards: Path,
    tmp_path: Path,
    nproc: int,
    micro_size: int | None,
    tolerance: float,
) -> None:
    config = write_config(
        model={"arch": "llama", "layers": 2, "width": 64, "heads": 4, "context": 48, "tied": True},
        data={"train": str(short_shards / "train")},
        batch={"size": 10},
        duration=f"{STEPS} steps",
        optimizer={"name": "adamw", "lr": LR, "eps": EPS, "weight_decay": 0.1, "betas": [0.9, 0.95], "clip": 1.0},
        schedule={"name": "constant", "warmup": f"{WARMUP} steps"},
        layout={"micro_size": micro_size},
    )
    result = bigtrain("train", config, "--nproc", nproc)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "tiny"
    samples = [line["ids"] for line in read_lines(run / "samples.jsonl")]
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = reference_losses(prepare(load_config(config)), samples)
    assert losses == pytest.approx(expected, rel=tolerance, abs=0)
    weights = [json.loads(line)["tokens"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert weights[-1] < STEPS * 10 * 48, "no padding was met: the test lost its point"
