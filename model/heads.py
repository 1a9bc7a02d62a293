"""The task heads: classes of a text, classes of its tokens, and extractive question answering."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import MistralConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple, logging

from .backbone import MistralModel, MistralPreTrainedModel
from .linear import make_linear

logger = logging.get_logger(__name__)


def last_token(
    input_ids: Tensor | None, pad_token_id: int | None, batch: int, device: torch.device
) -> Tensor:
    """Column of each text's last token that is no padding, [B]: right and left padding alike.

    The last column where nothing tells padding apart (no pad token, or embeddings instead of ids).
    """
    if input_ids is None or pad_token_id is None:
        return torch.full((batch,), -1, dtype=torch.int32, device=device)
    kept = (input_ids != pad_token_id).to(device, torch.int32)
    columns = torch.arange(input_ids.shape[-1], dtype=torch.int32, device=device)
    return (columns * kept).argmax(-1)


def label_count(config: MistralConfig) -> int:
    """`config.num_labels`, which is counted from `config.id2label`."""
    if config.num_labels is None:
        raise ValueError("config.id2label is None, so the number of labels is unknown; set config.num_labels")
    return config.num_labels


class MistralForSequenceClassification(MistralPreTrainedModel):
    """One label, several labels or a number for each text: `score` on its last token."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config)
        self.num_labels = label_count(config)
        self.model = MistralModel(config)
        self.score = make_linear(config.hidden_size, self.num_labels)
        self.post_init()

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
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Logits [B, num_labels].

        Args:
            labels: [B] class ids; [B] or [B, num_labels] numbers to regress on; or [B, num_labels] zeros and
                ones where several labels may hold. `config.problem_type` says which; None infers it from
                num_labels and the dtype.
        Raises:
            ValueError: more than one text, and no `config.pad_token_id` to find where each one ends.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,  # whatever config.return_dict says
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state)
        batch, pad = logits.shape[0], self.config.pad_token_id
        if pad is None and batch != 1:
            raise ValueError(
                f"Cannot handle batch sizes > 1 if no padding token is defined: got {batch} texts and "
                "config.pad_token_id is None; set it, or pass one text at a time"
            )
        if pad is not None and input_ids is None:
            logger.warning_once(
                f"{type(self).__name__} cannot see padding in inputs_embeds: it reads the last position"
            )
        last = last_token(input_ids, pad, batch, logits.device)
        pooled = logits[torch.arange(batch, device=logits.device), last]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=pooled, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=pooled,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MistralForTokenClassification(MistralPreTrainedModel):
    """One label for each token."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config)
        self.num_labels = label_count(config)
        self.model = MistralModel(config)
        rates = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        self.dropout = nn.Dropout(next((rate for rate in rates if rate is not None), 0.1))
        bias = getattr(config, "token_classification_bias", True)
        self.score = make_linear(config.hidden_size, self.num_labels, bias=bias)
        self.post_init()

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
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Logits [B, T, num_labels]; labels [B, T], -100 where none counts."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,  # whatever config.return_dict says
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MistralForQuestionAnswering(MistralPreTrainedModel):
    """The span of a text that answers: where it starts and where it ends."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config)
        self.model = MistralModel(config)
        self.qa_outputs = make_linear(config.hidden_size, 2, bias=True)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Start and end logits, each [B, T]; the loss needs both start_positions and end_positions, [B]."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            return_dict=True,  # whatever config.return_dict says
            **kwargs,
        )
        start, end = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        start, end = start.contiguous(), end.contiguous()
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start, end, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start,
            end_logits=end,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
