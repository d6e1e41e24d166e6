"""Loading the model of a run's checkpoint as a module on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import nn

from bigtrain.api.config import load_plugins
from bigtrain.api.runs import RUNS_DIR
from bigtrain.checkpoint.restore import run_at
from bigtrain.models.sampling import Choice
from bigtrain.run import RunDirectory
from bigtrain.training.sample import model_of_run, writer_of_model

if TYPE_CHECKING:
    from bigtrain.data.tokenizers import Tokenizer


class TextGenerator:
    """Generates continuations of texts with a model from `load`."""

    def __init__(self, run: RunDirectory, model: nn.Module) -> None:
        self._run, self._model = run, model

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
        writer = writer_of_model(self._run, self._model)
        choice = Choice(temperature=temperature, top_k=top_k)
        return prompt + writer.write([prompt], tokens=tokens, choice=choice, seed=seed, stop=stop)[0]


class LoadedModel(nn.Module):
    """The type of the models that `load` returns: the model's own class with two additional attributes."""

    tokenizer: Tokenizer | None
    """The tokenizer of the training data; None for images and arrays."""

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
        run: RUN, RUN@STEP or RUN@best, where RUN is a name, a path, or a URL on an object store. RUN alone is the
            newest intact checkpoint.
        runs_dir: The directory that holds the runs.
        plugin: Your own code that defines the model, one or several values of `--plugin`.

    Returns:
        The module that the config describes; its parameters have their qualified names. `model.tokenizer` is the
        tokenizer of the data, and `model.generate(text)` continues a text.

    Raises:
        UserError: There is no such run or checkpoint, or its data are not found.
        CorruptionError: The checkpoint is damaged.
    """
    load_plugins(plugin)
    directory, step = run_at(os.fspath(run), Path(runs_dir))
    _, index, module = model_of_run(directory, step)
    model = cast(LoadedModel, module.eval())
    model.tokenizer = None if index.tokenizer is None else index.load_tokenizer()
    model.generate = TextGenerator(directory, module)
    return model
