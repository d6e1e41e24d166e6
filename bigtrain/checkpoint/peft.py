"""LoRA adapters in the files of Hugging Face's peft: adapter_config.json and adapter_model.safetensors.

peft's own package is not needed. Its names are those of transformers, with a prefix: bigtrain's
`layers.0.attention.query` is `base_model.model.model.layers.0.self_attn.q_proj` there. The matrices have equal shapes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
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
_OWN: Final = {"lora_a": "lora_A", "lora_b": "lora_B"}

_FREE: Final = frozenset(
    [
        *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
        *("auto_mapping", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out"),
        *("runtime_config", "megatron_core", "qalora_group_size", "low_cpu_mem_usage"),
    ]
)
"""Keys of adapter_config.json that are read here, or change nothing of what stored adapters compute."""
_NEUTRAL: Final[tuple[Any, ...]] = (None, False, "none", [], {}, 0)
_BEGINS: Final[tuple[Any, ...]] = (True, False, "gaussian")
"""Values of init_lora_weights that leave the base weights as they are."""


@dataclass(frozen=True)
class PeftFiles:
    """Adapters in peft's format, by their headers."""

    directory: Path
    facts: Mapping[str, Any]
    """adapter_config.json."""
    shapes: Mapping[str, tuple[int, ...]]

    @staticmethod
    def is_one(directory: Path) -> bool:
        """Whether a directory holds adapters."""
        return (directory / CONFIG_NAME).is_file()

    @classmethod
    def open(cls, directory: Path) -> PeftFiles:
        """Read config and headers.

        Raises:
            UserError: Something is missing or damaged, or the adapters are of a kind that bigtrain does not have.
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
        """The directory of the base model that they name, where it is one of this machine."""
        named = self.facts.get("base_model_name_or_path")
        return Path(named) if named and Path(named).is_dir() else None

    def keys(self, names: Mapping[str, HfTensor]) -> dict[str, Any]:
        """The section `model.adapter`.

        Args:
            names: Where each parameter of the base model lies.

        Raises:
            UserError: They adapt what bigtrain cannot, or only some of the layers.
        """
        places = self.places(names)
        modules = {name.rpartition(".")[0] for name in places}
        targets = sorted({module.rpartition(".")[2] for module in modules})
        for name in names:
            module, _, own = name.rpartition(".")
            if own == "weight" and module.rpartition(".")[2] in targets and module not in modules:
                raise UserError(f"{module} has no adapter, and other layers have one", str(self.directory))
        return {
            "name": "lora", "rank": self.facts["r"], "alpha": float(self.facts["lora_alpha"]), "targets": targets
        }  # fmt: skip

    def places(self, names: Mapping[str, HfTensor]) -> dict[str, str]:
        """The stored name of each adapter's matrix, by its qualified name.

        Raises:
            UserError: A stored one has no place in the model, another rank, or lacks its other half.
        """
        known = {stored: name for name, stored in _places(names).items()}
        found = {}
        for stored, shape in self.shapes.items():
            if stored not in known:
                raise UserError(
                    f"The adapters hold '{stored}', for which bigtrain's model has no place",
                    str(self.directory / WEIGHTS_NAME),
                    "Merge them with peft (merge_and_unload), and begin with the merged weights.",
                )
            name = known[stored]
            rank = shape[0 if name.endswith("lora_a") else 1]
            if rank != self.facts["r"]:
                raise UserError(f"'{stored}' has rank {rank}, and r is {self.facts['r']}", str(self.directory))
            found[name] = stored
        for name in found:
            other = name[:-1] + ("b" if name.endswith("a") else "a")
            if other not in found:
                raise UserError(f"The adapters hold {name}, and not {other}", str(self.directory / WEIGHTS_NAME))
        if not found:
            raise UserError("The file holds no adapter", str(self.directory / WEIGHTS_NAME))
        return found

    def read(self, stored: str) -> Tensor:
        """One of the matrices."""
        with safe_open(self.directory / WEIGHTS_NAME, framework="pt") as file:
            matrix: Tensor = file.get_tensor(stored)
        return matrix


def export_peft(directory: Path, step: int, out: Path, *, config: ModelConfig, base: str | None = None) -> list[Path]:
    """Write the adapters of a verified checkpoint as peft reads them: `PeftModel.from_pretrained(model, out)`.

    Args:
        directory: Of the checkpoints.
        step: Which one.
        out: A directory that does not exist yet, or is empty; it appears whole or not at all.
        config: The model's.
        base: Where the base weights are, for adapter_config.json.

    Returns:
        The files written.

    Raises:
        UserError: The model has no LoRA adapter, or one that transformers has no place for; as `export_hf`.
        CorruptionError: The checkpoint does not verify.
    """
    adapter = getattr(config, "adapter", None)
    if not isinstance(adapter, LoRAConfig):
        raise UserError("The run trains no LoRA adapter", str(directory), "Export with --format hf.")
    try:
        if config.follows_mup:
            raise ValueError("a model of transformers has no constants of model.mup")
        names = config.hf_names()
        places = _places(names, strict=True, only=adapter.targets)
    except ValueError as error:
        raise UserError(
            f"The adapters have no form in peft: {error}", str(directory), "Export with --format hf, which merges them."
        ) from None
    reader = loader.verified_reader(directory, step)
    native = loader.read_full(reader, [PREFIX + name for name in places], PREFIX)
    tensors = {stored: native[name] for name, stored in places.items()}
    with appears_whole(out) as temporary:
        save_file(tensors, temporary / WEIGHTS_NAME, metadata={"format": "pt", "bigtrain": bigtrain.__version__})
        (temporary / WEIGHTS_NAME).chmod(0o644)
        fsync_file(temporary / WEIGHTS_NAME)
        write_json(temporary / CONFIG_NAME, _facts(adapter, names, base))
    return [out / WEIGHTS_NAME, out / CONFIG_NAME]


def _facts(adapter: LoRAConfig, names: Mapping[str, HfTensor], base: str | None) -> dict[str, Any]:
    adapted = [
        place for name, place in names.items()
        if name.endswith(".weight") and name.split(".")[-2] in adapter.targets and name.startswith("layers.")
    ]  # fmt: skip
    modules = {re.sub(_LAYER, r"\1", place.name.removesuffix(".weight")) for place in adapted}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "fan_in_fan_out": any(place.transposed for place in adapted),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def _places(
    names: Mapping[str, HfTensor], *, strict: bool = False, only: tuple[str, ...] | None = None
) -> dict[str, str]:
    """The stored name of each matrix that an adapter may have, by its qualified name.

    Args:
        strict: Refuse a layer that is a part of a larger one in transformers; else skip it.
        only: Layers, by the last part of their names.

    Raises:
        ValueError: Such a layer.
    """
    found = {}
    for name, place in names.items():
        module, _, own = name.rpartition(".")
        if own != "weight" or not name.startswith("layers.") or (only and module.rpartition(".")[2] not in only):
            continue
        if place.part != (0, 1):
            if strict:
                raise ValueError(f"{module} is a part of {place.name} in transformers")
            continue
        for own, peft_name in _OWN.items():
            found[f"{module}.{own}"] = f"{_PREFIX}{place.name.removesuffix('.weight')}.{peft_name}.weight"
    return found


def _refuse_unknown(facts: Mapping[str, Any], where: Path) -> None:
    """Refuse a key whose value changes what the adapters compute, and that bigtrain does not have."""
    if facts.get("peft_type") != "LORA":
        raise UserError(f"peft_type is {facts.get('peft_type')!r}, and bigtrain has LORA alone", str(where))
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
                f"{key} is {value!r}, which bigtrain's LoRA does not have",
                str(where),
                "Merge the adapters with peft (merge_and_unload), and begin with the merged weights.",
            )
