"""Any language model of Hugging Face transformers, loaded with its weights from a directory or the hub.

transformers initialises these models itself, so bigtrain reads their initial weights from a file. To train from
scratch, create a model with transformers and save it:
`AutoModelForCausalLM.from_config(config).save_pretrained(PATH)`. These models run on the engine `accelerate`.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt
from pydantic import field_validator, model_validator

from bigtrain.config import UserError
from bigtrain.models.adapter import ADAPTERS, AdapterConfig
from bigtrain.models.config import FAMILIES, Flops, ModelConfig
from bigtrain.storage import hash_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from bigtrain.models.huggingface import HfTensor

Task = Literal["causal", "masked", "seq2seq"]


@FAMILIES.register
class Config(ModelConfig):
    """A model of transformers, whose shape is defined by the config.json in its directory."""

    keeps_contract: ClassVar[bool] = False
    loss_unit: ClassVar[str] = "nats per token"
    later_keys: ClassVar[frozenset[str]] = frozenset({"adapter"})

    arch: Literal["hf"] = "hf"
    hf: str
    """Directory with config.json and *.safetensors, or the name of a model on the hub."""
    task: Task = "causal"
    """What is predicted. causal: the next token; masked: masked tokens; seq2seq: the second part of a sequence from the
    first."""
    masked: Annotated[float, Gt(0), Lt(1)] = 0.15
    """Share of the tokens that are masked and predicted (task masked)."""
    mask_token: Annotated[int, Ge(0)] | None = None
    """Id of the mask token; null: read from the directory's tokenizer.json ([MASK] or <mask>)."""
    source: Annotated[float, Gt(0), Lt(1)] = 0.5
    """Share of a sequence that the encoder reads (task seq2seq); the decoder predicts the rest."""
    adapter: Annotated[AdapterConfig, ADAPTERS] | None = None
    """Train small parameters beside frozen weights: {name: lora, rank: 8, alpha: 16, targets: [q_proj, v_proj]}, with
    targets as in peft's `target_modules`; null: all weights are trained."""
    dropout: float = 0.0
    """Must be 0: dropout of these models would depend on the layout."""

    @field_validator("hf")
    @classmethod
    def _absolute(cls, value: str) -> str:
        path = Path(value).expanduser()
        return str(path.resolve()) if path.is_dir() else value

    @model_validator(mode="after")
    def _is_possible(self) -> Config:
        if self.dropout != 0:
            raise ValueError(
                "dropout of a Hugging Face model is always 0: it draws from torch's generator, so its bits would "
                "change with the layout; set dropout to 0"
            )
        if self.task == "seq2seq" and not 1 <= self.source_tokens < self.context:
            raise ValueError(
                f"context {self.context} leaves no tokens for the source or for the target with source {self.source}"
            )
        return self

    @property
    def source_tokens(self) -> int:
        """Number of tokens of a sequence that the encoder reads (task seq2seq)."""
        return round(self.source * self.context)

    @cached_property
    def directory(self) -> Path:
        """Directory of config.json and the weights; a model on the hub is downloaded once.

        Raises:
            UserError: `hf` is neither a directory nor a model on the hub, or it has no config.json or no safetensors.
        """
        path = Path(self.hf)
        if not path.is_dir():
            path = _fetch(self.hf)
        if not (path / "config.json").is_file():
            raise UserError(f"There is no config.json in {path}", "model.hf", "Name a directory of a saved model.")
        if not list(path.glob("*.safetensors")):
            raise UserError(
                f"There are no weights (*.safetensors) in {path}",
                "model.hf",
                "A Hugging Face model starts from saved weights. Create them: "
                "AutoModel...from_config(config).save_pretrained(PATH).",
            )
        return path

    def fingerprint(self) -> dict[str, str]:
        """See `ModelConfig.fingerprint`: a hash of config.json and the weights, independent of their path."""
        files = [self.directory / "config.json", *sorted(self.directory.glob("*.safetensors"))]
        listed = "".join(f"{file.name} {hash_file(file)}\n" for file in files)
        return {"hf": hashlib.sha256(listed.encode()).hexdigest()}

    @cached_property
    def hidden_token(self) -> int:
        """Id of the mask token.

        Raises:
            UserError: Neither the config nor the directory's tokenizer.json defines it.
        """
        if self.mask_token is not None:
            return self.mask_token
        tokenizer = self.directory / "tokenizer.json"
        added = json.loads(tokenizer.read_text(encoding="utf-8"))["added_tokens"] if tokenizer.is_file() else []
        for token in added:
            if token["content"] in ("[MASK]", "<mask>"):
                return int(token["id"])
        raise UserError("The mask token is not known", "model.mask_token", "Set model.mask_token to its id.")

    @cached_property
    def shape(self) -> PretrainedConfig:
        """The config object of transformers, with all dropout rates set to 0.

        Raises:
            UserError: transformers cannot read config.json, or does not know this type of model.
        """
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.directory, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"transformers cannot read the model: {error}", str(self.directory)) from None
        _without_dropout(config)
        return config

    def check_source(self, vocab_size: int) -> None:
        """See `ModelConfig.check_source`; the model is not built with weights.

        Raises:
            UserError: The data has more tokens than the model's vocabulary, `context` exceeds its positions, or it does
                not support the task.
        """
        config = self.shape
        text = config.get_text_config()
        if vocab_size > text.vocab_size:
            raise UserError(
                f"The data has {vocab_size} different tokens, but the model has {text.vocab_size}",
                str(self.directory),
                "Pack the data with the tokenizer of the model.",
            )
        from bigtrain.models.hf_tasks import check_task

        check_task(self, config)
        positions = self._positions(getattr(text, "max_position_embeddings", None))
        if positions is not None and self.context > positions:
            raise UserError(
                f"model.context {self.context} is longer than the model's {positions} positions",
                "model.context",
                f"Set model.context to {positions} or less.",
            )
        if self.task == "masked" and self.hidden_token >= text.vocab_size:
            raise UserError(
                f"mask_token {self.hidden_token} is not in the vocabulary of {text.vocab_size}", "model.mask_token"
            )

    def _positions(self, said: int | None) -> int | None:
        """Maximum sequence length; None: unlimited. A position table with a padding row (RoBERTa) starts after it.

        Args:
            said: `max_position_embeddings` of config.json, if it has one.
        """
        from torch import nn

        tables = [
            module.num_embeddings - module.padding_idx - 1
            for name, module in self.meta_model.named_modules()
            if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None
        ]
        return min([*tables, *([said] if said is not None else [])], default=None)

    def hf_names(self) -> dict[str, HfTensor]:
        """See `ModelConfig.hf_names`: all parameters except an adapter's, under their own names."""
        from bigtrain.models.huggingface import HfTensor

        names = [name for name, _ in self.meta_model.named_parameters()]
        return {name: HfTensor(name) for name in names if not self.is_adapter(name)}

    def is_adapter(self, name: str) -> bool:
        """See `ModelConfig.is_adapter`."""
        return self.adapter is not None and self.adapter.is_own(name)

    @property
    def frozen(self) -> tuple[str, ...]:
        """See `ModelConfig.frozen`."""
        return () if self.adapter is None else tuple(self.hf_names())

    def adapted_weights(self) -> list[str]:
        """See `ModelConfig.adapted_weights`."""
        if self.adapter is None:
            return []
        from bigtrain.models.hf_adapters import adapted_layers

        return [f"{name}.weight" for name in adapted_layers(self.meta_model, self.adapter)]

    def has_inputs_first(self, name: str) -> bool:
        """See `ModelConfig.has_inputs_first`."""
        from transformers.pytorch_utils import Conv1D

        return isinstance(self.meta_model.get_submodule(name.rpartition(".")[0]), Conv1D)

    def hf_config(self, rows: int) -> dict[str, Any]:
        """The config.json of the directory from which the model was loaded."""
        config: dict[str, Any] = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        return config

    def build(self, vocab_size: int) -> PreTrainedModel:
        """The model with the weights of its directory, in FP32 on the CPU; an adapter's parameters are zero.

        Raises:
            UserError: The model is not suitable (see `check_source`), or its weights lack parameters, which
                transformers would initialise randomly.
        """
        self.check_source(vocab_size)
        from bigtrain.models.hf_tasks import load

        return load(self)

    def build_for_engine(self, vocab_size: int, seed: int) -> PreTrainedModel:
        """The model of `build`, with an adapter's parameters initialised.

        Raises:
            UserError: See `build`.
        """
        model = self.build(vocab_size)
        if self.adapter is not None:
            from bigtrain.models.hf_adapters import begin

            begin(model, self.adapter, seed)
        return model

    def parameter_count(self, vocab_size: int) -> int:
        """Exact number of parameters; a tied weight is counted once."""
        return sum(parameter.numel() for parameter in self.meta_model.parameters())

    def parameter_count_without_embeddings(self, vocab_size: int) -> int:
        """Number of parameters without the tables of tokens and positions; an untied head is counted."""
        from torch import nn

        tables = {
            id(module.weight): module.weight.numel()
            for module in self.meta_model.modules()
            if isinstance(module, nn.Embedding)
        }
        return self.parameter_count(vocab_size) - sum(tables.values())

    def flops_per_token(self, vocab_size: int) -> Flops:
        """Matmul FLOPs per token of the sequence, by the convention of `DecoderConfig.flops_per_token`."""
        from bigtrain.models.hf_tasks import flops

        return flops(self, self.meta_model)

    @cached_property
    def meta_model(self) -> PreTrainedModel:
        """The model on the meta device, without values.

        Raises:
            UserError: A target of the adapter names no linear layer.
        """
        import torch

        from bigtrain.models.hf_adapters import adapt
        from bigtrain.models.hf_tasks import auto_class

        with torch.device("meta"):
            model: PreTrainedModel = auto_class(self.task).from_config(self.shape)
            if self.adapter is not None:
                adapt(model, self.adapter)
        return model


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name!r} is not a directory, and no model of that name can be downloaded from the hub: {error}",
            "model.hf",
            "Name a directory with config.json and *.safetensors.",
        ) from None


def _without_dropout(config: Any) -> None:
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            _without_dropout(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and "drop" in name:
            setattr(config, name, 0.0)
