"""The byte-pair tokenizer inside a GGUF file, written as tokenizer.json and tokenizer_config.json.

Built here and not by transformers' converter, because that one drops the pre-tokenizer's name
(``tokenizer.ggml.pre``): without SmolLM's splitting of single digits, ``"a  1"`` comes out as other tokens
than the model was trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# llama.h, enum llama_token_type
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


def save_tokenizer(reader: Any, folder: Path, *, vocab_size: int, max_length: int) -> None:
    """Write the tokenizer of an opened GGUF file (``gguf.GGUFReader``) into ``folder``.

    Args:
        reader: the opened file.
        folder: an existing folder.
        vocab_size: rows of the embedding; the list of tokens must be as long.
        max_length: positions the model was trained for, kept as ``model_max_length``.

    Raises:
        GGUFError: no tokenizer, another kind than byte-pair, or a pre-tokenizer that is not known here.
    """
    tokenizer = read_tokenizer(reader, vocab_size)
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(folder)


def read_tokenizer(reader: Any, vocab_size: int | None = None) -> Any:
    """The tokenizer of an opened GGUF file; ``vocab_size`` is how many tokens it must have. Raises GGUFError."""
    from transformers import PreTrainedTokenizerFast

    from .gguf import GGUFError

    fields = {
        name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")
    }
    ggml = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    tokens = ggml.get("tokens")
    if tokens is None:
        raise GGUFError("the file holds no tokenizer (tokenizer.ggml.tokens is missing)")
    if vocab_size is not None and len(tokens) != vocab_size:
        raise GGUFError(f"expected {vocab_size} tokens, one for each row of the embedding, got {len(tokens)}")
    special = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = ggml.get(f"{key}_token_id")
        if index is not None:
            special[f"{role}_token"] = tokens[index]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_pair(ggml, tokens),
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer


def _byte_pair(ggml: dict[str, Any], tokens: list[str]) -> Any:
    """A ``tokenizers.Tokenizer`` from the ``tokenizer.ggml`` section."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    from .gguf import GGUFError

    if ggml.get("model") != "gpt2":
        raise GGUFError(
            f"expected a byte-pair tokenizer (tokenizer.ggml.model 'gpt2'), got {ggml.get('model')!r}; "
            "convert the weights from the model's Hugging Face folder instead"
        )
    # the gguf package writes no empty arrays: no key, no merges
    merges = [tuple(merge.split(" ")) for merge in ggml.get("merges", [])]
    if bad := next((merge for merge in merges if len(merge) != 2), None):
        raise GGUFError(f"expected two pieces in every merge, got {' '.join(bad)!r}")
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise GGUFError(f"expected distinct tokens, got {len(tokens) - len(vocab)} repeated ones")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False))
    tokenizer.pre_tokenizer = _pre_tokenizer(ggml.get("pre"))
    tokenizer.decoder = decoders.ByteLevel()
    types = ggml.get("token_type", [])
    added = [
        AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    if ggml.get("add_bos_token", False):
        bos = ggml.get("bos_token_id")
        if bos is None:
            raise GGUFError("tokenizer.ggml.add_bos_token is set but there is no bos_token_id")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"],
            pair=[tokens[bos], "$A", tokens[bos], "$B"],
            special_tokens=[(tokens[bos], bos)],
        )
    return tokenizer


def _pre_tokenizer(name: str | None) -> Any:
    """How text is cut before the merges, by llama.cpp's name for it."""
    from tokenizers import pre_tokenizers

    from .gguf import GGUFError

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "gpt-2":
        return gpt2
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    raise GGUFError(f"expected the pre-tokenizer 'gpt-2' or 'smollm' (tokenizer.ggml.pre), got {name!r}")
