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
from bigtrain.models.families.captioner import Captioner
from bigtrain.models.families.vae import Config as Vae
from bigtrain.models.families.vit import VisionTransformer
from bigtrain.models.init import initialise
from bigtrain.models.layers import Attention
from bigtrain.models.patches import cut
from bigtrain.models.pictures import Picture, one_above_the_other
from bigtrain.models.pictures import Shown as Samples
from bigtrain.optim.optimizers.adamw import AdamWConfig
from bigtrain.parallel.config import LayoutConfig
from bigtrain.parallel.mesh import Ranks
from bigtrain.testing.ranks import RankPool
from bigtrain.tracking.pictures import note_of
from bigtrain.tracking.report import write_report
from bigtrain.training.callback import CallbackContext
from bigtrain.training.callbacks.pictures import PicturesConfig, _Pictures
from bigtrain.training.grid import GAP, SIDE, png
from bigtrain.training.progress import Progress
from tests.models.networks.training import OWN, VOCABULARY, global_batch

SIZE, COUNT = 6, 5


class Shown(_Pictures):
    """With made-up samples in place of a shard directory."""

    def _samples(self) -> Any:
        images = torch.arange(COUNT * SIZE * SIZE).remainder(256).to(torch.uint8).view(COUNT, SIZE, SIZE, 1)
        return Samples({"images": images, "weights": torch.ones(COUNT)}, str)


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


@pytest.mark.parametrize(
    ("arch", "keys"),
    [("vae", {}), ("clip", {}), ("sam", {}), ("dalle", {"learns": "autoencoder"}), ("dalle", {"learns": "decoder"})],
)
def test_a_family_makes_its_pictures_of_a_batch_of_the_loader(arch: str, keys: dict[str, Any], tmp_path: Path) -> None:
    model = FAMILIES[arch](**OWN[f"families.{arch}"], **keys)
    arrays = global_batch(model, 0)
    assert "step" not in arrays

    class Loaded(_Pictures):
        def _samples(self) -> Any:
            return Samples({name: torch.from_numpy(values) for name, values in arrays.items()}, str)

    state = {f"model.{name}": value for name, value in model.build(VOCABULARY).state_dict().items()}
    prepared: Any = SimpleNamespace(config=SimpleNamespace(model=model, seed=1), outputs=VOCABULARY)
    engine: Any = SimpleNamespace(state=lambda: state)
    step: Any = SimpleNamespace(number=4, evaluation={"val_loss": 1.0}, pictures={})
    Loaded(PicturesConfig(), CallbackContext(engine, tmp_path, 9, 0, 1, torch.device("cpu"), prepared)).on_step(
        step, Progress()
    )
    assert step.pictures


def test_a_pictures_note_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "00000004-samples.png"
    for note in ("Décodé from <codes>.", ""):
        file.write_bytes(png(Picture(torch.zeros(1, 1, 2, 2), note=note)))
        assert note_of(file) == note
    file.write_text("no image")
    assert note_of(file) == ""


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


IMAGES = {"image_size": 8, "channels": 3, "patch": 4, "layers": 2, "width": 16, "heads": 4}
PATCHES, TOKENS = 4, 5
SAME_SHARES = 1e-6
"""Absolute, of shares up to 1: FP32 against float64."""


