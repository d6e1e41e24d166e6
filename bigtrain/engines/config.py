"""The `engine` section: who executes a step."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from bigtrain.config import Section
from bigtrain.parallel.config import Recompute

Precision = Literal["fp32", "bf16", "fp16"]
"""Arithmetic of the matmuls and the residual stream; parameters, reductions, norms and loss are FP32 in all. fp16 comes
with a loss scale that follows what overflows."""

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
    "prescale_gradients": "nothing: gradients are sums",
    "gradient_predivide_factor": "nothing: gradients are sums",
    "gradient_allreduce_op": "nothing: gradients are sums",
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
    "zero_optimization.compute_grad_norm": "nothing: the norm is always logged",
    "zero_optimization.memory_efficient_linear": "nothing: it replaces torch's linear for all that follows",
}
"""Keys of DeepSpeed's config that `passthrough` may not hold, and the key of ours that says it instead."""


class _Engine(Section):
    """What all engines share."""

    deterministic: bool | Literal["auto"] = "auto"
    """Only kernels that give the same bits every time. auto: on a CPU, where it costs nothing; not on a GPU."""


class _OwnModels(_Engine):
    """What the engines of our own models share."""

    recompute: Recompute = "none"
    """What is computed again in the backward pass instead of kept. full: each block, from its input. selective: all but
    matrix products, attention, and what ranks exchange."""

    compile: bool = False
    """Whether each block is compiled (torch.compile), all with the same code; fsdp alone."""


class FSDPConfig(_OwnModels):
    """PyTorch's FSDP2; one process runs without a process group."""

    name: Literal["fsdp"] = "fsdp"


class DeepSpeedConfig(_OwnModels):
    """DeepSpeed's ZeRO (Rajbhandari et al. 2020) over all data-parallel ranks."""

    name: Literal["deepspeed"] = "deepspeed"

    zero: Literal[0, 1, 2, 3] = 2
    """What is spread over the ranks: 0 nothing; 1 the optimizer's state and FP32 weights; 2 gradients too; 3 also the
    weights that compute."""

    offload: Literal["none", "optimizer"] = "none"
    """optimizer: its state, the FP32 weights and their update lie on the CPU; with zero 1, 2 or 3."""

    passthrough: dict[str, Any] = Field(default_factory=dict)
    """Keys of DeepSpeed's own config that are not ours, such as {zero_optimization: {reduce_bucket_size: 5e8}}."""

    @model_validator(mode="after")
    def _check(self) -> DeepSpeedConfig:
        if self.offload == "optimizer" and self.zero == 0:
            raise ValueError("offload: optimizer needs zero 1, 2 or 3; with zero: 0 nothing is spread that could move")
        if self.compile:
            raise ValueError("compile is not supported with deepspeed: set it to false, or use name: fsdp")
        zero = self.passthrough.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError("passthrough.zero_optimization must be a mapping of keys")
        for key in (*self.passthrough, *(f"zero_optimization.{key}" for key in zero)):
            if key in SET_BY_THE_ENGINE:
                raise ValueError(f"passthrough.{key} is set by the engine; what says it is {SET_BY_THE_ENGINE[key]}")
        return self


class AccelerateConfig(_Engine):
    """Hugging Face models, through Accelerate's plugins."""

    name: Literal["accelerate"] = "accelerate"
    """accelerate: models of `arch: hf`; one process runs them in plain PyTorch."""

    strategy: Literal["ddp", "fsdp2", "zero2"] = "ddp"
    """What the ranks share out. ddp: nothing; fsdp2: parameters, gradients, optimizer; zero2: gradients, optimizer."""

    passthrough: dict[str, Any] = Field(default_factory=dict)
    """Further settings: of DistributedDataParallelKwargs (ddp), of FullyShardedDataParallelPlugin (fsdp2), or of
    DeepSpeed's zero_optimization (zero2)."""


def _tag(value: Any) -> str:
    return str(value.get("name", "fsdp") if isinstance(value, dict) else getattr(value, "name", "fsdp"))


EngineConfig = Annotated[
    Annotated[FSDPConfig, Tag("fsdp")]
    | Annotated[DeepSpeedConfig, Tag("deepspeed")]
    | Annotated[AccelerateConfig, Tag("accelerate")],
    Discriminator(_tag),
]
"""The section `engine`: chosen by `name`, fsdp where it is left out."""
