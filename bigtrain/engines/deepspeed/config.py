"""The section of the engine deepspeed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from bigtrain.config import UserError
from bigtrain.engines.config import ENGINES, EngineParts, Passthrough, Precision
from bigtrain.parallel.config import LayoutConfig, Recompute

if TYPE_CHECKING:
    from bigtrain.engines.contract import Engine

SET_BY_THE_ENGINE = {
    "train_batch_size": "batch.size",
    "train_micro_batch_size_per_gpu": "layout.micro_size",
    "gradient_accumulation_steps": "layout.micro_size",
    "managed_gradient_accumulation": "layout.micro_size",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "precision",
    "bfloat16": "precision",
    "fp16": "precision",
    "amp": "precision",
    "data_types": "precision",
    "torch_autocast": "precision",
    "communication_data_type": "precision",
    "prescale_gradients": "none, since gradients are sums",
    "gradient_predivide_factor": "none, since gradients are sums",
    "gradient_allreduce_op": "none, since gradients are sums",
    "zero_allow_untested_optimizer": "optimizer",
    "zero_force_ds_cpu_optimizer": "optimizer",
    "tensor_parallel": "layout.tp",
    "expert_parallel": "layout",
    "sequence_parallel_size": "layout.cp",
    "pipeline": "layout.pp",
    "zero_optimization.stage": "engine.zero",
    "zero_optimization.offload_optimizer": "engine.offload",
    "zero_optimization.offload_param": "engine.offload",
    "zero_optimization.cpu_offload": "engine.offload",
    "zero_optimization.cpu_offload_param": "engine.offload",
    "zero_optimization.compute_grad_norm": "none, since the norm is always logged",
    "zero_optimization.memory_efficient_linear": "none, since this key replaces torch's linear for the whole process",
}
"""Keys of DeepSpeed's config that `passthrough` may not contain, each with the bigtrain key to use instead."""


@ENGINES.register
class DeepSpeedConfig(Passthrough):
    """DeepSpeed's ZeRO (Rajbhandari et al. 2020) over all data-parallel ranks."""

    axes: ClassVar[tuple[str, ...]] = ("dp_shard", "pp", "tp")

    name: Literal["deepspeed"] = "deepspeed"

    recompute: Recompute = "none"
    """Activations that the backward pass recomputes. full: all of each block, from its input. selective: all but
    matmuls, attention and what ranks exchange."""

    compile: bool = False
    """Whether each block is compiled (torch.compile). This engine does not support it: use the engine fsdp."""

    zero: Literal[0, 1, 2, 3] = 2
    """ZeRO stage: what is sharded over the ranks. 0: nothing; 1: optimizer state and FP32 weights; 2: also gradients;
    3: also the weights used in forward and backward."""

    offload: Literal["none", "optimizer"] = "none"
    """optimizer: the CPU holds optimizer state and FP32 weights, and runs the update; needs zero 1, 2 or 3."""

    passthrough: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed's own keys that bigtrain does not set, such as {zero_optimization: {reduce_bucket_size: 5e8}}."""

    @model_validator(mode="after")
    def _check(self) -> DeepSpeedConfig:
        if self.offload == "optimizer" and self.zero == 0:
            raise ValueError("offload: optimizer needs zero 1, 2 or 3; with zero: 0 the optimizer state is not sharded")
        if self.compile:
            raise ValueError("compile is not supported with deepspeed: set it to false, or use name: fsdp")
        zero = self.passthrough.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError("passthrough.zero_optimization must be a mapping of keys")
        for key in (*self.passthrough, *(f"zero_optimization.{key}" for key in zero)):
            if key in SET_BY_THE_ENGINE:
                raise ValueError(
                    f"passthrough.{key} is set by the engine; the bigtrain key for it is: {SET_BY_THE_ENGINE[key]}"
                )
        return self

    @property
    def flattens(self) -> bool:
        """See `EngineConfig.flattens`: true for every ZeRO stage but 0."""
        return self.zero > 0

    def check_layout(self, layout: LayoutConfig) -> None:
        """Refuse what DeepSpeed's pipeline does not support: ZeRO 2 and 3, offload, and schedules other than 1f1b.

        Raises:
            UserError: The pipeline does not support ZeRO stage, offload or schedule. The error names the key to change.
        """
        if layout.pp == 1:
            return
        if self.zero > 1:
            raise UserError(
                f"DeepSpeed's pipeline supports ZeRO 0 and 1, not {self.zero}: it reduces gradients at the end of a "
                "step, when ZeRO 2 and 3 have already sharded them",
                "engine.zero",
                "Set engine.zero to 1, or layout.pp to 1, or use the engine 'fsdp'.",
            )
        if self.offload != "none":
            raise UserError(
                "DeepSpeed's pipeline does not support an optimizer on the CPU: the norm of the gradients would be "
                "summed over the stages group by group, and stages may have different groups",
                "engine.offload",
                "Set engine.offload to none, or layout.pp to 1.",
            )
        if layout.pp_schedule != "1f1b":
            raise UserError(
                f"DeepSpeed's pipeline supports only the schedule 1f1b, not {layout.pp_schedule}",
                "layout.pp_schedule",
                "Set layout.pp_schedule to 1f1b and layout.pp_stages_per_rank to 1, or use the engine 'fsdp'.",
            )

    def read_passthrough(self, precision: Precision, *, pipelined: bool) -> None:
        """See `Passthrough.read_passthrough`."""
        import torch

        from bigtrain.engines.deepspeed.settings import check_passthrough, deepspeed_config
        from bigtrain.engines.deepspeed.start import import_deepspeed

        device = torch.device("cpu")
        import_deepspeed(device)
        check_passthrough(deepspeed_config(self, precision, device, pipelined=pipelined), self.passthrough)

    def make(self, parts: EngineParts) -> Engine:
        """See `EngineConfig.make`."""
        from bigtrain.engines.deepspeed.build import build_deepspeed_engine

        return build_deepspeed_engine(self, parts)
