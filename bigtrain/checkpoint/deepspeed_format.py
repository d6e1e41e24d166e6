"""Conversion to and from DeepSpeed's universal checkpoints.

DeepSpeed loads them at any ZeRO stage above 0 and any number of ranks:

    OUT/latest_universal                                 the name of the step's directory
    OUT/global_step100/zero/NAME/fp32.pt                 {"param": tensor}; the FP32 weights
                            NAME/exp_avg.pt, exp_avg_sq.pt   Adam's moments; NAME/step.pt its step count
                       zero/optimizer_state.pt           optimizer state that belongs to no parameter
                       mp_rank_00_model_states.pt        step, shapes, buffers; ZeRO 3 reads a second file like it

DeepSpeed's own `ds_to_universal.py` converts a checkpoint of `deepspeed.save_checkpoint` to a universal one. Files are
written and read one tensor at a time. Layout and keys are those that DeepSpeed 0.19.8 reads
(deepspeed/checkpoint/universal_checkpoint.py, runtime/zero/stage3.py: load_hp_checkpoint_state_from_checkpoint_dir).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from bigtrain.checkpoint import loader
from bigtrain.checkpoint.config import CheckpointConfig
from bigtrain.checkpoint.export import appears_whole
from bigtrain.checkpoint.reader import SafeReader
from bigtrain.checkpoint.saver import Saver
from bigtrain.config import CorruptionError, UserError
from bigtrain.storage import fsync_file

MOMENTS = ("exp_avg", "exp_avg_sq")
WRITTEN_FOR = "0.19.8"
"""The version of DeepSpeed that defines the format written here."""
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]*")


def to_deepspeed(directory: Path, step: int, out: Path) -> Path:
    """Write a verified checkpoint as a universal one; `out` is created completely, or not at all.

    DeepSpeed loads it with `{"checkpoint": {"load_universal": true}}` in its config and `engine.load_checkpoint(out)`.
    The hyperparameters remain those of the optimizer into which it is loaded. Persistent buffers, which DeepSpeed does
    not load from such a checkpoint, are in `module` of the model's file.

    With ZeRO 3 and a torch optimizer, DeepSpeed 0.19.8 loads one shared step-count tensor for all parameter partitions,
    and the update of each partition increments it. After loading, give each partition its own copy.

    Args:
        directory: The directory that holds the run's checkpoints.
        step: Step of the checkpoint.
        out: A directory that does not exist yet, or is empty.

    Returns:
        The directory of the step in `out`.

    Raises:
        UserError: `out` is not empty, there is no checkpoint of `step`, or the optimizer's state is not Adam's.
        CorruptionError: The checkpoint is damaged.
    """
    reader = loader.verified_reader(directory, step)
    entries = cast(dict[str, TensorStorageMetadata], reader.read_metadata().state_dict_metadata)
    weights = [name.removeprefix("model.") for name in entries if name.startswith("model.")]
    names = [name for name in weights if f"optimizer.{name}.step" in entries]
    _check_adam(entries, names, reader.path)
    tag = f"global_step{step}"
    with appears_whole(out) as temporary:
        place = temporary / tag
        count = torch.zeros(())
        for name in names:
            for key, file in (("model." + name, "fp32"), *((f"optimizer.{name}.{key}", key) for key in MOMENTS)):
                _save({"param": _one(reader, key)}, place / "zero" / name / f"{file}.pt")
            count = _one(reader, f"optimizer.{name}.step")
            _save(count, place / "zero" / name / "step.pt")
        _save(_optimizer_facts(len(names), count), place / "zero" / "optimizer_state.pt")
        buffers = {name: _one(reader, f"model.{name}") for name in weights if name not in names}
        facts = _model_facts(step, {name: entries[f"model.{name}"].size for name in names}, buffers)
        for file in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
            _save(facts, place / file)
        (temporary / "latest_universal").write_text(tag)
    return out / tag


def from_deepspeed(source: Path, out: Path, *, trusted: bool) -> int:
    """Convert a universal checkpoint to a bigtrain checkpoint, under `out/checkpoints`, for `init.source`.

    Args:
        source: The directory that DeepSpeed would load, or the directory of one step in it.
        out: A directory that does not exist yet, or is empty.
        trusted: Whether the user trusts the files, which are pickles. Even then only tensors and plain values are read;
            a file that needs other types is refused.

    Returns:
        The step of the checkpoint, which is the optimizer's step count.

    Raises:
        UserError: `trusted` is False, `out` is not empty, `source` is not a universal checkpoint, a file or the
            shapes of flat tensors are missing, or the step count is missing or differs between parameters.
        CorruptionError: A file cannot be read as tensors and plain values, or does not fit the parameter's shape.
    """
    if not trusted:
        raise UserError(
            "A DeepSpeed checkpoint consists of pickles, which can run code when they are loaded",
            str(source),
            "If you trust its author, add --trust-checkpoint.",
        )
    place = _step_directory(source)
    shapes = dict(_shapes(place))
    state: dict[str, Tensor] = {}
    for name in _parameters(place):
        folder = place / "zero" / name
        for key, file in (("model." + name, "fp32"), *((f"optimizer.{name}.{key}", key) for key in MOMENTS)):
            state[key] = _tensor(folder / f"{file}.pt", shapes.get(name))
        state[f"optimizer.{name}.step"] = _count(place, folder)
    _check_shapes(place, state, shapes)
    counts = {int(tensor) for name, tensor in state.items() if name.endswith(".step")}
    if len(counts) != 1:
        raise UserError(f"The parameters have different numbers of updates: {sorted(counts)}", str(place))
    (step,) = counts
    with appears_whole(out) as temporary:
        saver = Saver(temporary / "checkpoints", CheckpointConfig(asynchronous=False))
        saver.save(step, state, progress={}, config_hash="", identity="")
        outcome = saver.wait()
        saver.close()
        if outcome is None or outcome.status != "saved":
            raise UserError(f"The checkpoint could not be written: {outcome and outcome.cause}", str(out))
    return step


def _one(reader: SafeReader, name: str) -> Tensor:
    (tensor,) = loader.read_full(reader, [name]).values()
    return tensor


def _save(value: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)
    fsync_file(path)


def _check_adam(entries: dict[str, TensorStorageMetadata], names: list[str], path: Path) -> None:
    kept = {name.rsplit(".", 1)[1] for name in entries if name.startswith("optimizer.")}
    if not names or kept != {"step", *MOMENTS}:
        found = ", ".join(sorted(kept)) or "no optimizer"
        raise UserError(
            f"A universal checkpoint of DeepSpeed needs Adam's moments, but this checkpoint holds {found}",
            str(path),
            "Use `bigtrain checkpoint export` for the weights.",
        )


def _optimizer_facts(parameters: int, count: Tensor) -> dict[str, Any]:
    """The contents of optimizer_state.pt: parameter groups and the step count.

    ZeRO 1 and 2 silently load no more parameter groups than are listed here, and overwrite the groups' settings with
    the listed ones. So the list has the largest possible number of groups, each without settings.
    """
    group = {"params": list[int]()}
    return {
        "ds_version": WRITTEN_FOR,
        "param_groups": [group] * parameters,
        "optimizer_state_dict": {"state": {0: {"step": count}}, "param_groups": [group]},
    }


def _model_facts(step: int, shapes: dict[str, torch.Size], buffers: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "module": buffers,
        "buffer_names": list(buffers),
        "param_shapes": [shapes],
        "lr_scheduler": None,
        "optimizer": None,
        "skipped_steps": 0,
        "global_steps": step,
        "global_samples": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": WRITTEN_FOR,
    }


def _step_directory(source: Path) -> Path:
    latest = source / "latest_universal"
    place = source / latest.read_text().strip() if latest.is_file() else source
    if place.resolve().parent not in (source.resolve(), source.resolve().parent) or not (place / "zero").is_dir():
        raise UserError(
            "There is no DeepSpeed universal checkpoint",
            str(source),
            "Convert the output of save_checkpoint: python -m deepspeed.checkpoint.ds_to_universal --input_folder STEP "
            "--output_folder DIR",
        )
    return place


def _parameters(place: Path) -> list[str]:
    found = sorted(path.name for path in (place / "zero").iterdir() if path.is_dir())
    wrong = [name for name in found if not _PLAIN_NAME.fullmatch(name)]
    if wrong or not found:
        raise CorruptionError(
            f"{wrong[0]!r} is not the name of a parameter" if wrong else "The checkpoint holds no parameters",
            str(place),
        )
    return found


def _shapes(place: Path) -> Iterator[tuple[str, torch.Size]]:
    """Full (unsharded) shapes of the parameters, from the model files that list them: ZeRO 3 stores flat tensors."""
    for path in sorted(place.glob("*model_states.pt")):
        facts = _load(path)
        for group in facts.get("param_shapes") or [] if isinstance(facts, dict) else []:
            yield from group.items()


def _check_shapes(place: Path, state: dict[str, Tensor], shapes: dict[str, torch.Size]) -> None:
    """Refuse flat tensors of ZeRO 3 for which no file has the shapes.

    ZeRO 1 and 2 store full shapes. So a tensor of several dimensions among those without a listed shape shows that
    their files have the shapes themselves.
    """
    weights = {name.removeprefix("model."): one for name, one in state.items() if name.startswith("model.")}
    unknown = [name for name in weights if name not in shapes]
    if unknown and all(weights[name].dim() < 2 for name in unknown):
        raise UserError(
            f"The shape of {unknown[0]} and of {len(unknown) - 1} other parameters is not recorded, and their tensors "
            "are flat",
            str(place),
            "Copy the files *_model_states.pt of the DeepSpeed checkpoint into this directory.",
        )


def _tensor(path: Path, shape: torch.Size | None) -> Tensor:
    value = _load(path)
    tensor = value.get("param") if isinstance(value, dict) else value
    if not isinstance(tensor, Tensor):
        raise CorruptionError("The file holds no tensor", str(path))
    if shape is None or tensor.shape == shape:
        return tensor
    if tensor.numel() != shape.numel():
        raise CorruptionError(
            f"The file holds a tensor of shape {tuple(tensor.shape)}, but the parameter has shape {tuple(shape)}",
            str(path),
        )
    return tensor.view(shape)


def _count(place: Path, folder: Path) -> Tensor:
    """Adam's step count as torch stores it, a float32 scalar; ZeRO 3 has one count for all parameters."""
    if (folder / "step.pt").is_file():
        value = _load(folder / "step.pt")
    else:
        facts = _load(place / "zero" / "optimizer_state.pt")
        try:
            value = facts["optimizer_state_dict"]["state"][0]["step"]
        except (KeyError, TypeError, IndexError):
            raise UserError(
                "The checkpoint does not record how many steps its optimizer has taken", str(place)
            ) from None
    return torch.as_tensor(float(value), dtype=torch.float32)


def _load(path: Path) -> Any:
    """Read the tensors and plain values of a file; the tensors are memory-mapped."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError("A file of the checkpoint is missing", str(path)) from None
    except Exception as error:
        # A damaged zip archive, or a pickle in it, may raise almost any exception.
        reason = str(error).splitlines()[0]
        raise CorruptionError(f"The file cannot be read as tensors and plain values: {reason}", str(path)) from error
