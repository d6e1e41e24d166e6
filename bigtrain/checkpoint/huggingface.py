"""Weights in Hugging Face's format: read into tensors of any layout, and exported from a checkpoint part by part."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

import bigtrain
from bigtrain.checkpoint import commit, loader
from bigtrain.checkpoint.export import MAX_FILE_BYTES, PREFIX, appears_whole, write_files
from bigtrain.checkpoint.flat import FlatPart
from bigtrain.checkpoint.manifest import Manifest
from bigtrain.checkpoint.peft import PeftFiles
from bigtrain.checkpoint.ranks import RankGroup, world_group
from bigtrain.checkpoint.reader import SafeReader
from bigtrain.checkpoint.shards import plan_items, write_shards
from bigtrain.config import CorruptionError, UserError
from bigtrain.models.adapter import AdapterConfig
from bigtrain.models.config import FAMILIES, ModelConfig
from bigtrain.models.hf_files import CONFIG_NAME, HfFiles, copy_companions, digest
from bigtrain.models.huggingface import HfTensor, to_hf
from bigtrain.run.names import MODEL
from bigtrain.storage import write_json

FORMAT_VERSION = 1
"""Version of the format of model.json."""
Piece = tuple[tuple[int, ...], tuple[int, ...], Tensor]
"""Offsets and sizes of a rectangle of a parameter, and this rank's tensor of that rectangle."""


def verify_hf(files: HfFiles, expected: str) -> None:
    """Compare the files of a directory with the hash `init.hash`; each rank reads a share of them. Collective.

    Args:
        files: The directory of weights.
        expected: The value of `init.hash`.

    Raises:
        UserError: The files have another hash.
    """
    ranks = RankGroup(world_group())
    parts = ranks.together(lambda: files.file_hashes(files.all_files[ranks.rank :: ranks.size]))
    found = ranks.share(digest({name: value for part in parts for name, value in part.items()}) if parts else None)
    if found != expected:
        raise UserError(
            "init.source does not hold the weights that this run started from",
            str(files.directory),
            "Restore them, or choose another --name.",
        )


def load_hf(files: HfFiles, names: Mapping[str, HfTensor], state: Mapping[str, Tensor]) -> None:
    """Read weights into tensors of any layout, in place. Collective; each rank reads only the pieces that it holds.

    Args:
        files: The directory of weights, whose shapes have been checked (`HfFiles.check_fit`).
        names: Location of each parameter in transformers' state dict, by qualified name.
        state: Tensors, DTensors and FlatParts by qualified name, of any floating dtype.

    Raises:
        CorruptionError: A rank cannot read a tensor; the error is raised on all ranks.
    """
    RankGroup(world_group()).together(lambda: read_hf(files, names, state))


@torch.no_grad()
def read_hf(files: HfFiles, names: Mapping[str, HfTensor], state: Mapping[str, Tensor]) -> None:
    """Read weights into this rank's tensors, like `load_hf`, but without collectives."""
    wanted: dict[str, list[tuple[str, int, str]]] = defaultdict(list)
    for name in state:
        for number, stored in enumerate(cast(list[str], files.places(names[name]))):
            wanted[files.files[stored]].append((name, number, stored))
    for file, parameters in wanted.items():
        try:
            with safe_open(files.directory / file, framework="pt") as opened:
                for name, number, stored in parameters:
                    rows = names[name].shape_of(files.shapes[stored])[0]
                    for piece in pieces(state[name]):
                        _fill(piece, opened.get_slice(stored), names[name], number * rows, rows)
        except Exception as error:
            # safetensors and torch raise different types; all mean that the file does not hold such tensors.
            raise CorruptionError(f"the weights cannot be read: {error}", str(files.directory / file)) from error


