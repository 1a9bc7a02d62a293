"""Options and set-up that ``brise generate`` and ``brise chat`` share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .session import Session
from .sources import resolve

if TYPE_CHECKING:
    from ..model.generate import Generator
    from ..model.sampling import Sampling
    from .options import Dtype

Tokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to write at most.")]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token each time.")
]
TopK = Annotated[
    int | None, typer.Option("--top-k", min=1, help="Sample from so many of the likeliest tokens.")
]
TopP = Annotated[
    float, typer.Option("--top-p", min=0.0, max=1.0, help="Sample from this share of probability.")
]
MinP = Annotated[
    float,
    typer.Option(
        "--min-p", min=0.0, max=1.0, help="Leave out what is less likely than this, beside the likeliest."
    ),
]
Penalty = Annotated[
    float,
    typer.Option("--repetition-penalty", help="Above 1 makes tokens that were there already less likely."),
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="End the text before this; may be repeated."),
]
Seed = Annotated[int, typer.Option("--seed", help="Of the sampling.")]
Int8Cache = Annotated[bool, typer.Option("--int8-cache", help="Keep keys and values as int8.")]
Speculate = Annotated[
    str | None,
    typer.Option(
        "--speculate",
        metavar="HOW",
        help="Guess ahead: 'lookup' in the text itself, or a checkpoint of a smaller model with the same vocabulary.",
    ),
]
Drafts = Annotated[int, typer.Option("--drafts", min=1, help="Tokens that --speculate guesses at a time.")]


def sampling_of(
    temperature: float, top_k: int | None, top_p: float, min_p: float, penalty: float, seed: int
) -> Sampling:
    from ..model.sampling import Sampling

    return Sampling(temperature, top_k, top_p, min_p, penalty, seed)


def tokenizer_of(checkpoint: str, session: Session, chat: bool) -> Any:
    """The tokenizer of a checkpoint, which has a chat template where one is wanted."""
    from ..model.checkpoint import load_tokenizer

    # transformers types what tokenizers take and give by every modality there is
    tokenizer: Any = load_tokenizer(resolve(checkpoint, session))
    if chat and not tokenizer.chat_template:
        raise ValueError(f"{checkpoint} has no chat template; leave out --chat")
    return tokenizer


def generator_of(
    checkpoint: str,
    tokenizer: Any,
    session: Session,
    *,
    dtype: Dtype | None,
    device: str,
    speculate: str | None,
    drafts: int,
    **options: Any,
) -> Generator:
    """The model of a checkpoint, ready to go on from prompts; ``options`` are those of the Generator."""
    from ..model.checkpoint import load_model
    from ..model.generate import Generator
    from ..model.speculative import DraftModel, PromptLookup, Proposer
    from .options import torch_dtype

    kind = torch_dtype(dtype)
    proposer: Proposer | None = None
    if speculate == "lookup":
        proposer = PromptLookup(drafts)
    elif speculate is not None:
        proposer = DraftModel(load_model(resolve(speculate, session), dtype=kind, device=device), drafts)
    model = load_model(resolve(checkpoint, session), dtype=kind, device=device)
    return Generator(model, tokenizer, proposer=proposer, **options)
