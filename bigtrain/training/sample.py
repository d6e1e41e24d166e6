"""Generates text with the weights of a run, or with weights without a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn

from bigtrain.checkpoint.loader import read_tensors
from bigtrain.checkpoint.restore import checkpoint_at, newest_of, weights_at
from bigtrain.config import UserError
from bigtrain.data.augmenter import evaluated
from bigtrain.data.encoding.chat import ChatTemplate, ends_of_texts, template_of
from bigtrain.data.formats.images import MAX_IMAGE_BYTES, decode_image, image_shape, squared
from bigtrain.data.index import ShardIndex
from bigtrain.data.streaming.store import open_index
from bigtrain.models.hf_files import HfFiles
from bigtrain.models.plain.network import load_extra_state, with_extra_state
from bigtrain.models.sampling import Choice, generate
from bigtrain.parallel.mesh import pick_device
from bigtrain.run import RunConfig, RunDirectory, load_config
from bigtrain.training.prepare import pins
from bigtrain.training.weights import Weights

if TYPE_CHECKING:
    from bigtrain.data.augmentation import AugmentationConfig
    from bigtrain.data.tokenizers import Tokenizer

Message = dict[str, str]
"""One turn of a conversation, with the keys `role` and `content`."""
Prompt = str | list[Message]


class Vocabulary(Protocol):
    """Turns prompts into tokens, and tokens into text."""

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a text, or of a conversation in the chat template of the model's tokenizer."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, without special tokens."""
        ...


@dataclass(frozen=True)
class Writer:
    """A model that continues texts."""

    model: nn.Module
    vocabulary: Vocabulary
    ends: frozenset[int]
    """Tokens that end a text."""
    start: int | None
    """The token that replaces an empty prompt; None: empty prompts are not replaced."""
    device: torch.device

    def write(
        self,
        prompts: Sequence[Prompt],
        *,
        tokens: int,
        choice: Choice,
        seed: int = 0,
        stop: Sequence[str] = (),
        images: torch.Tensor | None = None,
    ) -> list[str]:
        """The text that the model generates after each prompt, without the prompt.

        Args:
            prompts: The prompts, which are processed in one batch.
            tokens: Maximum number of new tokens. A text ends earlier at a token that ends it.
            stop: Strings; a text is cut before the first of them.
            images: uint8 of shape (B, height, width, channels), for a captioning model.
        """
        begun = [self.vocabulary.encode(prompt) for prompt in prompts]
        if self.start is not None:
            begun = [ids or [self.start] for ids in begun]
        longest = max(len(ids) for ids in begun)
        padding = [longest - len(ids) for ids in begun]
        rows = [[0] * count + ids for count, ids in zip(padding, begun, strict=True)]
        generated = generate(
            self.model,
            torch.tensor(rows, dtype=torch.int64, device=self.device).view(len(rows), longest),
            tokens,
            choice,
            padding=torch.tensor(padding, device=self.device) if any(padding) else None,
            ended=lambda new: all(self._text(ids, row, stop)[1] for ids, row in zip(begun, new.tolist(), strict=True)),
            seed=seed,
            given=None if images is None else {"images": images.to(self.device)},
        )
        return [self._text(ids, row, stop)[0] for ids, row in zip(begun, generated[:, longest:].tolist(), strict=True)]

    def _text(self, begun: list[int], new: list[int], stop: Sequence[str]) -> tuple[str, bool]:
        """The text that new tokens add to the text of the earlier ones, up to its end; and whether it has ended."""
        ends = [place for place, token in enumerate(new) if token in self.ends]
        new = new[: ends[0]] if ends else new
        # All tokens are decoded together, because some tokenizers drop the space before the first token of a text.
        before, whole = self.vocabulary.decode(begun), self.vocabulary.decode([*begun, *new])
        text = whole[len(before) :] if whole.startswith(before) else self.vocabulary.decode(new)
        cuts = [place for place in map(text.find, stop) if place >= 0]
        return (text[: min(cuts)], True) if cuts else (text, bool(ends))


