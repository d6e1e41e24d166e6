"""Weights in Hugging Face's form: read into any layout, and written out of a checkpoint, a part at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
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
from bigtrain.models.hf_files import CONFIG_NAME, HfFiles, digest
from bigtrain.models.huggingface import HfTensor, to_hf
from bigtrain.storage import write_json

Piece = tuple[tuple[int, ...], tuple[int, ...], Tensor]
"""Offset and sizes of a rectangle of a parameter, and the memory on this rank that it fills."""


def verify_hf(files: HfFiles, expected: str, process_group: dist.ProcessGroup | None = None) -> None:
    """Compare every byte of a directory with the hash that `init.hash` holds; each rank reads a share. Collective.

    Raises:
        UserError: It holds something else.
    """
    ranks = RankGroup(process_group or world_group())
    parts = ranks.together(lambda: files.file_hashes(files.all_files[ranks.rank :: ranks.size]))
    found = ranks.share(digest({name: value for part in parts for name, value in part.items()}) if parts else None)
    if found != expected:
        raise UserError(
            "init.source does not hold the weights that this run began with",
            str(files.directory),
            "Restore them, or choose another --name.",
        )


def load_hf(
    files: HfFiles, names: Mapping[str, HfTensor], state: Mapping[str, Tensor],
    process_group: dist.ProcessGroup | None = None,
) -> None:  # fmt: skip
    """Read weights into tensors of any layout, in place: of each file what this rank holds a part of. Collective.

    Args:
        files: Whose shapes have been checked (`HfFiles.check_fit`).
        names: Where each parameter lies.
        state: Parameters, DTensors and FlatParts by qualified names, of any floating dtype.

    Raises:
        CorruptionError: On all ranks, where one cannot read a tensor.
    """
    RankGroup(process_group or world_group()).together(lambda: read_hf(files, names, state))


@torch.no_grad()
def read_hf(files: HfFiles, names: Mapping[str, HfTensor], state: Mapping[str, Tensor]) -> None:
    """As `load_hf`, of this rank alone."""
    wanted: dict[str, list[str]] = defaultdict(list)
    for name in state:
        wanted[files.files[cast(str, files.place(names[name].name))]].append(name)
    for file, parameters in wanted.items():
        try:
            with safe_open(files.directory / file, framework="pt") as opened:
                for name in parameters:
                    for offset, sizes, target in pieces(state[name]):
                        target.copy_(_cut(opened, files, names[name], offset, sizes))
        except Exception as error:
            # safetensors raises its own, torch others: what they have in common is that the bytes are no such tensors.
            raise CorruptionError(f"the weights cannot be read: {error}", str(files.directory / file)) from error


def _cut(opened: Any, files: HfFiles, place: HfTensor, offset: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    stored = cast(str, files.place(place.name))
    rows = place.shape_of(files.shapes[stored])[0]
    piece: Tensor = opened.get_slice(stored)[place.index(offset, sizes, rows)]
    return piece.t() if place.transposed else piece


def pieces(tensor: Tensor) -> Iterator[Piece]:
    """What this rank holds of a parameter."""
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
    """Write a directory of Hugging Face weights as a checkpoint of step 0, under `out/checkpoints`, for `init.source`.

    One tensor is in memory at a time; all become FP32.

    Args:
        adapters: Adapters of these weights, which the checkpoint holds beside them.

    Returns:
        The step, and the section `model` that builds the shape.

    Raises:
        UserError: `out` is not empty; bigtrain has no such model; weights are missing; the adapters do not fit.
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
    shapes = {name: place.shape_of(files.shapes[stored]) for name, place in names.items()
              if (stored := files.place(place.name)) is not None}  # fmt: skip
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
    return 0, keys


class _Lazy(Mapping[str, Tensor]):
    """The FP32 tensors of a state, each read on access."""

    def __init__(
        self,
        files: HfFiles,
        names: Mapping[str, HfTensor],
        state: Mapping[str, Tensor],
        others: Mapping[str, Callable[[], Tensor]],
    ) -> None:
        """Args:
        others: How to read what is not in `files`.
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
    """Write a verified checkpoint as transformers' `from_pretrained` reads it: FP32, one part in memory at a time.

    Args:
        directory: Of the checkpoints.
        step: Which one.
        out: A directory that does not exist yet, or is empty; it appears whole or not at all.
        config: The model's.
        companions: Writes what else belongs there, such as a tokenizer, and returns keys for config.json.
        max_file_bytes: Bytes of tensors in one file; a larger tensor has a file of its own.

    Returns:
        The files written.

    Raises:
        UserError: transformers has no such model; `out` is not empty; there is no such step.
        CorruptionError: The checkpoint does not verify.
    """
    try:
        names = config.hf_names()
    except ValueError as error:
        raise UserError(
            f"This model has no form in transformers: {error}", str(directory), "Export without --format hf."
        ) from None
    reader = loader.verified_reader(directory, step)
    parts = _split(reader, names, max_file_bytes)
    adapter: AdapterConfig | None = getattr(config, "adapter", None)

    def tensors(part: list[str]) -> dict[str, Tensor]:
        native = loader.read_full(reader, [PREFIX + name for name in part], PREFIX)
        if adapter is not None:
            native = {name: _merged(reader, adapter, name, value) for name, value in native.items()}
        native = {name: config.folded(name, value) for name, value in native.items()}
        return to_hf({name: names[name] for name in part}, native)

    embedding = reader.read_metadata().state_dict_metadata.get(f"{PREFIX}embedding.weight")
    rows = 0 if embedding is None else cast(TensorStorageMetadata, embedding).size[0]
    with appears_whole(out) as temporary:
        notes = {"format": "pt", "bigtrain": bigtrain.__version__, "step": str(step)}
        written = write_files((tensors(part) for part in parts), len(parts), temporary, notes)
        more = companions(temporary)
        write_json(temporary / CONFIG_NAME, {**config.hf_config(rows), "dtype": "float32", **more})
        written += sorted(path.name for path in temporary.iterdir() if path.name not in written)
    return [out / name for name in written]


def _merged(reader: SafeReader, adapter: AdapterConfig, name: str, value: Tensor) -> Tensor:
    """The value of a parameter, with the adapter of its layer merged into a matrix that has one."""
    module, _, own = name.rpartition(".")
    names = [f"{PREFIX}{module}.{part}" for part in adapter.own]
    if own != "weight" or names[0] not in reader.read_metadata().state_dict_metadata:
        return value
    return adapter.merged(value, loader.read_full(reader, names, f"{PREFIX}{module}."))


def _split(reader: SafeReader, names: Mapping[str, HfTensor], max_file_bytes: int) -> list[list[str]]:
    """Our names in parts of at most `max_file_bytes`, those that make up one stored tensor together."""
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
