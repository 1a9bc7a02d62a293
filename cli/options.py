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


def speed_protocol(wanted: bool) -> SpeedProtocol | None:
    from ..eval.speed import SpeedProtocol

    return SpeedProtocol() if wanted else None