def model_of_run(run: RunDirectory, step: int | None) -> tuple[RunConfig, ShardIndex, nn.Module]:
    """A run's config, the index of its data, and its model with the weights of a checkpoint, on the CPU.

    Args:
        step: Step of the checkpoint; None for the newest verified one.

    Raises:
        UserError: There is no checkpoint, or the data is missing or has changed.
    """
    config = load_config(run.config)
    step = newest_of(run) if step is None else step
    index = index_of_run(run, config)
    model = config.model.build_to_load(index.vocab_size, config.seed)
    model.load_state_dict(read_tensors(run.checkpoints, step), strict=False)
    if config.model.is_plain and with_extra_state(model):
        load_extra_state(model, read_tensors(run.checkpoints, step, "extra."))
    return config, index, model


def writer_of_run(run: RunDirectory, step: int | None, image: bool = False) -> Writer:
    """A writer with the weights of a run's checkpoint and the tokenizer of its data, on this machine's device.

    Args:
        step: Step of the checkpoint; None for the newest verified one.
        image: Whether the prompts come with images.

    Raises:
        UserError: There is no checkpoint, the model writes no text, or `image` is not what the model needs.
    """
    _refuse_other_kinds(load_config(run.config), image, str(run.path))
    _, _, model = model_of_run(run, step)
    return writer_of_model(run, model.to(pick_device(0)), image)


def writer_of_model(run: RunDirectory, model: nn.Module, image: bool = False) -> Writer:
    """A writer for a model of a run, with the tokenizer of the run's data, on the model's device.

    Raises:
        UserError: The model writes no text or has no `logits(batch)`, or `image` is not what the model needs.
    """
    config = load_config(run.config)
    _refuse_other_kinds(config, image, str(run.path))
    if config.model.keeps_contract and not callable(getattr(model, "logits", None)):
        raise UserError(
            f"A model of arch '{config.model.arch}' has no logits(batch), which is needed to continue a text",
            str(run.path),
            "Define it in the module: it returns FP32 logits (B, C, vocabulary) for a batch of tokens.",
        )
    tokenizer = index_of_run(run, config).load_tokenizer()
    template = next((place for place in _sources(config) if (place / "tokenizer_config.json").is_file()), None)
    return Writer(
        model,
        _OfData(tokenizer, template, str(run.path)),
        frozenset(ends_of_texts(tokenizer)),
        None if image else tokenizer.eot,
        next(model.parameters()).device,
    )


def writer_of_directory(directory: Path) -> Writer:
    """A writer for a causal model of transformers, with the model's own tokenizer.

    Raises:
        UserError: transformers cannot read the model.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"transformers cannot read the model: {error}", str(directory)) from None
    return writer_beside(directory, model.eval().to(pick_device(0)))


def writer_beside(directory: Path, model: nn.Module) -> Writer:
    """A writer for a model, with the tokenizer and end-of-text tokens of the directory that its weights came from.

    Raises:
        UserError: transformers cannot read a tokenizer in the directory.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        tokenizer = _tokenizer_in(directory)
        if (directory / "generation_config.json").is_file():
            settings = GenerationConfig.from_pretrained(directory)
        else:
            settings = GenerationConfig.from_model_config(AutoConfig.from_pretrained(directory))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"transformers cannot read the tokenizer: {error}", str(directory)) from None
    ends = settings.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    found = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
    place = next(model.parameters()).device
    return Writer(model, _OfTransformers(tokenizer, str(directory)), found, start, place)


def writer_at(text: str, runs_dir: Path) -> Writer:
    """A writer with the weights that `weights_at` finds.

    Raises:
        UserError: The weights or their tokenizer are not found or cannot be read, or the model writes no text.
    """
    found = weights_at(text, runs_dir)
    if isinstance(found, HfFiles):
        return writer_of_directory(found.directory)
    if found[0].exists():
        return writer_of_run(*found)
    weights = Weights.of(found)
    return writer_beside(weights.directory, weights.build().to(pick_device(0)))


def read_prompts(file: Path) -> list[Prompt]:
    """Read prompts from a file of JSON lines, each with the key `prompt` (a text) or `messages` (roles and contents).

    Raises:
        UserError: The file cannot be read or holds no prompt, or a line has neither key.
    """
    prompts: list[Prompt] = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The prompts cannot be read: {error}", str(file)) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        found = value.get("prompt", value.get("messages")) if isinstance(value, dict) else None
        if not isinstance(found, (str, list)) or not found:
            fix = 'Write a line like {"prompt": "It was"} or {"messages": [{"role": "user", "content": "Hello"}]}.'
            raise UserError("The line is not a JSON object with a prompt or messages", f"{file}:{number}", fix)
        prompts.append(found)
    if not prompts:
        raise UserError("The file holds no prompt", str(file))
    return prompts


