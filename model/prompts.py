"""Prompts as people write them, a string or a conversation, as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .requests import RequestError

Messages = Sequence[Mapping[str, Any]]


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """A string as the tokenizer takes it, with the special tokens that it puts before one."""
    return list(tokenizer(prompt)["input_ids"])


def encode_messages(tokenizer: Any, messages: Messages) -> list[int]:
    """A conversation, messages with a role and content each, in the model's chat template, up to where it answers.

    Raises:
        RequestError: the tokenizer has no template, or this conversation does not fit it.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise RequestError("the tokenizer has no chat template; give a plain prompt")
    try:
        encoded = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    except (TemplateError, TypeError, KeyError, AttributeError) as error:
        raise RequestError(f"the conversation does not fit the model's chat template: {error}") from error
    tokens = list(encoded["input_ids"])
    if not all(isinstance(token, int) for token in tokens):
        raise RequestError("expected one conversation, a list of messages, got a list of conversations")
    return tokens
