"""Models with weights without a run: Hugging Face weights, or checkpoints that `checkpoint import` wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from bigtrain.checkpoint.huggingface import FORMAT_VERSION, read_hf
from bigtrain.checkpoint.loader import read_tensors
from bigtrain.checkpoint.restore import newest_of
from bigtrain.config import UserError
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.models.config import FAMILIES, ModelConfig
from bigtrain.models.hf_files import HfFiles, read_object
from bigtrain.run import RunDirectory
from bigtrain.run.names import MODEL

LONGEST: Final = 1024
"""Maximum number of tokens of a sequence in an evaluation, and for weights that define no number of positions."""


@dataclass(frozen=True)
class Weights:
    """A description of weights without a run; no weight is read until `build`."""

    directory: Path
    """Directory of the weights, their config.json and the files of their tokenizer."""
    keys: dict[str, Any]
    """The section `model`: of a native family if one has this shape, else of `arch: hf`."""
    rows: int
    """Number of rows of the vocabulary."""
    files: HfFiles | None = None
    """The Hugging Face files; None for an imported checkpoint."""
    step: int | None = None
    """Step of an imported checkpoint; None for Hugging Face weights."""

    @classmethod
    def of(cls, found: HfFiles | tuple[RunDirectory, int | None]) -> Weights:
        """The weights that `weights_at` found.

        Raises:
            UserError: The weights lack a token embedding, or an imported checkpoint has no readable model.json.
        """
        return cls._of_files(found) if isinstance(found, HfFiles) else cls._imported(*found)

    @classmethod
    def _of_files(cls, files: HfFiles) -> Weights:
        if str(files.config.get("model_type")) in FAMILIES:
            keys = files.keys()
            model = FAMILIES[keys["arch"]](**keys)
            shape = files.shape_of(model.hf_names()[model.vocabulary_name])
            if shape is None:
                raise UserError("The weights have no token embedding", str(files.directory))
            return cls(files.directory, keys, shape[0], files)
        context = files.config.get("max_position_embeddings") or LONGEST
        keys = {"arch": "hf", "hf": str(files.directory), "context": context}
        foreign: Any = FAMILIES["hf"](**keys)
        return cls(files.directory, keys, foreign.shape.get_text_config().vocab_size, files)

    @classmethod
    def _imported(cls, run: RunDirectory, step: int | None) -> Weights:
        if not (run.path / MODEL).is_file():
            raise UserError(
                f"The checkpoint does not say which model it holds: it has no {MODEL}",
                str(run.path),
                "Import the weights again, or start a run from them: init: {source: DIR}.",
            )
        value = read_object(run.path / MODEL)
        if value.get("format_version", 0) > FORMAT_VERSION:
            raise UserError("A newer bigtrain wrote the checkpoint", str(run.path / MODEL), "Upgrade bigtrain.")
        return cls(run.path, value["model"], value["rows"], step=newest_of(run) if step is None else step)

    @property
    def source(self) -> str | None:
        """The value of `init.source` for these weights; None for a model of `arch: hf`, which loads them itself."""
        if self.step is not None:
            return f"{self.directory.absolute()}@{self.step}"
        return None if self.keys["arch"] == "hf" else str(self.directory)

    def config(self) -> ModelConfig:
        """The config of the model."""
        return FAMILIES[self.keys["arch"]](**self.keys)

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer in the directory; None if there is none that bigtrain can read."""
        try:
            return Tokenizer.open(str(self.directory))
        except UserError:
            return None

    def build(self) -> nn.Module:
        """The model with its weights, in FP32, on the CPU and in evaluation mode.

        Raises:
            UserError: The weights do not fit the model.
            CorruptionError: The weights cannot be read, or fail verification.
        """
        config = self.config()
        model = config.build(self.rows)
        if self.step is not None:
            checkpoints = RunDirectory(self.directory).checkpoints
            model.load_state_dict(read_tensors(checkpoints, self.step), strict=False)
        elif self.source is not None:
            assert self.files is not None
            state: dict[str, torch.Tensor] = dict(model.named_parameters())
            names = self.files.check_fit(config, {name: tuple(one.shape) for name, one in state.items()})
            read_hf(self.files, {name: names[name] for name in state}, state)
        return model.eval()
