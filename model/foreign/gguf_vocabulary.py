"""The tokenizer of a folder as GGUF has it: pieces, merges, scores and types, from tokenizer.json.

Two kinds are written: byte-pair ones over bytes (llama.cpp's ``gpt2``), where the way of cutting text has a name there,
and sentencepiece's byte-pair ones with byte fall-back (``llama``). A folder without a tokenizer gives a file without.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..reader import CheckpointReader, inside, read_json
from ..safetensors_header import CheckpointError
from .gguf_reader import GGUFCheckpoint

# llama.h, enum llama_token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_MAX_TOKENIZER = 1 << 28


def add_vocabulary(writer: Any, reader: CheckpointReader, size: int) -> None:
    """Write the ``tokenizer.`` section of an opened checkpoint into a ``gguf.GGUFWriter``.

    Args:
        size: rows of the embedding; pieces that the tokenizer lacks are added as unused ones.

    Raises:
        CheckpointError: a tokenizer of another kind, or with more pieces than the embedding has rows.
    """
    if isinstance(reader, GGUFCheckpoint):
        _copy(writer, reader.gguf)
        return
    if not (reader.folder / "tokenizer.json").exists():
        writer.add_tokenizer_model("no_vocab")
        return
    data = _read(reader.folder)
    found = data.get("model")
    model: dict[str, Any] = found if isinstance(found, dict) else {}
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise CheckpointError(
            f"{reader.folder}: a tokenizer of type {model.get('type')!r} is not written to GGUF"
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []]
    tokens, types = _pieces(model, data.get("added_tokens") or [], size, reader.folder)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        rank = {merge.replace(" ", ""): -float(i) for i, merge in enumerate(merges)}
        writer.add_token_list(tokens)
        writer.add_token_scores([rank.get(token, -1e9) for token in tokens])
        writer.add_add_space_prefix(_prefixes(data))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre(data.get("pre_tokenizer"), reader.folder))
        writer.add_token_list(tokens)
        writer.add_token_merges(merges)
    writer.add_token_types(types)
    known = _settings(reader.folder)
    for role, key in _ROLES.items():
        token = known.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in tokens:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", tokens.index(token))
    writer.add_add_bos_token(_adds_bos(data, known))
    if isinstance(template := _template(reader.folder, known), str):
        writer.add_chat_template(template)


def _copy(writer: Any, source: Any) -> None:
    """The section of another GGUF file, as it is."""
    import gguf

    for name, field in source.fields.items():
        if not name.startswith("tokenizer."):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, inner)


def _read(folder: Path) -> dict[str, Any]:
    path = inside(folder, "tokenizer.json")
    if path.stat().st_size > _MAX_TOKENIZER:
        raise CheckpointError(f"{folder}: tokenizer.json is larger than {_MAX_TOKENIZER} bytes")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder}: tokenizer.json cannot be read ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{folder}: tokenizer.json must be an object")
    return data


def _pieces(
    model: dict[str, Any], added: list[dict[str, Any]], size: int, folder: Path
) -> tuple[list[str], list[int]]:
    by_id: dict[int, tuple[str, int]] = {}
    for token, index in model["vocab"].items():
        is_byte = model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
        by_id[index] = (token, _BYTE if is_byte else _NORMAL)
    for token in added:
        by_id[token["id"]] = (token["content"], _CONTROL if token.get("special") else _USER_DEFINED)
    unknown = model.get("unk_token")
    if by_id and (max(by_id) >= size or min(by_id) < 0):
        raise CheckpointError(
            f"{folder}: the tokenizer has the id {max(by_id)}, the embedding only {size} rows"
        )
    tokens, types = [], []
    for index in range(size):
        filler = f"[PAD{index}]"
        token, kind = by_id.get(index, (filler, _UNUSED))
        kind = _UNUSED if token == filler else kind
        tokens.append(token)
        types.append(_UNKNOWN if unknown is not None and token == unknown else kind)
    return tokens, types


def _pre(pre: Any, folder: Path) -> str:
    """llama.cpp's name of a way to cut text; the inverse of what :mod:`brise.model.gguf_tokenizer` reads."""
    parts = pre.get("pretokenizers", [pre]) if isinstance(pre, dict) else []
    kinds = [part.get("type") for part in parts]
    byte_level = parts and kinds[-1] == "ByteLevel" and not parts[-1].get("add_prefix_space", True)
    if byte_level and parts[-1].get("use_regex", True):
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
            return "smollm"
    raise CheckpointError(
        f"{folder}: llama.cpp's name for a tokenizer that cuts text by {kinds} is not known here"
    )


def _settings(folder: Path) -> dict[str, Any]:
    name = "tokenizer_config.json"
    return read_json(folder, name) if (folder / name).exists() else {}


def _adds_bos(data: dict[str, Any], known: dict[str, Any]) -> bool:
    """Whether the tokenizer puts BOS in front of a text by itself."""
    post = data.get("post_processor")
    posts = post.get("processors", [post]) if isinstance(post, dict) else []
    bos = known.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    first = [p["single"][0] for p in posts if p.get("type") == "TemplateProcessing" and p.get("single")]
    return bos is not None and any(part.get("SpecialToken", {}).get("id") == bos for part in first)


def _prefixes(data: dict[str, Any]) -> bool:
    """Whether a sentencepiece tokenizer begins a text with a blank that it does not have."""
    normalizer, pre = data.get("normalizer") or {}, data.get("pre_tokenizer") or {}
    steps = [*normalizer.get("normalizers", [normalizer]), *pre.get("pretokenizers", [pre])]
    return any(
        step.get("type") == "Prepend"
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def _template(folder: Path, known: dict[str, Any]) -> Any:
    if (folder / "chat_template.jinja").exists():
        return inside(folder, "chat_template.jinja").read_text(encoding="utf-8")
    return known.get("chat_template")
