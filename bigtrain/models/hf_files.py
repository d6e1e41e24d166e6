"""Reads a directory of Hugging Face weights (config.json, one or several safetensors files) without torch."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.config import UserError, nearest
from bigtrain.models.config import FAMILIES, ModelConfig
from bigtrain.storage import hash_file, hash_text

if TYPE_CHECKING:
    from bigtrain.models.huggingface import HfTensor

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
ONE_FILE = "model.safetensors"
TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, WORDS_NAME = "tokenizer.json", "tokenizer_config.json", "vocab.txt"
COMPANIONS = (
    *(CONFIG_NAME, "generation_config.json", TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, "tokenizer.model", WORDS_NAME),
    *("chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
)
"""Files that accompany weights: configs and the files of the tokenizer."""
INDEX_NAME = f"{ONE_FILE}.index.json"
MAX_JSON_BYTES = 64 << 20
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors")
_CONSTANTS = ("norm_eps", "rope_theta", "rope_scaling", "heads", "tied")
HEAD_NAME = "lm_head.weight"
_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|wte)\.weight")
_NORM = re.compile(r"(?<=LayerNorm\.)(weight|bias)$")
_OLDER = {"weight": "gamma", "bias": "beta"}
_NO_PARAMETERS = re.compile(r"(.*\.)?(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq)")
"""Names of constants that older files store as tensors; they are ignored."""


@dataclass(frozen=True)
class HfFiles:
    """The content of a directory of Hugging Face weights, read from config.json and file headers, without weights."""

    directory: Path
    config: dict[str, Any]
    files: Mapping[str, str]
    """Name of the file that contains each tensor, by tensor name."""
    shapes: Mapping[str, tuple[int, ...]]

    @staticmethod
    def is_one(directory: Path) -> bool:
        """Whether a directory contains config.json and safetensors files."""
        return (directory / CONFIG_NAME).is_file() and any(directory.glob("*.safetensors"))

    @classmethod
    def open(cls, directory: Path) -> HfFiles:
        """Read config.json and the headers of all safetensors files.

        Raises:
            UserError: A file is missing or damaged.
        """
        config = read_object(directory / CONFIG_NAME)
        names = _part_names(directory)
        files: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name in names:
            for tensor, shape in _header(directory / name).items():
                if not _NO_PARAMETERS.fullmatch(tensor):
                    files[tensor], shapes[tensor] = name, shape
        return cls(directory.resolve(), config, files, shapes)

    def place(self, name: str) -> str | None:
        """The name under which a tensor is stored here; None if it is not.

        Files of a base model omit the first component of the name. Older files name the weight and bias of a norm gamma
        and beta. A tied embedding may be stored under the name of the head.
        """
        older = _NORM.sub(lambda found: _OLDER[found[0]], name)
        for one in (name, older):
            short = one.partition(".")[2]
            if one in self.files or short in self.files:
                return one if one in self.files else short
        # A tied matrix may be stored under the name of the embedding or of the head.
        is_embedding = _EMBEDDING.fullmatch(name) is not None
        return HEAD_NAME if is_embedding and HEAD_NAME in self.files and self._is_tied else None

    def places(self, place: HfTensor) -> list[str] | None:
        """The stored names of all tensors that make up a parameter; None if a tensor is missing."""
        found = [stored for name in place.names if (stored := self.place(name)) is not None]
        return found if len(found) == len(place.names) else None

    def shape_of(self, place: HfTensor) -> tuple[int, ...] | None:
        """The shape of a parameter according to its stored tensors; None if a tensor is missing."""
        stored = self.places(place)
        return None if stored is None else place.shape_of(*(self.shapes[name] for name in stored))

    @property
    def _is_tied(self) -> bool:
        try:
            return bool(self.keys().get("tied"))
        except UserError:
            return bool(self.config.get("tie_word_embeddings"))

    def file_hashes(self, names: list[str]) -> dict[str, str]:
        """The content hash of each of these files, which are read completely."""
        return {name: hash_file(self.directory / name) for name in names}

    @property
    def all_files(self) -> list[str]:
        """Names of config.json and of the files with weights, in a fixed order."""
        return [CONFIG_NAME, *sorted(set(self.files.values()))]

    def keys(self) -> dict[str, Any]:
        """The keys of `model` that build a model of this shape.

        Raises:
            UserError: bigtrain has no model of this type, or its family lacks a feature that config.json requires.
        """
        family = self._family
        stated = self._stated
        if family.hides_tokens and "mask_token_id" not in stated:
            last = int(stated.get("vocab_size", 1)) - 1
            logger.warning(
                "no file beside %s names the mask token: the last token, %d, is used as model.mask",
                self.directory / CONFIG_NAME, last,
            )  # fmt: skip
            stated = {**stated, "mask_token_id": last}
        try:
            return {**family.from_hf_config(stated), **self._padding()}
        except (ValueError, KeyError) as error:
            raise UserError(f"bigtrain cannot build this model: {error}", str(self.directory)) from None

    @property
    def _family(self) -> type[ModelConfig]:
        kind = str(self.config.get("model_type"))
        try:
            return FAMILIES[kind]
        except UserError:
            raise UserError(
                f"bigtrain has no model of transformers' type '{kind}'",
                str(self.directory / CONFIG_NAME),
                "Train it as it is: model: {arch: hf, hf: DIR, context: N}, engine: {name: accelerate}.",
            ) from None

    @cached_property
    def _stated(self) -> dict[str, Any]:
        """config.json; for a family that masks tokens, with the mask token's id from the tokenizer if it lacks one."""
        if not self._family.hides_tokens or "mask_token_id" in self.config:
            return self.config
        found = mask_token(self.directory)
        return self.config if found is None else {**self.config, "mask_token_id": found}

    def _padding(self) -> dict[str, int]:
        """The key `vocab_multiple`, if the embedding has more rows than the directory's tokenizer has tokens."""
        rows = next((shape[0] for name, shape in self.shapes.items() if _EMBEDDING.fullmatch(name)), 0)
        rows = rows or self.shapes.get(HEAD_NAME, (0,))[0]
        path = self.directory / TOKENIZER_NAME
        tokens = 0
        if path.is_file():
            value = read_object(path)
            vocabulary = value.get("model", {}).get("vocab", {})
            ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
            tokens = max([-1, *ids, *(token["id"] for token in value.get("added_tokens", []))]) + 1
        if not tokens or tokens >= rows:
            return {}
        usual = (multiple for multiple in (64, 128, 256, 512) if -(-tokens // multiple) * multiple == rows)
        return {"vocab_multiple": next(usual, rows)}

    def check_fit(self, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, HfTensor]:
        """Check that the weights fit a model.

        Args:
            config: Config of the model.
            shapes: Shapes of the parameters to be read, by qualified name.

        Returns:
            `config.hf_names()`: the position of each parameter in the weights, by qualified name.

        Raises:
            UserError: A tensor is missing, has another shape, or is not a parameter of the model; or a key of `model`
                differs from config.json.
        """
        try:
            names = config.hf_names()
            self._check_numbers(config, own_head="head.weight" not in shapes)
        except ValueError as error:
            raise UserError(f"init.source: {error}", str(self.directory), "Change 'model'.") from None
        for name, shape in shapes.items():
            stored = self.shape_of(names[name]) if name in names else None
            if stored is None:
                lacking = f"'{names[name].name}', which is {name} here" if name in names else name
                raise UserError(
                    f"The weights lack {lacking}",
                    str(self.directory),
                    "Change 'model', or add the name to init.fresh to draw it from the seed.",
                )
            if stored != tuple(shape):
                raise UserError(
                    f"{name} is {stored} in the weights and {tuple(shape)} here",
                    str(self.directory),
                    _fix_shape(stored, tuple(shape), config.hides_tokens),
                )
        known = {stored for place in names.values() for stored in self.places(place) or ()}
        spare = sorted(name for name in self.files.keys() - known if not re.fullmatch(config.base.hf_unused, name))
        if spare:
            close = nearest(spare[0], [one for place in names.values() for one in place.names])
            raise UserError(
                f"The weights hold '{spare[0]}', which a model of arch '{config.arch}' does not have",
                str(self.directory),
                f"The nearest name here is '{close}'." if close else "Change 'model'.",
            )
        return names

    def _check_numbers(self, config: ModelConfig, own_head: bool) -> None:
        """Check constants that do not appear in any shape, such as `norm_eps`, but change what the model computes.

        Args:
            own_head: Whether a head of the model may be initialised instead of read, so that `tied` may differ.
        """
        if config.follows_mup:
            raise ValueError("these weights were not trained with the constants of model.mup: remove model.mup")
        hf = self._family.from_hf_config(self._stated)
        config = config.base
        for key in dict.fromkeys((*config.hf_keys, *_CONSTANTS, *sorted(config.later_keys))):
            native = config.plain().get(key)
            if key == "tied" and not native and own_head:
                continue
            if key in config.hf_keys and key == "max_positions" and native is None:
                native = config.context
            if key in hf and hf[key] != native:
                stated = f" ({config.hf_keys[key]} of config.json)" if key in config.hf_keys else ""
                raise ValueError(f"model.{key} is {native}, but the weights were trained with {hf[key]}{stated}")


def copy_companions(directory: Path, place: Path) -> None:
    """Copy the files of `COMPANIONS` that exist into another directory."""
    for name in COMPANIONS:
        if (directory / name).is_file():
            shutil.copyfile(directory / name, place / name)


def digest(hashes: Mapping[str, str]) -> str:
    """One hash over the names and hashes of several files."""
    listed = "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))
    return hash_text(listed)


def _part_names(directory: Path) -> list[str]:
    if not (directory / INDEX_NAME).is_file():
        return [ONE_FILE]
    names = read_object(directory / INDEX_NAME).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError("The index lists no files", str(directory / INDEX_NAME))
    files = sorted({str(name) for name in names.values()})
    for name in files:
        if not _PLAIN_NAME.fullmatch(name):
            raise UserError(f"{name!r} is not the name of a file with weights", str(directory / INDEX_NAME))
    return files


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError:
        raise UserError("A file with weights is missing", str(path)) from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"The weights cannot be read: {error}", str(path)) from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that contains one JSON object.

    Raises:
        UserError: The file is missing, too large, or contains no JSON object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"The file is larger than {MAX_JSON_BYTES} bytes", str(path))
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"There is no {path.name}", str(path.parent)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"The file cannot be read: {error}", str(path)) from None
    if not isinstance(value, dict):
        raise UserError("The file is not a JSON object", str(path))
    return value


