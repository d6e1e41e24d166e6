"""Pictures of what a model makes: the same at every layout, in the run's directory and in the report."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bigtrain.config import UserError
from bigtrain.engines.config import ENGINES
from bigtrain.engines.fsdp.config import FSDPConfig
from bigtrain.models.config import FAMILIES
from bigtrain.models.families.vae import Config as Vae
from bigtrain.models.pictures import Picture, one_above_the_other
from bigtrain.optim.optimizers.adamw import AdamWConfig
from bigtrain.parallel.config import LayoutConfig
from bigtrain.parallel.mesh import Ranks
from bigtrain.testing.ranks import RankPool
from bigtrain.tracking.report import write_report
from bigtrain.training.callback import CallbackContext
from bigtrain.training.callbacks.pictures import PicturesConfig, _Pictures
from bigtrain.training.grid import GAP, SIDE, png
from bigtrain.training.progress import Progress

SIZE, COUNT = 6, 5


class Shown(_Pictures):
    """With made-up samples in place of a shard directory."""

    def _samples(self) -> Any:
        images = torch.arange(COUNT * SIZE * SIZE).remainder(256).to(torch.uint8).view(COUNT, SIZE, SIZE, 1)
        return SimpleNamespace(batch={"images": images, "weights": torch.ones(COUNT)}, count=COUNT, text=str)


def rendered(folder: Path) -> dict[str, str]:
    """Render the pictures of an untrained model on this rank; whether the run's draws stay as they were."""
    model, ranks = Vae(image_size=SIZE, width=8, latent=2), Ranks.from_environment()
    engine = FSDPConfig().build(
        model, 3, AdamWConfig(), layout=LayoutConfig(), precision="fp32", seed=1, ranks=ranks
    )  # fmt: skip
    prepared: Any = SimpleNamespace(config=SimpleNamespace(model=model, seed=1), outputs=3)
    context = CallbackContext(engine, folder, 9, ranks.rank, ranks.world_size, torch.device("cpu"), prepared)
    callback = Shown(PicturesConfig(), context)
    step: Any = SimpleNamespace(number=4, evaluation={"val_loss": 1.0}, pictures={})
    before = torch.get_rng_state()
    callback.on_step(step, Progress())
    assert torch.equal(before, torch.get_rng_state())
    return step.pictures


def test_one_process_and_two_ranks_render_the_same_once(ranks: RankPool, tmp_path: Path) -> None:
    found = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        places, *others = ranks.run(rendered, folder, ranks=count)
        assert list(places) == ["reconstructions", "samples"]
        assert others in ([], [{}])
        found[count] = {title: Path(place).read_bytes() for title, place in places.items()}
    assert found[1] == found[2]
    _taken_back(tmp_path / "1")
    _shown(tmp_path / "2")


def _taken_back(folder: Path) -> None:
    """A resume at an earlier step removes pictures, and nothing else."""
    (folder / "pictures" / "mine.png").touch()
    context: Any = SimpleNamespace(directory=folder, rank=0, prepared=None)
    for step, left in ((4, 3), (3, 1)):
        _Pictures(PicturesConfig(), context).on_start(Progress(step=step))
        assert len(list((folder / "pictures").iterdir())) == left


def _shown(folder: Path) -> None:
    page = write_report(folder).read_text()
    assert page.count('<img src="data:image/png;base64,') == 2
    assert 'alt="samples at step 4"' in page


def test_pairs_stand_one_above_the_other() -> None:
    upper, lower = torch.full((5, 1, 2, 2), 0.2), torch.full((5, 1, 2, 2), 0.8)
    picture = one_above_the_other(upper, lower, columns=3)
    assert picture.images[:, 0, 0, 0].tolist() == pytest.approx(
        [0.2] * 3 + [0.8] * 3 + [0.2] * 2 + [1] + [0.8] * 2 + [1]
    )


def test_images_lie_in_rows_of_one_size() -> None:
    images = torch.zeros(3, 1, 2, 2)
    images[2, :, 0, 0] = 1
    shown = np.asarray(Image.open(io.BytesIO(png(Picture(images, columns=2)))))
    assert shown.shape == (2 * (SIDE + GAP) + GAP, 2 * (SIDE + GAP) + GAP, 3)
    assert shown[GAP, GAP].tolist() == [0, 0, 0]
    assert shown[SIDE + 2 * GAP, GAP].tolist() == [255, 255, 255]
    taller = Image.open(io.BytesIO(png(Picture(images, 2, ("a", "b", "c")))))
    assert taller.height > shown.shape[0]


def test_what_offers_no_pictures_is_refused_before_the_start() -> None:
    with pytest.raises(UserError, match="'vit' offers no pictures"):
        PicturesConfig().check_model(FAMILIES["vit"](image_size=28))
    with pytest.raises(UserError, match="'deepspeed' gives no full weights"):
        PicturesConfig().check(ENGINES["deepspeed"]())