def _fill(piece: Piece, stored: Any, place: HfTensor, first: int, rows: int) -> None:
    """Copy the part of a piece that a stored tensor contains.

    Args:
        piece: A rectangle of the parameter, and the tensor to fill.
        stored: A slice object of safetensors; it contains `rows` rows of the parameter, from row `first` on.
        place: Position of the parameter in transformers' state dict.
    """
    (top, *offset), (count, *sizes), target = piece
    begin, end = max(top, first), min(top + count, first + rows)
    if begin < end:
        found: Tensor = stored[place.index((begin - first, *offset), (end - begin, *sizes), rows)]
        target[begin - top : end - top].copy_(found.t() if place.transposed else found)


def pieces(tensor: Tensor) -> Iterator[Piece]:
    """The pieces of a parameter that this rank holds."""
    if isinstance(tensor, FlatPart):
        for (offset, sizes), view in tensor.pieces():
            yield offset, sizes, view
        return
    if isinstance(tensor, DTensor):
        if tensor.device_mesh.get_coordinate() is None:
            return
        (chunk,) = tensor.__create_chunk_list__()
        if chunk.sizes.numel():
            yield tuple(chunk.offsets), tuple(chunk.sizes), tensor.to_local().detach()
        return
    yield (0,) * tensor.ndim, tuple(tensor.shape), tensor.detach()


def import_hf(source: Path, out: Path, adapters: PeftFiles | None = None) -> tuple[int, dict[str, Any]]:
    """Write a directory of Hugging Face weights as a checkpoint of step 0, under `out/checkpoints`.

    Only one tensor is in memory at a time; all are converted to FP32. `out` also gets the tokenizer's files, and a
    model.json with the section `model` and the number of rows of the vocabulary.

    Args:
        source: The directory of weights.
        out: A directory that does not exist yet, or is empty; it is created completely, or not at all.
        adapters: Adapters of these weights, which are written into the checkpoint too; None: no adapters.

    Returns:
        The step, which is 0, and the config section `model` that builds the model.

    Raises:
        UserError: `out` is not empty, bigtrain has no such model, weights are missing, or the adapters do not fit.
    """
    files = HfFiles.open(source)
    keys = files.keys()
    config = FAMILIES[keys["arch"]](**keys)
    names = config.hf_names()
    others: dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]] = {}
    if adapters is not None:
        keys = {**keys, "adapter": adapters.keys(names)}
        for name, matrix in adapters.places(names).items():
            others[name] = adapters.shapes[matrix], partial(adapters.read, matrix)
    shapes = {name: shape for name, place in names.items() if (shape := files.shape_of(place)) is not None}
    files.check_fit(config, {name: shapes.get(name, ()) for name in names})
    with torch.device("meta"):
        state = {f"{PREFIX}{name}": torch.empty(shape) for name, shape in shapes.items()}
        state |= {f"{PREFIX}{name}": torch.empty(shape) for name, (shape, _) in others.items()}
    with appears_whole(out) as temporary:
        place = temporary / "checkpoints" / commit.temporary_name(0)
        place.mkdir(parents=True)
        lazy = _Lazy(files, names, state, {name: read for name, (_, read) in others.items()})
        records, _ = write_shards(RankGroup(None), place, plan_items(state), lazy, lambda phase: None)
        commit.publish(place, Manifest(step=0, files=records, config_hash="", identity=""))
        copy_companions(files.directory, temporary)
        described = {"format_version": FORMAT_VERSION, "model": keys, "rows": shapes[config.vocabulary_name][0]}
        write_json(temporary / MODEL, described)
    return 0, keys


