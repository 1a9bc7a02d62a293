"""The byte-pair tokenizer of a sentencepiece file (``tokenizer.model``), as tokenizer.json and its config.

Read by hand: the file is a protobuf of a few fields (sentencepiece, ``sentencepiece_model.proto``), and with them the
tokens come out as sentencepiece's own, runs of blanks and bytes outside the vocabulary included.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .safetensors_header import CheckpointError

# ModelProto.SentencePiece.Type
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


@dataclass(frozen=True)
class Piece:
    """One token: its text, its score (the higher the earlier it is merged), its kind."""

    text: str
    score: float
    kind: int


def read_pieces(data: bytes, where: str) -> list[Piece]:
    """The tokens of a sentencepiece model, in the order of their ids.

    Raises:
        CheckpointError: no sentencepiece model.
    """
    pieces = []
    try:
        for field, value in _fields(data):
            if field == 1 and isinstance(value, bytes):
                text, score, kind = "", 0.0, _NORMAL
                for inner, content in _fields(value):
                    if inner == 1 and isinstance(content, bytes):
                        text = content.decode("utf-8")
                    elif inner == 2 and isinstance(content, bytes):
                        (score,) = struct.unpack("<f", content)
                    elif inner == 3 and isinstance(content, int):
                        kind = content
                pieces.append(Piece(text, score, kind))
    except (IndexError, ValueError, struct.error) as error:
        raise CheckpointError(f"{where} is no sentencepiece model ({error}); fetch it again") from None
    if len({piece.text for piece in pieces}) != len(pieces) or not pieces:
        raise CheckpointError(f"{where} has {len(pieces)} tokens, not all of them distinct: it is damaged")
    return pieces


def save_tokenizer(model: Path, folder: Path, max_length: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` of the sentencepiece file ``model`` into ``folder``.

    A text begins with BOS, as Mistral's do.

    Args:
        max_length: positions of the model.
    Raises:
        CheckpointError: no sentencepiece model, or one of another kind than byte pairs with bytes to fall back on.
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    pieces = read_pieces(model.read_bytes(), str(model))
    kinds = [piece.kind for piece in pieces]
    if kinds.count(_BYTE) != 256 or kinds[:3] != [_UNKNOWN, _CONTROL, _CONTROL]:
        raise CheckpointError(
            f"{model} must have unk, bos and eos as its first tokens and 256 bytes, as Mistral's; "
            f"it has {kinds.count(_BYTE)} bytes"
        )
    unk, bos, eos = (piece.text for piece in pieces[:3])
    tokenizer = bare_tokenizer(pieces, unk)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in (unk, bos, eos)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def bare_tokenizer(pieces: list[Piece], unk: str | None, *, prefix: bool = True) -> Any:
    """A ``tokenizers.Tokenizer`` of byte pairs with bytes to fall back on, without special tokens.

    Args:
        unk: the token for what has no bytes either.
        prefix: whether a text begins with a blank that it does not have.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {piece.text: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges_of(pieces), unk_token=unk, fuse_unk=True, byte_fallback=True)
    )
    blanks = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), blanks]) if prefix else blanks
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def merges_of(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the token of the highest score first.

    Sentencepiece merges the neighbours whose union scores highest, whatever they are; so all pairs are listed.
    """
    ids = {piece.text: index for index, piece in enumerate(pieces) if piece.kind == _NORMAL}
    order = sorted(ids, key=lambda text: (-pieces[ids[text]].score, ids[text]))
    out = []
    for text in order:
        cuts = [(text[:i], text[i:]) for i in range(1, len(text))]
        out += sorted((c for c in cuts if c[0] in ids and c[1] in ids), key=lambda c: (ids[c[0]], ids[c[1]]))
    return out


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message; fixed-width values as their bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield field, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("cut short")
        yield field, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number without an end")
