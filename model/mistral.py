"""Mistral on transformers' infrastructure (Jiang et al. 2023, arXiv:2310.06825).

Configuration and state-dict names are those of transformers, so checkpoints go both ways. Dense layers come
from `make_linear` and may be replaced afterwards by any module: nothing here reads the `.weight` of one.
"""

# ruff: noqa: RUF012  (transformers reads these as plain class attributes and declares them so)
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import MistralConfig
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .attention import MistralAttention
from .backbone import MistralModel, MistralPreTrainedModel
from .blocks import MistralDecoderLayer, MistralMLP, MistralRMSNorm
from .heads import (
    MistralForQuestionAnswering,
    MistralForSequenceClassification,
    MistralForTokenClassification,
)
from .linear import make_linear
from .rope import MistralRotaryEmbedding

__all__ = [
    "MistralAttention",
    "MistralDecoderLayer",
    "MistralForCausalLM",
    "MistralForQuestionAnswering",
    "MistralForSequenceClassification",
    "MistralForTokenClassification",
    "MistralMLP",
    "MistralModel",
    "MistralPreTrainedModel",
    "MistralRMSNorm",
    "MistralRotaryEmbedding",
    "make_linear",
]


def keep_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The positions whose logits are wanted, taken before the head because the vocabulary is wide.

    Args:
        hidden_states: [B, T, D].
        logits_to_keep: n: the last n positions, 0 = all. Indices [n]: these, of every text. Indices [B, n]:
            these, of each text its own. Boolean [B, T]: where True, all texts in a row.
    Returns:
        [B, n, D]; [number of True, D] for the boolean mask.
    """
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.ndim != 2:
            return hidden_states[:, logits_to_keep, :]
        if logits_to_keep.dtype == torch.bool:
            return hidden_states[logits_to_keep]
        return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)
    return hidden_states[:, -logits_to_keep:, :] if logits_to_keep else hidden_states


class MistralForCausalLM(MistralPreTrainedModel, GenerationMixin):
    """The model and its language-model head, tied to the embedding where the configuration says so."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config)
        self.model = MistralModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = make_linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """As transformers has it, without a tie whose ends no longer both hold a `weight` parameter.

        A quantized head or embedding keeps its codes under other names, and shares them itself if it does.
        """
        ties = super().get_expanded_tied_weights_keys(all_submodels=all_submodels)
        weights = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        return {target: source for target, source in ties.items() if {target, source} <= weights}

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Tie head and embedding, as the modules are now rather than as they were at construction."""
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        super().tie_weights(missing_keys=missing_keys, recompute_mapping=False)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab_size]; the other arguments as in `MistralModel.forward`.

        Args:
            labels: [B, T] token ids, not shifted, -100 where none counts. The loss is the mean over the
                counted tokens, or their sum over `num_items_in_batch` where that keyword is given (gradient
                accumulation).
            logits_to_keep: see `keep_positions`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,  # whatever config.return_dict says
            **kwargs,
        )
        logits = self.lm_head(keep_positions(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
