"""LoRA adapters in the file format of Hugging Face's peft: adapter_config.json and adapter_model.safetensors.

The peft package is not needed. peft's names are those of transformers with a prefix: bigtrain's module
`layers.0.attention.query` is `base_model.model.model.layers.0.self_attn.q_proj` there. The matrices have the same
shapes in both.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import bigtrain
from bigtrain.checkpoint import loader
from bigtrain.checkpoint.export import PREFIX, appears_whole
from bigtrain.config import UserError
from bigtrain.models.adapters.lora import LoRAConfig
from bigtrain.models.config import ModelConfig
from bigtrain.models.hf_files import read_object
from bigtrain.models.huggingface import HfTensor
from bigtrain.storage import fsync_file, write_json

logger = logging.getLogger(__name__)

CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
_LAYER = re.compile(r"(?:.*?\.\d+\.)(.*)")
_TASKS: Final = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "masked": None}
_OWN: Final = {"lora_a": "lora_A", "lora_b": "lora_B"}

_FREE: Final = frozenset(
    [
        *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
        *("auto_mapping", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out"),
        *("runtime_config", "megatron_core", "qalora_group_size", "low_cpu_mem_usage"),
    ]
)
"""Keys of adapter_config.json that are read here, or do not change the result of stored adapters."""
_NEUTRAL: Final[tuple[Any, ...]] = (None, False, "none", [], {}, 0)
_BEGINS: Final[tuple[Any, ...]] = (True, False, "gaussian")
"""Values of init_lora_weights that leave the base weights as they are."""


@dataclass(frozen=True)
class PeftFiles:
    """The config and the tensor shapes of adapters in peft's format; the matrices are read on demand."""

    directory: Path
    facts: Mapping[str, Any]
    """Contents of adapter_config.json."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each stored tensor, by its stored name."""

    @staticmethod
    def is_one(directory: Path) -> bool:
        """Whether a directory holds adapters in peft's format."""
        return (directory / CONFIG_NAME).is_file()

    @classmethod
    def open(cls, directory: Path) -> PeftFiles:
        """Read the config, and the header of the safetensors file.

        Raises:
            UserError: A file is missing or damaged, or the adapters are of a kind that bigtrain does not support.
        """
        facts = read_object(directory / CONFIG_NAME)
        _refuse_unknown(facts, directory / CONFIG_NAME)
        path = directory / WEIGHTS_NAME
        try:
            with safe_open(path, framework="np") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"The adapters cannot be read: {error}", str(path)) from None
        return cls(directory, facts, shapes)

    @property
    def base(self) -> Path | None:
        """The base model's directory, if the config names one that exists on this machine; otherwise None."""
        named = self.facts.get("base_model_name_or_path")
        return Path(named) if named and Path(named).is_dir() else None

    def keys(self, names: Mapping[str, HfTensor]) -> dict[str, Any]:
        """The config section `model.adapter` that corresponds to the adapters.

        Args:
            names: Location of each parameter of the base model in transformers' state dict, by qualified name.

        Raises:
            UserError: The adapters adapt a matrix that bigtrain cannot adapt, or only some of the layers.
        """
        places = self.places(names)
        modules = {name.rpartition(".")[0] for name in places}
        targets = sorted({module.rpartition(".")[2] for module in modules})
        for name in names:
            module, _, own = name.rpartition(".")
            if own == "weight" and module.rpartition(".")[2] in targets and module not in modules:
                raise UserError(f"{module} has no adapter, but other layers have one", str(self.directory))
        return {
            "name": "lora", "rank": self.facts["r"], "alpha": float(self.facts["lora_alpha"]), "targets": targets
        }  # fmt: skip

    def places(self, names: Mapping[str, HfTensor]) -> dict[str, str]:
        """The stored name of each adapter matrix, by bigtrain's qualified name.

        Args:
            names: Location of each parameter of the base model in transformers' state dict, by qualified name.

        Raises:
            UserError: A stored matrix does not belong to any layer of the model, has another rank than the config says,
                or lacks the second matrix of its pair; or there are no matrices.
        """
        known = {stored: name for name, stored in _places(names).items()}
        found = {}
        for stored, shape in self.shapes.items():
            if stored not in known:
                raise UserError(
                    f"The adapters hold '{stored}', which bigtrain's model does not have",
                    str(self.directory / WEIGHTS_NAME),
                    "Merge them with peft (merge_and_unload), and start from the merged weights.",
                )
            name = known[stored]
            rank = shape[0 if name.endswith("lora_a") else 1]
            if rank != self.facts["r"]:
                raise UserError(f"'{stored}' has rank {rank}, but r is {self.facts['r']}", str(self.directory))
            found[name] = stored
        for name in found:
            other = name[:-1] + ("b" if name.endswith("a") else "a")
            if other not in found:
                raise UserError(f"The adapters hold {name}, but not {other}", str(self.directory / WEIGHTS_NAME))
        if not found:
            raise UserError("The file holds no adapter", str(self.directory / WEIGHTS_NAME))
        return found

    def read(self, stored: str) -> Tensor:
        """Read one matrix, by its stored name."""
        with safe_open(self.directory / WEIGHTS_NAME, framework="pt") as file:
            matrix: Tensor = file.get_tensor(stored)
        return matrix


