"""The byte-pair tokenizer inside a GGUF file, over bytes or sentencepiece's, as tokenizer.json and its config.

Built here and not by transformers' converter, because that one drops the pre-tokenizer's name
(``tokenizer.ggml.pre``): without SmolLM's splitting of single digits, ``"a  1"`` comes out as other tokens
than the model was trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .sentencepiece import Piece, bare_tokenizer

# llama.h, enum llama_token_type
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
# what llama.cpp takes of a sentencepiece tokenizer whose file does not say
_DEFAULT_IDS = {"unknown": 0, "bos": 1, "eos": 2}


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
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise GGUFError("expected tokenizer.ggml.tokens to be an array of strings")
    if vocab_size is not None and len(tokens) != vocab_size:
        raise GGUFError(f"expected {vocab_size} tokens, one for each row of the embedding, got {len(tokens)}")
    special = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = ggml.get(f"{key}_token_id")
        if index is None and ggml.get("model") == "llama":
            index = _DEFAULT_IDS.get(key)
        if index is not None:
            if type(index) is not int or not 0 <= index < len(tokens):
                raise GGUFError(f"tokenizer.ggml.{key}_token_id is {index}, there are {len(tokens)} tokens")
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
    from tokenizers import AddedToken, processors

    from .gguf import GGUFError

    if len(set(tokens)) != len(tokens):
        raise GGUFError(f"expected distinct tokens, got {len(tokens) - len(set(tokens))} repeated ones")
    if ggml.get("model") == "gpt2":
        tokenizer = _over_bytes(ggml, tokens)
    elif ggml.get("model") == "llama":
        tokenizer = _sentencepiece(ggml, tokens)
    else:
        raise GGUFError(
            f"expected a byte-pair tokenizer (tokenizer.ggml.model 'gpt2' or 'llama'), got {ggml.get('model')!r}; "
            "convert the weights from the model's Hugging Face folder instead"
        )
    types = ggml.get("token_type", [])
    added = [
        AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    if ggml.get("add_bos_token", ggml["model"] == "llama"):
        bos = ggml.get("bos_token_id", _DEFAULT_IDS["bos"] if ggml["model"] == "llama" else None)
        if bos is None:
            raise GGUFError("tokenizer.ggml.add_bos_token is set but there is no bos_token_id")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"],
            pair=[tokens[bos], "$A", tokens[bos], "$B"],
            special_tokens=[(tokens[bos], bos)],
        )
    return tokenizer


def _sentencepiece(ggml: dict[str, Any], tokens: list[str]) -> Any:
    """Sentencepiece's byte pairs (llama.cpp's ``llama``): the order of merges lies in the scores."""
    from .gguf import GGUFError

    scores, kinds = ggml.get("scores"), ggml.get("token_type")
    if scores is None or kinds is None or not len(scores) == len(kinds) == len(tokens):
        raise GGUFError(f"expected a score and a type of each of the {len(tokens)} tokens")
    pieces = [Piece(*each) for each in zip(tokens, scores, kinds)]
    unknown = ggml.get("unknown_token_id", _DEFAULT_IDS["unknown"])
    return bare_tokenizer(pieces, tokens[unknown], prefix=ggml.get("add_space_prefix", True))


def _over_bytes(ggml: dict[str, Any], tokens: list[str]) -> Any:
    """Byte pairs over bytes (llama.cpp's ``gpt2``): merges are listed."""
    from tokenizers import Tokenizer, decoders, models

    from .gguf import GGUFError

    # the gguf package writes no empty arrays: no key, no merges
    merges = [tuple(merge.split(" ")) for merge in ggml.get("merges", [])]
    if bad := next((merge for merge in merges if len(merge) != 2), None):
        raise GGUFError(f"expected two pieces in every merge, got {' '.join(bad)!r}")
    vocab = {token: index for index, token in enumerate(tokens)}
    if bad := next((m for m in merges if not {m[0], m[1], m[0] + m[1]} <= vocab.keys()), None):
        raise GGUFError(f"expected merges of tokens into tokens, got {' '.join(bad)!r}")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False))
    tokenizer.pre_tokenizer = _pre_tokenizer(ggml.get("pre"))
    tokenizer.decoder = decoders.ByteLevel()
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
