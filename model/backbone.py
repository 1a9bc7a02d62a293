"""The backbone every Mistral class shares: embedding, blocks, final norm."""

# ruff: noqa: RUF012  (transformers reads these as plain class attributes and declares them so)
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import MistralConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from . import attention_brise
from .attention import MistralAttention, attention_mask_for
from .blocks import MistralDecoderLayer, MistralRMSNorm
from .rope import MistralRotaryEmbedding


class MistralPreTrainedModel(PreTrainedModel):
    """What transformers reads from the class: what may be split, recorded, compiled, checkpointed."""

    config: MistralConfig
    config_class = MistralConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MistralDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": MistralDecoderLayer,
        "attentions": MistralAttention,
    }

    def get_correct_attn_implementation(
        self, requested_attention: str | None, *args: Any, **kwargs: Any
    ) -> str:
        """As transformers has it; `brise` is made known to it when it is first asked for."""
        if requested_attention == attention_brise.NAME:
            attention_brise.register()
        return super().get_correct_attn_implementation(requested_attention, *args, **kwargs)


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
            past_key_values: any Cache of transformers, or a RollingCache. None with `use_cache` makes a
                DynamicCache.
            kwargs: `output_hidden_states` (layers + 1 tensors, embeddings first, the last one normed),
                `output_attentions` (eager only), `return_dict`; the rest reaches the attention
                implementation.
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
