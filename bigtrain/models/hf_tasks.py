"""Training tasks of Hugging Face models: inputs and targets made from a batch of tokens, and the sum of losses.

Shapes: B sequences of C tokens; for a sequence-to-sequence model, the first S tokens are the source.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from bigtrain.config import UserError
from bigtrain.metrics import record_metric, wants_metric
from bigtrain.models.adapter import AdapterConfig
from bigtrain.models.config import Flops
from bigtrain.models.contract import Batch, LossSum
from bigtrain.models.hf_adapters import adapt
from bigtrain.models.plain.across import real_rows, sum_over_batch
from bigtrain.models.random import keep_mask
from bigtrain.models.sums import by_sequence

if TYPE_CHECKING:
    from bigtrain.models.families.hf import Config, Task

_CLASSES = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
_HIDING = 1
"""The argument `layer` of `random.keep_mask` for the draw that masks tokens."""


class Example(NamedTuple):
    """The inputs and targets that a task makes from a micro-batch."""

    arguments: dict[str, Tensor]
    """Keyword arguments of the model's forward pass."""
    targets: Tensor
    """int64 (B, T), the tokens that the logits (B, T, V) must predict."""
    weights: Tensor
    """FP32 (B, T), weight of each target in the loss."""


def examples(config: Config, batch: Batch) -> Example:
    """Apply the task of `config` to a micro-batch of `tokens`, `targets`, `weights` (B, C) and `keys` (B,).

    causal: position i predicts token i + 1, which is the batch's target.

    masked: each token is masked with probability `masked`. The draw depends on the key of its sequence, so it is the
    same in every layout. All masked tokens become the mask token, and only they have a loss (Devlin et al. 2019;
    Wettig et al. 2023 show that it is not necessary to keep or replace some of them). The batch's last target is not
    an input and is not used.

    seq2seq: the encoder reads the first S tokens, and the decoder predicts the tokens after them, including the last
    target. This is the prefix language modelling of Raffel et al. 2020, section 3.2.3.

    Raises:
        UserError: The batch has a document mask.
    """
    if "documents" in batch:
        raise UserError(
            "A Hugging Face model does not support a document mask",
            "data.document_mask",
            "Set data.document_mask to false.",
        )
    tokens, targets, weights = batch["tokens"], batch["targets"], batch["weights"]
    if config.task == "causal":
        # Padding comes last, so tokens with a loss never see it.
        return Example({"input_ids": tokens}, targets, weights)
    # Token i is the target of position i - 1 and has that target's weight. The first token, which is no target, has
    # the weight of the second.
    of_tokens = torch.cat([weights[:, :1], weights[:, :-1]], dim=1)
    seen = of_tokens > 0
    # A filler sequence, which is only padding, sees its first token: attention over no keys would give NaN.
    seen[:, 0] = True
    if config.task == "masked":
        hidden = ~keep_mask(torch.Size([*tokens.shape, 1]), config.masked, batch["keys"], _HIDING)[..., 0]
        masked = torch.where(hidden, config.hidden_token, tokens)
        arguments = {"input_ids": masked, "attention_mask": seen.to(torch.int64)}
        return Example(arguments, tokens, of_tokens * hidden)
    split = config.source_tokens
    answers = targets[:, split - 1 :]
    begin = torch.full_like(answers[:, :1], config.shape.decoder_start_token_id)
    return Example(
        {
            "input_ids": tokens[:, :split],
            "attention_mask": seen[:, :split].to(torch.int64),
            "decoder_input_ids": torch.cat([begin, answers[:, :-1]], dim=1),
        },
        answers,
        weights[:, split - 1 :],
    )


def loss_sum(model: nn.Module, example: Example, router: RouterLoss | None = None) -> LossSum:
    """Weighted sum of cross-entropies, in nats, and sum of weights. The losses of transformers are means, so they are
    not used.

    Args:
        router: Load-balancing loss of the experts, added in training; an evaluation uses only the cross-entropy.
    """
    balance = router is not None and model.training
    more = {"output_router_logits": True} if balance else {}
    output = model(**example.arguments, use_cache=False, **more)
    logits = output.logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), example.targets.flatten(), reduction="none")
    losses = losses.view_as(example.weights) * example.weights
    if wants_metric("accuracy"):
        right = logits.argmax(dim=-1).view_as(example.targets) == example.targets
        record_metric("accuracy", right.float(), weight=example.weights)
    loss, weight = losses.sum(), example.weights.sum()
    if balance and router is not None:
        loss = loss + router.share(output.router_logits, len(example.weights), weight)
    return LossSum(loss, weight, by_sequence(losses, example.weights))