def attention_by_hand(layer: Any, x: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(d)) of a block, the mean over heads (B, C, C), in float64.

    Args:
        sees: Boolean, which query (row) sees which key.
    """
    attention: Attention = layer.attention
    norm = layer.attention_norm
    x = torch.nn.functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    split = (*x.shape[:2], attention.heads, -1)
    query = (x @ attention.query.weight.T + attention.query.bias).view(split)
    key = (x @ attention.key.weight.T + attention.key.bias).view(split)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    shares = torch.where(sees, scores.exp(), 0.0)
    return (shares / shares.sum(-1, keepdim=True)).mean(1)


def drawn(arch: str, outputs: int) -> tuple[Any, Any, torch.Tensor]:
    """A model of random weights in float64, its samples, and the maps that are drawn beside the images."""
    config = FAMILIES[arch](**IMAGES, **({"context": TOKENS} if arch == "captioner" else {}))
    model = config.build(outputs)
    initialise(model, seed=1)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    lengths = torch.tensor([1, 5, 3])
    batch = {
        "images": torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8),
        "tokens": torch.randint(0, outputs, (3, TOKENS)),
        "weights": (torch.arange(TOKENS) < lengths[:, None]).float(),
    }
    with torch.no_grad():
        pictures = config.attention_pictures(model, SimpleNamespace(batch=batch))  # type: ignore[arg-type]
    pairs = pictures["attention"].images.view(3, 2, 3, 8, 8)
    assert torch.allclose(pairs[:, 0], batch["images"].permute(0, 3, 1, 2) / 255)
    model.compute_dtype = torch.float64
    return model.double(), batch, pairs[:, 1]


def same_maps(maps: torch.Tensor, shares: torch.Tensor) -> None:
    """A map's every patch has one brightness: its share of the attention (B, patches) over the largest one."""
    expected = (shares / shares.amax(1, keepdim=True)).view(-1, 1, 2, 2)
    for row in range(8):
        for column in range(8):
            found = maps[:, :, row, column]
            assert (found - expected[:, :, row // 4, column // 4]).abs().max() <= SAME_SHARES


@torch.no_grad()
def test_the_attention_of_patches_is_softmax_of_their_products() -> None:
    model, batch, maps = drawn("vit", 3)
    assert isinstance(model, VisionTransformer)
    x = model.embedding(cut(batch["images"], 4, torch.float64)) + model.position_embedding.weight
    x = model.layers[0](x)
    same_maps(maps, attention_by_hand(model.layers[1], x, torch.ones(PATCHES, PATCHES, dtype=torch.bool)).mean(1))


@torch.no_grad()
def test_the_attention_of_a_caption_is_that_of_what_writes_its_tokens() -> None:
    model, batch, maps = drawn("captioner", 7)
    assert isinstance(model, Captioner)
    patches = model.patch_embedding(cut(batch["images"], 4, torch.float64))
    x = torch.cat([patches, model.embedding.weight[batch["tokens"][:, :-1]]], 1) + model.position_embedding.weight
    places = torch.arange(x.shape[1])
    sees = (places < PATCHES) | (places[:, None] >= places)
    found = attention_by_hand(model.layers[1], model.layers[0](x, sees[None, None]), sees)
    shares = torch.stack([
        found[row, PATCHES - 1 : PATCHES - 1 + length, :PATCHES].mean(0) for row, length in enumerate((1, 5, 3))
    ])  # fmt: skip
    same_maps(maps, shares)


def test_attention_is_rendered_where_it_is_requested(tmp_path: Path) -> None:
    model = FAMILIES["vit"](**(IMAGES | {"image_size": SIZE, "patch": 3, "channels": 1}))
    weights = model.build(3)
    initialise(weights, seed=1)
    prepared: Any = SimpleNamespace(config=SimpleNamespace(model=model, seed=1), outputs=3)
    engine: Any = SimpleNamespace(state=lambda: {f"model.{name}": x for name, x in weights.state_dict().items()})
    context = CallbackContext(engine, tmp_path, 9, 0, 1, torch.device("cpu"), prepared)
    step: Any = SimpleNamespace(number=4, evaluation={"val_loss": 1.0}, pictures={})
    config = PicturesConfig(attention=True)
    config.check_model(model)
    Shown(config, context).on_step(step, Progress())
    assert list(step.pictures) == ["attention"]
    assert Image.open(step.pictures["attention"]).width == 8 * (60 + GAP) + GAP


def test_what_offers_no_pictures_is_refused_before_the_start() -> None:
    with pytest.raises(UserError, match="'vae' defines no pictures of its attention"):
        PicturesConfig(attention=True).check_model(Vae(image_size=SIZE, width=8, latent=2))
    with pytest.raises(UserError, match=r"defines no pictures\n.*\n.*attention: true"):
        PicturesConfig().check_model(FAMILIES["vit"](image_size=28))
    with pytest.raises(UserError, match="'vit' defines no pictures"):
        PicturesConfig().check_model(FAMILIES["vit"](image_size=28))
    with pytest.raises(UserError, match="'deepspeed' does not provide the full weights"):
        PicturesConfig().check(ENGINES["deepspeed"]())