def mask_token(directory: Path) -> int | None:
    """The id of the mask token of the tokenizer in a directory; None if there is no tokenizer or no mask token.

    Raises:
        UserError: The tokenizer's files are damaged.
    """
    paths = (directory / name for name in (TOKENIZER_CONFIG_NAME, TOKENIZER_NAME))
    config, definition = (read_object(path) if path.is_file() else {} for path in paths)
    try:
        name = config.get("mask_token", "[MASK]")
        name = name.get("content") if isinstance(name, dict) else name
        vocabulary = definition.get("model", {}).get("vocab")
        ids: dict[str, Any] = dict(vocabulary) if isinstance(vocabulary, dict) else {}
        ids |= {one["content"]: one["id"] for one in definition.get("added_tokens", [])}
        ids |= {one["content"]: id for id, one in config.get("added_tokens_decoder", {}).items()}
        if name not in ids and (words := directory / WORDS_NAME).is_file():
            ids |= {word: id for id, word in enumerate(words.read_text(encoding="utf-8").splitlines())}
        return int(ids[name]) if name in ids else None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"The tokenizer of the weights cannot be read: {error}",
            str(directory),
            "Repair it, or set mask_token_id in config.json.",
        ) from None


def _fix_shape(stored: tuple[int, ...], wanted: tuple[int, ...], hides_tokens: bool) -> str:
    """Advice for a parameter whose stored shape differs from the shape of the model."""
    if hides_tokens and stored[1:] == wanted[1:]:
        return (
            "These are rows of the vocabulary (vocab_size of config.json): pack the data with the tokenizer of the "
            "weights, and set model.mask to its mask token and a classifier's model.vocabulary; or set init.new_rows."
        )
    if stored[1:] == wanted[1:] and stored[0] > wanted[0]:
        return f"If these are rows of the vocabulary, set model.vocab_multiple to {stored[0]}; else change 'model'."
    if stored[1:] == wanted[1:]:
        return (
            "If these are rows of the vocabulary, pack the data with the tokenizer of the weights; "
            "else change 'model', or add the name to init.fresh."
        )
    return "Change 'model', or add the name to init.fresh."