class RouterLoss(NamedTuple):
    """The load-balancing loss of experts over the global batch (Fedus et al. 2021, eq. 4), as in transformers."""

    coefficient: float
    experts_per_token: int

    @classmethod
    def of(cls, shape: PretrainedConfig) -> RouterLoss | None:
        """The router loss of a transformers config; None if it has no coefficient or no `output_router_logits`."""
        coefficient = getattr(shape, "router_aux_loss_coef", None)
        chosen = getattr(shape, "num_experts_per_tok", None)
        if not coefficient or chosen is None or not getattr(shape, "output_router_logits", False):
            return None
        return cls(float(coefficient), int(chosen))

    def share(self, logits: tuple[Tensor, ...], sequences: int, weight: Tensor) -> Tensor:
        """This rank's contribution to the sum of losses.

        The contributions of all ranks add up to coefficient * loss * (sum of all weights). How often each expert is
        chosen is counted over the global batch.

        Args:
            logits: Router logits of each layer, (sequences * C, experts).
            sequences: Number of sequences in the micro-batch, fillers included.
            weight: FP32 scalar, the sum of weights of the micro-batch.
        """
        own = real_rows(sequences)
        of_tokens = torch.cat([layer[: len(layer) // sequences * own] for layer in logits]).float().softmax(-1)
        experts = of_tokens.shape[-1]
        chosen = F.one_hot(of_tokens.topk(self.experts_per_token).indices, experts).sum((0, 1)).float()
        counts = torch.cat([chosen, weight.detach()[None], chosen.new_tensor([float(len(of_tokens))])])
        counts = sum_over_batch(counts, "The loss of the router (router_aux_loss_coef)")
        shares, total, tokens = counts[:-2] / counts[-1], counts[-2], counts[-1]
        return self.coefficient * total * experts * (shares * of_tokens.sum(0)).sum() / tokens


def auto_class(task: Task) -> Any:
    """The auto class of transformers for a task, such as AutoModelForCausalLM."""
    return getattr(transformers, _CLASSES[task])


def check_task(config: Config, shape: PretrainedConfig) -> None:
    """Check that the model supports its task.

    Raises:
        UserError: transformers has no model of this type for the task, or the model would see the token that it must
            predict, or a config for seq2seq has no `decoder_start_token_id`.
    """
    able = [task for task in _CLASSES if type(shape) in auto_class(task)._model_mapping]  # type: ignore[arg-type]
    if "masked" in able and "causal" in able and not getattr(shape, "is_decoder", False):
        # An encoder that could be configured as a decoder: as configured, each token sees the tokens after it.
        able.remove("causal")
    if config.task not in able:
        raise UserError(
            f"A model of type '{shape.model_type}' does not support task '{config.task}'",
            "model.task",
            f"Set model.task to {' or '.join(able)}." if able else "Choose a language model.",
        )
    if config.task == "seq2seq" and getattr(shape, "decoder_start_token_id", None) is None:
        raise UserError(
            "The config of the model does not name the token with which its decoder starts",
            str(config.directory / "config.json"),
            "Add decoder_start_token_id.",
        )


def load(config: Config) -> PreTrainedModel:
    """Load the model with its weights in FP32 and without dropout; an adapter's parameters are zero.

    Raises:
        UserError: The weights lack parameters of the model.
    """
    transformers.utils.logging.disable_progress_bar()
    model, info = auto_class(config.task).from_pretrained(
        config.directory,
        config=config.shape,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        raise UserError(
            f"The weights lack {', '.join(lacking[:3])}{' ...' if len(lacking) > 3 else ''}, which would be random",
            str(config.directory),
            f"Save a model of {_CLASSES[config.task]} there.",
        )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if config.adapter is not None:
        adapt(model, config.adapter)
    return model


def flops(config: Config, model: PreTrainedModel) -> Flops:
    """Matmul FLOPs per token of the sequence, forward and backward.

    They are 6 per matmul parameter and token that it multiplies, or 4 if the parameter is frozen, and 12 per channel of
    attention and pair of tokens. In a sequence-to-sequence model, a token is either source or target; the keys and
    values of cross-attention are counted once per target. `Flops.unknown()` for models whose FLOPs this formula does
    not describe.
    """
    shape = model.config.get_text_config()
    heads = getattr(shape, "num_attention_heads", None)
    if heads is None or any(parameter.ndim > 2 for parameter in model.parameters()):
        # The formula below does not hold without attention, with convolutions, or with experts.
        return Flops.unknown()
    width = heads * (getattr(shape, "d_kv", None) or getattr(shape, "head_dim", None) or shape.hidden_size // heads)
    context, layers = config.context, shape.num_hidden_layers
    if config.task != "seq2seq":
        dense = _dense(model, config.adapter)
        attention = 12 * layers * width * context
        return Flops(dense + attention, dense + (attention // 2 if config.task == "causal" else attention))
    source = config.source_tokens
    target = context - source + 1
    decoder_layers = getattr(shape, "num_decoder_layers", None) or getattr(shape, "decoder_layers", layers)
    encoder = _dense(model.get_encoder(), config.adapter)
    dense = encoder * source + (_dense(model, config.adapter) - encoder) * target
    crossed = 12 * width * (layers * source**2 + decoder_layers * target * source)
    itself = 12 * width * decoder_layers * target**2
    return Flops((dense + crossed + itself) // context, (dense + crossed + itself // 2) // context)


def _dense(model: nn.Module, adapter: AdapterConfig | None) -> int:
    """FLOPs per token in all matmuls with weights: linear layers and a tied head, but not embedding look-ups.

    With an adapter, frozen matrices need no gradient of their own; see `DecoderConfig.flops_per_token`.
    """
    weights = (getattr(module, "weight", None) for module in model.modules() if not isinstance(module, nn.Embedding))
    numbers = sum(weight.numel() for weight in weights if isinstance(weight, Tensor) and weight.ndim == 2)
    if adapter is None:
        return 6 * numbers
    return 4 * numbers + 6 * sum(one.numel() for name, one in model.named_parameters() if adapter.is_own(name))