class _Lazy(Mapping[str, Tensor]):
    """A mapping from the names of a state to FP32 tensors, each read on access."""

    def __init__(
        self,
        files: HfFiles,
        names: Mapping[str, HfTensor],
        state: Mapping[str, Tensor],
        others: Mapping[str, Callable[[], Tensor]],
    ) -> None:
        """Args:
        others: For each tensor that is not in `files`, a function that reads it.
        """
        self._files, self._names, self._state, self._others = files, names, state, others

    def __getitem__(self, key: str) -> Tensor:
        if (read := self._others.get(key.removeprefix(PREFIX))) is not None:
            return read().float()
        tensor = torch.empty(self._state[key].shape, device="cpu")
        read_hf(self._files, self._names, {key.removeprefix(PREFIX): tensor})
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def export_hf(
    directory: Path,
    step: int,
    out: Path,
    *,
    config: ModelConfig,
    companions: Callable[[Path], dict[str, Any]] = lambda place: {},
    max_file_bytes: int = MAX_FILE_BYTES,
) -> list[Path]:
    """Write a verified checkpoint for transformers' `from_pretrained`, in FP32. One part at a time is in memory.

    Args:
        directory: The directory that holds the run's checkpoints.
        step: Step of the checkpoint.
        out: A directory that does not exist yet, or is empty; it is created completely, or not at all.
        config: The config of the model.
        companions: Writes further files, such as a tokenizer, into the directory, and returns keys for config.json.
        max_file_bytes: Most bytes of tensors in one file; a larger tensor has its own file.

    Returns:
        Paths of the written files.

    Raises:
        UserError: transformers has no such model, `out` is not empty, or there is no checkpoint of `step`.
        CorruptionError: The checkpoint is damaged.
    """
    try:
        names, zeros = config.hf_names(), config.hf_zeros()
        config.hf_config(rows=0)  # raises before anything is read
    except ValueError as error:
        raise UserError(
            f"This model cannot be exported to transformers: {error}", str(directory), "Export without --format hf."
        ) from None
    reader = loader.verified_reader(directory, step)
    parts = _split(reader, names, max_file_bytes)

    def tensors(part: list[str]) -> dict[str, Tensor]:
        native = loader.read_full(reader, [PREFIX + name for name in part], PREFIX)
        if getattr(config, "adapter", None) is not None:
            native = {name: _merged(reader, config, name, value) for name, value in native.items()}
        native = {name: config.folded(name, value) for name, value in native.items()}
        own = to_hf({name: names[name] for name in part}, native)
        return own | {name: torch.zeros(shape) for name, shape in zeros.items() if part is parts[0]}

    vocabulary = reader.read_metadata().state_dict_metadata.get(f"{PREFIX}{config.vocabulary_name}")
    rows = 0 if vocabulary is None else cast(TensorStorageMetadata, vocabulary).size[0]
    with appears_whole(out) as temporary:
        notes = {"format": "pt", "bigtrain": bigtrain.__version__, "step": str(step)}
        written = write_files((tensors(part) for part in parts), len(parts), temporary, notes)
        more = companions(temporary)
        write_json(temporary / CONFIG_NAME, {**config.hf_config(rows), "dtype": "float32", **more})
        written += sorted(path.name for path in temporary.iterdir() if path.name not in written)
    return [out / name for name in written]


def _merged(reader: SafeReader, config: Any, name: str, value: Tensor) -> Tensor:
    """The value of a parameter; if it is a matrix with an adapter, the adapter is merged into it."""
    adapter: AdapterConfig = config.adapter
    module, _, own = name.rpartition(".")
    names = [f"{PREFIX}{module}.{part}" for part in adapter.own]
    if own != "weight" or names[0] not in reader.read_metadata().state_dict_metadata:
        return value
    parameters = loader.read_full(reader, names, f"{PREFIX}{module}.")
    if config.has_inputs_first(name):
        return adapter.merged(value.t(), parameters).t().contiguous()
    return adapter.merged(value, parameters)


def _split(reader: SafeReader, names: Mapping[str, HfTensor], max_file_bytes: int) -> list[list[str]]:
    """The native names in parts of at most `max_file_bytes`; names that form one stored tensor are in one part."""
    entries = reader.read_metadata().state_dict_metadata
    together: dict[str, list[str]] = defaultdict(list)
    for name, place in names.items():
        together[place.name].append(name)
    parts: list[list[str]] = [[]]
    filled = 0
    for group in together.values():
        size = sum(math.prod(cast(TensorStorageMetadata, entries[PREFIX + name]).size) * 4 for name in group)
        if parts[-1] and filled + size > max_file_bytes:
            parts.append([])
            filled = 0
        parts[-1] += group
        filled += size
    return parts
