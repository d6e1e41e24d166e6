"""Loading the model of a run's checkpoint as a module on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import nn

from bigtrain.api.config import load_plugins
from bigtrain.api.runs import RUNS_DIR
from bigtrain.checkpoint.restore import weights_at
from bigtrain.models.hf_files import HfFiles
from bigtrain.models.sampling import Choice
from bigtrain.training.sample import Writer, model_of_run, writer_beside, writer_of_model
from bigtrain.training.weights import Weights

if TYPE_CHECKING:
    from bigtrain.data.tokenizers import Tokenizer


class TextGenerator:
    """Generates text with a model that `load` returned.

    Args:
        make: Returns a writer for the model, with its tokenizer and on its current device.
    """

    def __init__(self, make: Callable[[], Writer]) -> None:
        self._make = make

    def __call__(
        self, prompt: str = "", tokens: int = 100, *, temperature: float = 0.8, top_k: int | None = None,
        seed: int = 0, stop: Sequence[str] = (),
    ) -> str:  # fmt: skip
        """Generate a continuation of a text, with the model's current weights and on its current device.

        Args:
            prompt: The beginning of the text.
            tokens: Largest number of new tokens. The text ends earlier at the model's end-of-text token, or before the
                first occurrence of a text of `stop`.
            temperature: Divisor of the logits; 0: always take the most probable token.
            top_k: Number of the most probable tokens from which each token is sampled; None: all tokens.
            seed: Seed of the sampling.
            stop: Texts that end the generation; they are not included in the result.

        Returns:
            The prompt and its continuation.

        Raises:
            UserError: The model does not generate text.
        """
        choice = Choice(temperature=temperature, top_k=top_k)
        return prompt + self._make().write([prompt], tokens=tokens, choice=choice, seed=seed, stop=stop)[0]


class LoadedModel(nn.Module):
    """The type of the models that `load` returns: the model's own class with two additional attributes."""

    tokenizer: Tokenizer | None
    """The model's tokenizer; None for images and arrays, or if a directory of weights has no tokenizer."""

    generate: TextGenerator
    """Generates a continuation of a text: `model.generate("Once", tokens=20)`."""


def load(
    run: str | os.PathLike[str],
    *,
    runs_dir: str | os.PathLike[str] = RUNS_DIR,
    plugin: str | os.PathLike[str] | Iterable[str] | None = None,
) -> LoadedModel:
    """Load the model of a run's checkpoint, on the CPU and in evaluation mode, with FP32 weights.

    Args:
        run: RUN or RUN@STEP, by name, by path, or by URL on a store; without a step, the newest intact checkpoint. Or a
            directory of Hugging Face weights, or one that `checkpoint import` wrote.
        runs_dir: The directory that contains the runs.
        plugin: The code of your own model; the value of `--plugin`.

    Returns:
        The module that the run's config describes. Weights without a run become a native model if bigtrain has one of
        that shape, else a model of transformers. `model.tokenizer` is the tokenizer of the data, or that in the
        directory of weights. `model.generate(text)` generates a continuation of a text.

    Raises:
        UserError: There is no such run or checkpoint, or its data are not found.
        CorruptionError: The checkpoint is damaged.
    """
    load_plugins(plugin)
    found = weights_at(os.fspath(run), Path(runs_dir))
    if isinstance(found, HfFiles) or not found[0].exists():
        weights = Weights.of(found)
        model = cast(LoadedModel, weights.build())
        model.tokenizer = weights.tokenizer()
        model.generate = TextGenerator(lambda: writer_beside(weights.directory, model))
        return model
    directory, step = found
    _, index, module = model_of_run(directory, step)
    model = cast(LoadedModel, module.eval())
    model.tokenizer = None if index.tokenizer is None else index.load_tokenizer()
    if not hasattr(type(model), "generate"):  # such as that of dalle, which generates images
        model.generate = TextGenerator(lambda: writer_of_model(directory, model))
    return model
