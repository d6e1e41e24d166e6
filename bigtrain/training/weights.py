"""A model and its weights without a run: of Hugging Face weights, or of what `checkpoint import` wrote."""

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
"""Tokens of a sequence at the most, where the weights name no number of positions; and of an evaluation's."""


@dataclass(frozen=True)
class Weights:
    """What is known of them; no weight is read until `build`."""

    directory: Path
    """Where they lie, with their config.json and the files of their tokenizer."""
    keys: dict[str, Any]
    """The section `model`: of bigtrain's own family of that shape, else `arch: hf`."""
    rows: int
    """Rows of the vocabulary."""
    files: HfFiles | None = None
    step: int | None = None
    """Of an imported checkpoint."""

    @classmethod
    def of(cls, found: HfFiles | tuple[RunDirectory, int | None]) -> Weights:
        """The weights that `weights_at` found.

        Raises:
            UserError: A checkpoint of no run that does not say which model it holds.
        """
        return cls._of_files(found) if isinstance(found, HfFiles) else cls._imported(*found)

    @classmethod
    def _of_files(cls, files: HfFiles) -> Weights:
        if str(files.config.get("model_type")) in FAMILIES:
            keys = files.keys()
            stored = files.place(FAMILIES[keys["arch"]](**keys).hf_names()["embedding.weight"].name)
            if stored is None:
                raise UserError("The weights have no token embedding", str(files.directory))
            return cls(files.directory, keys, files.shapes[stored][0], files)
        context = files.config.get("max_position_embeddings") or LONGEST
        keys = {"arch": "hf", "hf": str(files.directory), "context": context}
        shape: Any = FAMILIES["hf"](**keys)
        return cls(files.directory, keys, shape.shape.get_text_config().vocab_size, files)

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
        """What `init.source` names them by; None for a model of `arch: hf`, which has them anyway."""
        if self.step is not None:
            return f"{self.directory.absolute()}@{self.step}"
        return None if self.keys["arch"] == "hf" else str(self.directory)

    def config(self) -> ModelConfig:
        """The model's."""
        return FAMILIES[self.keys["arch"]](**self.keys)

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer beside them; None where there is none that bigtrain reads."""
        try:
            return Tokenizer.open(str(self.directory))
        except UserError:
            return None

    def build(self) -> nn.Module:
        """The model with its weights, FP32, on the CPU, in evaluation mode.

        Raises:
            UserError: The weights do not fit the model.
            CorruptionError: They cannot be read, or do not verify.
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
