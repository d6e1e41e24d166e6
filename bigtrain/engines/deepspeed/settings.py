"""DeepSpeed's config: bigtrain's settings and the user's passthrough, which DeepSpeed's own parser checks."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError

from bigtrain.config import UserError, nearest
from bigtrain.engines.config import Precision
from bigtrain.engines.deepspeed.config import DeepSpeedConfig


def low_precision_weights(engine: DeepSpeedConfig, precision: Precision) -> bool:
    """Whether DeepSpeed keeps BF16 copies of the weights for forward and backward.

    Without copies, the model casts each weight where it is used, as in one process. ZeRO 0 has no copies, because it
    would accumulate their gradients in BF16.
    """
    return precision == "bf16" and engine.zero > 0


def deepspeed_config(
    engine: DeepSpeedConfig, precision: Precision, device: torch.device, *, pipelined: bool = False
) -> dict[str, Any]:
    """The config dictionary with which DeepSpeed is started.

    Gradients are accumulated and reduced in FP32. DeepSpeed neither clips nor divides by the number of micro-batches;
    the engine itself marks the last micro-batch of a step. (With gradient_accumulation_steps above 1, ZeRO 0 would
    divide by it even if this is disabled, because its hooks on the loss run in the wrong order.)
    """
    native: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": low_precision_weights(engine, precision)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    zero: dict[str, Any] = {"stage": engine.zero, "memory_efficient_linear": False}
    if engine.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if pipelined:
        # DeepSpeed would split the stream between stages over tp, as if it were equal on all tp ranks. It is not under
        # sequence parallelism.
        native["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
        if engine.zero and not low_precision_weights(engine, precision):
            # DeepSpeed would sum the norm over the stages group by group, and stages may have different group counts.
            zero["compute_grad_norm"] = False
    extra = dict(engine.passthrough)
    zero |= extra.pop("zero_optimization", {})
    return {**native, **extra, "zero_optimization": zero}


class _Recorded(dict[str, Any]):
    """A dictionary that records which keys were read, because DeepSpeed has no list of its config's keys."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


def check_passthrough(config: dict[str, Any], passthrough: dict[str, Any]) -> None:
    """Let DeepSpeed parse its config, and refuse keys and values that it does not accept.

    Raises:
        UserError: `passthrough` has a key that DeepSpeed never reads, or DeepSpeed refuses a value of `config`.
    """
    from deepspeed.runtime.config import DeepSpeedConfig as LibraryConfig

    recorded = _Recorded(config)
    try:
        LibraryConfig(recorded)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"DeepSpeed refuses {key!r}: {first['msg']}", "engine.passthrough") from None
    except (ValueError, TypeError, AssertionError, KeyError) as error:
        raise UserError(f"DeepSpeed refuses its config: {error}", "engine.passthrough") from None
    for key in passthrough:
        if key not in recorded.asked:
            close = nearest(key, recorded.asked)
            raise UserError(
                f"DeepSpeed has no key {key!r}",
                f"engine.passthrough.{key}",
                f"Did you mean {close!r}?" if close else "See DeepSpeed's documentation of its config.",
            )