def index_of_run(run: RunDirectory, config: RunConfig) -> ShardIndex:
    """The index of a run's training data; for a mixture that of the first source, since all share one tokenizer.

    Raises:
        UserError: The shards are not those that the run was trained on.
    """
    place = next(iter(config.data.places("train").values()))
    index = open_index(place, config.streaming)
    if index.fingerprint not in pins(run.recipe()["data"], "train"):
        raise UserError("The shards are not those that the run was trained on", place)
    return index


@dataclass(frozen=True)
class _OfData:
    """The tokenizer of a run's data.

    Conversations use its chat template, or else that of the weights from which the run started.
    """

    tokenizer: Tokenizer
    template: Path | None
    where: str

    def encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            begin = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
            return [*begin, *(int(id) for id in self.tokenizer.encode(prompt))]
        if template_of(self.tokenizer) is not None:
            return [int(id) for id in ChatTemplate.of(self.tokenizer).prompt(prompt)]
        if self.template is None:
            fix = "Pack the data with a tokenizer that has one, or with --chat-template FILE."
            raise UserError("Neither the data nor the weights have a tokenizer with a chat template", self.where, fix)
        return _OfTransformers(_tokenizer_in(self.template), str(self.template)).encode(prompt)

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)


@dataclass(frozen=True)
class _OfTransformers:
    tokenizer: Any
    where: str

    def encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        try:
            text = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # noqa: BLE001 - a template is a program of its own, which may raise anything
            raise UserError(f"The messages do not fit the chat template: {error}", self.where) from None
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def _tokenizer_in(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _sources(config: RunConfig) -> list[Path]:
    """The directories or names from which the run's weights came."""
    own = getattr(config.model, "directory", None)
    return [Path(place) for place in (own, config.init.source) if place is not None]


def _refuse_other_kinds(config: RunConfig, has_image: bool, where: str) -> None:
    model = config.model
    if model.data_kind not in ("tokens", "captions") or getattr(model, "task", "causal") != "causal":
        raise UserError(f"bigtrain cannot sample from this model of arch '{model.arch}'", where)
    captions = model.data_kind == "captions"
    if captions != has_image:
        fix = "Give one with --image." if captions else "Remove --image."
        raise UserError(f"a model of arch '{model.arch}' {'needs an' if captions else 'takes no'} image", fix=fix)


def caption(text: str, runs_dir: Path, prompt: str, image: Path, *, tokens: int, **options: Any) -> str:
    """The continuation of a prompt by a run's captioning model, for an image.

    Args:
        text: RUN or RUN@STEP.
        options: Further arguments of `Writer.write`.

    Raises:
        UserError: The weights do not belong to a run, its model writes no captions, or the image is missing or too
            large.
    """
    run, step = checkpoint_at(text, runs_dir)
    if not run.exists():
        raise UserError("Captions need the model of a run, but these weights were imported", str(run.path))
    writer, config = writer_of_run(run, step, image=True), load_config(run.config)
    room = config.model.context - len(writer.vocabulary.encode(prompt))
    shown = _pixels(image, index_of_run(run, config), config.data.augment)
    (written,) = writer.write([prompt], tokens=max(0, min(tokens, room)), images=shown, **options)
    return written


def _pixels(file: Path, index: ShardIndex, augment: Sequence[AugmentationConfig]) -> torch.Tensor:
    """An image, prepared as in the model's evaluation, of shape (1, height, width, channels)."""
    info = index.image
    assert info is not None
    if not file.is_file():
        raise UserError(f"no image at '{file}'")
    if file.stat().st_size > MAX_IMAGE_BYTES:
        raise UserError(f"the image has more than {MAX_IMAGE_BYTES} bytes", str(file))
    data = file.read_bytes()
    if image_shape(data, str(file))[:2] != (info.height, info.width) and info.height == info.width:
        data = squared(data, info.height, str(file))
    return torch.from_numpy(np.ascontiguousarray(evaluated(augment, decode_image(data, info, str(file)))))[None]