def export_peft(directory: Path, step: int, out: Path, *, config: ModelConfig, base: str | None = None) -> list[Path]:
    """Write the adapters of a verified checkpoint for peft: `PeftModel.from_pretrained(model, out)` loads them.

    Args:
        directory: The directory that holds the run's checkpoints.
        step: Step of the checkpoint.
        out: A directory that does not exist yet, or is empty; it is created completely, or not at all.
        config: The config of the model.
        base: Path or Hub name of the base weights, for adapter_config.json.

    Returns:
        Paths of the written files.

    Raises:
        UserError: The model has no LoRA adapter, transformers has no such model, or an adapted layer is a part of a
            larger layer in transformers; `out` is not empty; or there is no checkpoint of `step`.
        CorruptionError: The checkpoint is damaged.
    """
    adapter = getattr(config, "adapter", None)
    if not isinstance(adapter, LoRAConfig):
        raise UserError("The run trains no LoRA adapter", str(directory), "Export with --format hf.")
    try:
        if config.follows_mup:
            raise ValueError("a model of transformers does not have the constants of model.mup")
        names = config.hf_names()
        adapted = config.adapted_weights()
        places = _places(names, only=adapted)
    except ValueError as error:
        raise UserError(
            f"The adapters cannot be exported to peft: {error}",
            str(directory),
            "Export with --format hf, which merges them.",
        ) from None
    reader = loader.verified_reader(directory, step)
    native = loader.read_full(reader, [PREFIX + name for name in places], PREFIX)
    tensors = {stored: native[name] for name, stored in places.items()}
    with appears_whole(out) as temporary:
        save_file(tensors, temporary / WEIGHTS_NAME, metadata={"format": "pt", "bigtrain": bigtrain.__version__})
        (temporary / WEIGHTS_NAME).chmod(0o644)
        fsync_file(temporary / WEIGHTS_NAME)
        write_json(temporary / CONFIG_NAME, _facts(config, adapter, {name: names[name] for name in adapted}, base))
    return [out / WEIGHTS_NAME, out / CONFIG_NAME]


def _facts(
    config: ModelConfig, adapter: LoRAConfig, adapted: Mapping[str, HfTensor], base: str | None
) -> dict[str, Any]:
    modules = {re.sub(_LAYER, r"\1", place.name.removesuffix(".weight")) for place in adapted.values()}
    if all(place.name == name for name, place in adapted.items()):
        # A model of transformers: parameters have its names, so targets already have the names that peft expects.
        modules = set(adapter.targets)
    inputs_first = [place.transposed or config.has_inputs_first(name) for name, place in adapted.items()]
    return {
        "peft_type": "LORA",
        "task_type": _TASKS[getattr(config, "task", "causal")],
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "fan_in_fan_out": any(inputs_first),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def _places(names: Mapping[str, HfTensor], *, only: Collection[str] | None = None) -> dict[str, str]:
    """The names in peft of the adapters' matrices, by qualified name.

    Args:
        names: Position of each parameter in transformers' state dict, by qualified name.
        only: Names of the adapted weights; None: all weights that an adapter supports.

    Raises:
        ValueError: A weight of `only` is a part of a larger layer in transformers.
    """
    found = {}
    for name, place in names.items():
        module, _, own = name.rpartition(".")
        if own != "weight" or (name not in only if only is not None else not name.startswith("layers.")):
            continue
        if place.part != (0, 1):
            if only is not None:
                raise ValueError(f"{module} is a part of {place.name} in transformers")
            continue
        for own, peft_name in _OWN.items():
            found[f"{module}.{own}"] = f"{_PREFIX}{place.name.removesuffix('.weight')}.{peft_name}.weight"
    return found


def _refuse_unknown(facts: Mapping[str, Any], where: Path) -> None:
    """Refuse an adapter_config.json with a setting that changes the adapters' result and that bigtrain lacks."""
    if facts.get("peft_type") != "LORA":
        raise UserError(f"peft_type is {facts.get('peft_type')!r}, but bigtrain supports only LORA", str(where))
    for key in ("r", "lora_alpha"):
        if not isinstance(facts.get(key), int | float):
            raise UserError(f"The key '{key}' is missing", str(where))
    if facts.get("lora_dropout"):
        logger.warning(
            "lora_dropout %s of %s is not applied: adapters train without dropout", facts["lora_dropout"], where
        )
    for key, value in facts.items():
        is_neutral = value in (_BEGINS if key == "init_lora_weights" else _NEUTRAL)
        if key not in _FREE and not is_neutral:
            raise UserError(
                f"{key} is {value!r}, which bigtrain's LoRA does not support",
                str(where),
                "Merge the adapters with peft (merge_and_unload), and start from the merged weights.",
            )
