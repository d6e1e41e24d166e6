"""Renders pictures of a model's outputs at each evaluation, for RUN/pictures, the report and the trackers."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from bigtrain.config import Count, UserError
from bigtrain.run import names
from bigtrain.training.callback import Callback, CallbackContext, Step
from bigtrain.training.config import CALLBACKS, CallbackConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bigtrain.engines.config import EngineConfig
    from bigtrain.models.config import ModelConfig
    from bigtrain.models.pictures import Shown
    from bigtrain.training.prepare import Prepared

logger = logging.getLogger(__name__)


@CALLBACKS.register
class PicturesConfig(CallbackConfig):
    """Renders at each evaluation what the model produces from the same samples and the same noise.

    Rank 0 renders the pictures, with a copy of the full (unsharded) weights on its device; the other ranks wait.
    """

    name: Literal["pictures"] = "pictures"
    count: Annotated[Count, Ge(1)] = 32
    """Maximum number of images in a picture; they show the first held-out samples."""
    attention: bool = False
    """Whether a second picture shows, beside each image, the attention of the last layer to each patch."""

    def check(self, engine: EngineConfig) -> None:
        """Refuse an engine whose state does not hold the model's tensors."""
        if not engine.keeps_tensors:
            raise UserError(
                f"The engine '{engine.name}' does not provide the full weights, which pictures need",
                "callbacks",
                "Use engine: {name: fsdp}, or remove the callback 'pictures'.",
            )

    def check_model(self, model: ModelConfig) -> None:
        """Refuse a model family that offers none of the requested pictures."""
        from bigtrain.models.config import ModelConfig

        shows_attention = type(model).attention_pictures is not ModelConfig.attention_pictures
        if self.attention and not shows_attention:
            raise UserError(
                f"The model of arch '{model.arch}' defines no pictures of its attention",
                "callbacks",
                "Remove 'attention' of the callback 'pictures', or define attention_pictures(self, network, shown) in "
                "its Config (bigtrain/models/pictures.py).",
            )
        if not self.attention and type(model).pictures is ModelConfig.pictures:
            raise UserError(
                f"The model of arch '{model.arch}' defines no pictures",
                "callbacks",
                "Add attention: true to the callback 'pictures'."
                if shows_attention
                else "Define pictures(self, network, shown) in its Config (bigtrain/models/pictures.py), or remove the "
                "callback 'pictures'.",
            )

    def build(self, context: CallbackContext) -> Callback:
        """Build this rank's callback; all ranks take part in gathering the weights."""
        return _Pictures(self, context)


class _Pictures(Callback):
    order = 15
    """Below that of `MetricsLog`, which sends the pictures of a step to the trackers."""

    def __init__(self, config: PicturesConfig, context: CallbackContext) -> None:
        self._config, self._context = config, context
        self._folder = context.directory / names.PICTURES
        self._prepared: Prepared = context.prepared
        self._shown: Shown | None = None

    def on_start(self, progress: Any) -> None:
        """Remove the pictures of steps that the resumed run will render again."""
        self.on_roll_back(progress)

    def on_roll_back(self, progress: Any) -> None:
        """Remove the pictures of the steps that the roll-back undoes."""
        if self._context.rank == 0 and self._folder.is_dir():
            for file in self._folder.iterdir():
                if (found := names.PICTURE.match(file.name)) and int(found["step"]) > progress.step:
                    file.unlink(missing_ok=True)

    def on_step(self, step: Step, progress: Any) -> None:
        """Gather the weights after an evaluation, and render the pictures on rank 0."""
        if not step.evaluation:
            return
        weights = self._weights()
        if self._context.rank == 0:
            try:
                step.pictures.update(self._rendered(step.number, weights))
            except OSError as error:
                # A full disk must not end the training.
                logger.warning("the pictures of step %d could not be written: %s", step.number, error)

    def _weights(self) -> dict[str, Tensor]:
        """The model's full (unsharded) parameters and buffers by qualified name, on rank 0; else empty. Collective."""
        from torch.distributed.tensor import DTensor

        prefix = "model."
        found = {}
        for name, value in self._context.engine.state().items():
            if name.startswith(prefix):
                full = value.full_tensor() if isinstance(value, DTensor) else value
                if self._context.rank == 0:
                    found[name.removeprefix(prefix)] = full.detach()
        return found

    def _rendered(self, step: int, weights: dict[str, Tensor]) -> dict[str, str]:
        """Write the pictures of a step, and return their paths by title."""
        import torch

        from bigtrain.training.grid import png

        model, device = self._prepared.config.model, self._context.device
        with _drawing_apart(device, self._prepared.config.seed), torch.no_grad():
            network: nn.Module = model.build(self._prepared.outputs)
            network.load_state_dict(weights, strict=False)
            network.eval().to(device)
            samples = self._samples()
            # As the engine does: forward() may depend on the step.
            shown = replace(samples, batch={**samples.batch, "step": torch.tensor(step, device=device)})
            made = dict(model.pictures(network, shown))
            if self._config.attention:
                made |= model.attention_pictures(network, shown)
        self._folder.mkdir(exist_ok=True)
        places = {}
        for title, picture in made.items():
            slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
            file = self._folder / f"{step:08d}-{slug}.png"
            file.write_bytes(png(picture))
            places[title] = str(file)
        return places

    def _samples(self) -> Shown:
        """The first held-out samples, or the first training samples if there is no held-out data."""
        from bigtrain.data.loader import EvaluationLoader
        from bigtrain.engines.rank import to_device
        from bigtrain.models.pictures import Shown
        from bigtrain.training.prepare import loader_options

        if self._shown is None:
            prepared, count = self._prepared, self._config.count
            config, index = prepared.config, (prepared.held_out or prepared.sources).first
            options = loader_options(config, self._context.engine, count, prepared.context) | {
                "dp_rank": 0, "dp_size": 1, "micro_size": None, "least_micro_batches": 1, "micro_batch_multiple": 1,
            }  # fmt: skip
            with EvaluationLoader(index, batches=1, sequences=count, **options) as loader:
                arrays = next(iter(loader)).micro_batches[0]
            kept = min(count, sum(index.sequence_counts(prepared.context, config.data.document_mask)))
            batch = to_device({name: values[:kept] for name, values in arrays.items()}, self._context.device)
            self._shown = Shown(batch, _decoder(index))
        return self._shown


def _decoder(index: Any) -> Any:
    """A function that turns tokens into text, up to the first end-of-text token."""
    if index.tokenizer is None:
        return lambda tokens: ""
    tokenizer = index.load_tokenizer()

    def text(tokens: Sequence[int]) -> str:
        kept = list(tokens)
        return str(tokenizer.decode(kept[: kept.index(tokenizer.eot)] if tokenizer.eot in kept else kept))

    return text


@contextmanager
def _drawing_apart(device: Any, seed: int) -> Iterator[None]:
    """Seed the random generators with the run's seed, and restore the training's random states afterwards."""
    import torch

    from bigtrain.models.plain.family import seeded

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), seeded(seed):
        yield
