"""Mistral on transformers' infrastructure (Jiang et al. 2023, arXiv:2310.06825).

Configuration and state-dict names are those of transformers, so checkpoints go both ways. Dense layers come from
`make_linear` and may be replaced afterwards by anything callable: nothing here reads the `.weight` of one.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import MistralConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import MistralAttention, attention_mask_for
from .blocks import MistralDecoderLayer, MistralMLP, MistralRMSNorm
from .heads import QuestionAnswering, SequenceClassification, TokenClassification
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


class MistralPreTrainedModel(PreTrainedModel):
    """What transformers reads from the class: configuration, what may be split, recorded, compiled, checkpointed."""

    config: MistralConfig
    config_class = MistralConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["MistralDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs: ClassVar[dict[str, type[nn.Module]]] = {
        "hidden_states": MistralDecoderLayer,
        "attentions": MistralAttention,
    }


class MistralModel(MistralPreTrainedModel):
    """Embedding, decoder blocks and final norm."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(MistralDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = MistralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MistralRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, T, D] after the final norm.

        Args:
            input_ids: [B, T] tokens, or else `inputs_embeds` [B, T, D].
            attention_mask: [B, past + T], 1 = keep, or a finished mask [B, 1 or H, T, keys] as the attention
                implementation takes it (eager: additive or boolean; sdpa: either).
            position_ids: [B or 1, T], absolute; by default counted on from the cache.
            past_key_values: any Cache of transformers, or a RollingCache. None with `use_cache` makes a DynamicCache.
            kwargs: `output_hidden_states` (layers + 1 tensors, embeddings first, the last one normed),
                `output_attentions` (eager only), `return_dict`; the rest reaches the attention implementation.
        Raises:
            ValueError: both or neither of input_ids and inputs_embeds.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "both" if input_ids is not None else "neither"
            raise ValueError(f"You must specify exactly one of input_ids or inputs_embeds, got {given}")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
            position_ids = position_ids.unsqueeze(0)
        mask = attention_mask_for(self.config, inputs_embeds, attention_mask, past_key_values, position_ids)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        hidden_states = inputs_embeds
        # the slice: early-exit decoding lowers config.num_hidden_layers on a copy that shares these layers
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )


def keep_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The positions whose logits are wanted, taken before the head because the vocabulary is wide.

    Args:
        hidden_states: [B, T, D].
        logits_to_keep: n: the last n positions, 0 = all. Indices [n]: these, of every text. Indices [B, n]: these, of
            each text its own. Boolean [B, T]: where True, all texts in a row.
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

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}
    _pp_plan: ClassVar[dict[str, tuple[list[str], list[str]]]] = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan: ClassVar[dict[str, str]] = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config)
        self.model = MistralModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = make_linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """As transformers has it, without a tie whose ends no longer both hold a `weight` parameter.

        A quantized head or embedding keeps its codes under other names and shares them, if it does, by itself.
        """
        ties = super().get_expanded_tied_weights_keys(all_submodels=all_submodels)
        weights = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        return {target: source for target, source in ties.items() if {target, source} <= weights}

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Tie head and embedding; looks at the modules that are there now, whatever was there at construction."""
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
            labels: [B, T] token ids, not shifted, -100 where none counts. The loss is the mean over the counted tokens,
                or their sum over `num_items_in_batch` where that keyword is given (gradient accumulation).
            logits_to_keep: see `keep_positions`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
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


class MistralForSequenceClassification(SequenceClassification, MistralPreTrainedModel):
    """One label, several labels or a number for each text."""

    backbone_class = MistralModel


class MistralForTokenClassification(TokenClassification, MistralPreTrainedModel):
    """One label for each token."""

    backbone_class = MistralModel


class MistralForQuestionAnswering(QuestionAnswering, MistralPreTrainedModel):
    """The span of a text that answers."""

    backbone_class = MistralModel
