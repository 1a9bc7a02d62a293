"""``brise chat``: a conversation with a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from .decoding import (
    Drafts,
    Int8Cache,
    MinP,
    Penalty,
    Seed,
    Speculate,
    Temperature,
    Tokens,
    TopK,
    TopP,
    generator_of,
    sampling_of,
    tokenizer_of,
)
from .options import Device, DtypeOption
from .session import Debug, Json, session_of
from .sources import SRC_HELP

EPILOG = """
[bold]brise chat build/nf4 --temperature 0.7[/bold]

[bold]echo "Why is the sky blue?" | brise chat smollm2-135m --system "Answer in one sentence."[/bold]
"""


def chat(
    ctx: typer.Context,
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help=SRC_HELP)],
    system: Annotated[str | None, typer.Option("--system", help="What the model is told beforehand.")] = None,
    max_new_tokens: Tokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    speculate: Speculate = None,
    drafts: Drafts = 5,
    int8_cache: Int8Cache = False,
    dtype: DtypeOption = None,
    device: Device = "cpu",
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Talk with a model that has a chat template: a line from stdin, an answer on stdout, and so on.

    /reset begins a new conversation; /quit or the end of the input ends it. What no longer fits the model is left out
    of the conversation, and the exit code is 1.
    """
    session = session_of(ctx)
    sampling = sampling_of(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    tokenizer = tokenizer_of(checkpoint, session, chat=True)

    from ..model.generate import Request, RequestError
    from ..model.prompts import encode_messages

    generator = generator_of(
        checkpoint,
        tokenizer,
        session,
        dtype=dtype,
        device=device,
        speculate=speculate,
        drafts=drafts,
        int8_cache=int8_cache,
    )
    beginning = [] if system is None else [{"role": "system", "content": system}]
    messages = list(beginning)
    failed = False
    for line in _lines():
        if line == "/reset":
            messages = list(beginning)
            continue
        asked = [*messages, {"role": "user", "content": line}]
        request = Request(encode_messages(tokenizer, asked), max_new_tokens, sampling)
        try:
            request.check(generator.model.vocab, generator.positions)
        except RequestError as error:
            session.note(f"brise: {error}; /reset begins a new conversation")
            failed = True
            continue
        done = None
        for event in generator.stream([request]):
            print(event.text, end="", flush=True)
            done = event.completion
        assert done is not None, "a stream ends with a completion"
        print(flush=True)  # whoever reads line by line asks only then
        if done.error is not None:
            raise FloatingPointError(done.error)
        messages = [*asked, {"role": "assistant", "content": done.text or ""}]
    session.finish({"messages": messages}, lambda console: None)
    if failed:
        raise typer.Exit(1)


def _lines() -> Iterator[str]:
    """What is asked, a line each, without those that are empty."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if line.strip():
            yield line.strip()
