"""Options that several commands share: how a model is measured."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from ..eval.speed import SpeedProtocol


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Bos(StrEnum):
    auto = "auto"
    always = "always"
    never = "never"


EvalText = Annotated[
    str,
    typer.Option(
        "--text", help="What to score: boolq, wikitext2, a UTF-8 file or hub:NAME:CONFIG:SPLIT:COLUMN."
    ),
]
EvalWindows = Annotated[
    int, typer.Option("--windows", min=0, help="Windows to score; 0 takes the whole text.")
]
ScoredText = Annotated[
    str | None,
    typer.Option(
        "--text",
        help="What to score: boolq, wikitext2, a UTF-8 file or hub:NAME:CONFIG:SPLIT:COLUMN; the default is boolq, "
        "or a named protocol's own.",
    ),
]
ProtocolName = Annotated[
    str,
    typer.Option(
        "--protocol",
        help="gptq-2048, stride-512, llamacpp-512 or lmeval-word; free takes the options below.",
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        metavar="NAME[:LIMIT]",
        help="Of lm-eval, its first LIMIT items; names in _offline need no hub. May be given more than once.",
    ),
]
Batches = Annotated[str, typer.Option(metavar="1,8", help="Batches of a grid of speeds; none by default.")]
Contexts = Annotated[str, typer.Option(metavar="128,2048", help="Contexts of that grid, in tokens.")]
WindowCount = Annotated[
    int | None,
    typer.Option(
        "--windows",
        min=0,
        help="Windows to score; 0 takes the whole text, and so does a named protocol by default; else 16.",
    ),
]
EvalLength = Annotated[int, typer.Option("--length", min=2, help="Tokens of a window.")]
Stride = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens between two windows' starts; the default leaves no overlap."),
]
BosOption = Annotated[
    Bos, typer.Option("--bos", help="BOS before every window; auto does what the tokenizer does.")
]
Batch = Annotated[int, typer.Option(min=1, help="Windows of a forward pass.")]
DtypeOption = Annotated[
    Dtype | None, typer.Option("--dtype", help="Of the computation; the default is the checkpoint's own.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
TimeIt = Annotated[bool, typer.Option("--speed/--no-speed", help="Time prefill and decode, or do not.")]
Seed = Annotated[int, typer.Option(help="Of everything random in the measurement.")]


def torch_dtype(dtype: Dtype | None) -> torch.dtype | None:
    import torch

    chosen: torch.dtype | None = None if dtype is None else getattr(torch, dtype.value)
    return chosen


def numbers(text: str) -> tuple[int, ...]:
    """``"1,8"`` as numbers; an empty text is none.

    Raises:
        ValueError: anything but positive whole numbers with commas between.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"expected positive numbers with commas between, got {text!r}")
    return tuple(int(part) for part in parts)


def window_count(wanted: int | None, protocol: str) -> int | None:
    """Windows to score, None for all: what a protocol's name promises is its figure on the whole text."""
    if wanted is None:
        return 16 if protocol == "free" else None
    return wanted or None


def speed_protocol(wanted: bool) -> SpeedProtocol | None:
    from ..eval.speed import SpeedProtocol

    return SpeedProtocol() if wanted else None
