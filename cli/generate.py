"""``brise generate``: text from a checkpoint, as it comes; or a file of prompts into a file of texts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .chat import EPILOG as CHAT_EPILOG
from .chat import chat as chat_
from .decoding import (
    Drafts,
    Int8Cache,
    MinP,
    Penalty,
    Seed,
    Speculate,
    Stop,
    Temperature,
    Tokens,
    TopK,
    TopP,
    generator_of,
    sampling_of,
    tokenizer_of,
)
from .options import Device, DtypeOption
from .session import Debug, Json, Session, session_of
from .sources import SRC_HELP, resolve

if TYPE_CHECKING:
    from ..model.batch_file import Defaults
    from ..model.generate import Generator, Request

EPILOG = """
[bold]brise generate build/nf4 --prompt "The capital of France is"[/bold]

[bold]brise generate build/nf4 --chat --prompt "Why is the sky blue?" --temperature 0.7[/bold]

[bold]brise generate build/nf4 --input prompts.jsonl --output out.jsonl --batch-size 8[/bold]
"""


def generate(
    ctx: typer.Context,
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help=SRC_HELP)],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What to continue.")] = None,
    max_new_tokens: Tokens = 128,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    stop: Stop = None,
    seed: Seed = 0,
    input_: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="FILE",
            help='JSON lines with a "prompt" or "messages" each, and options of their own if need be.',
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="For --input: JSON lines in the same order."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="For --input: prompts at once.")] = 8,
    batch_invariant: Annotated[
        bool,
        typer.Option("--batch-invariant", help="Give each prompt, to the bit, what it gives alone; slower."),
    ] = False,
    speculate: Speculate = None,
    drafts: Drafts = 5,
    int8_cache: Int8Cache = False,
    dtype: DtypeOption = None,
    device: Device = "cpu",
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt, and print the text as it comes; or continue a file of prompts.

    With --input a run that was killed is taken up again by repeating it: nothing is lost, nothing done twice.
    """
    session = session_of(ctx)
    if (prompt is None) == (input_ is None):
        raise ValueError("give either --prompt or --input")
    if (input_ is None) != (output is None):
        raise ValueError("--input and --output go together")

    from ..model.batch_file import Defaults
    from ..model.identity import files_of

    sampling = sampling_of(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    tokenizer = tokenizer_of(checkpoint, session, chat)
    defaults = Defaults(max_new_tokens, sampling, tuple(stop or ()), chat)
    request = None if prompt is None else _request(tokenizer, prompt, defaults)
    generator = generator_of(
        checkpoint,
        tokenizer,
        session,
        dtype=dtype,
        device=device,
        speculate=speculate,
        drafts=drafts,
        batch_size=1 if input_ is None else batch_size,
        batch_invariant=batch_invariant,
        int8_cache=int8_cache,
    )
    if request is not None:
        assert prompt is not None, "a request is made of a prompt"
        _one(session, generator, prompt, request)
        return
    assert input_ is not None and output is not None, "checked above"
    identity = {
        "model": files_of(resolve(checkpoint, session)),
        "dtype": str(generator.model.dtype),
        "int8_cache": int8_cache,
        "batch_invariant": batch_invariant,
    }
    _file(session, generator, input_, output, defaults, identity, overwrite)


def _request(tokenizer: Any, prompt: str, defaults: Defaults) -> Request:
    from ..model.generate import Request, RequestError
    from ..model.prompts import encode_messages, encode_prompt

    if defaults.chat:
        tokens = encode_messages(tokenizer, [{"role": "user", "content": prompt}])
    else:
        tokens = encode_prompt(tokenizer, prompt)
    if not tokens:
        raise RequestError(
            "the prompt has no tokens, and the tokenizer puts none before it; give a longer one"
        )
    return Request(tokens, defaults.max_new_tokens, defaults.sampling, defaults.stop)


def _one(session: Session, generator: Generator, prompt: str, request: Request) -> None:
    request.check(generator.model.vocab, generator.positions)
    begin = time.perf_counter()
    first = done = None
    for event in generator.stream([request]):
        first = first or time.perf_counter()
        print(event.text, end="", flush=True)
        done = event.completion
    assert done is not None and first is not None, "a stream ends with a completion"
    seconds = time.perf_counter() - begin
    print()
    if done.error is not None:
        raise FloatingPointError(done.error)
    count, acceptance = len(done.tokens), generator.counts.acceptance
    guessed = (
        "" if acceptance is None else f"; {acceptance:.0%} of {generator.counts.proposed} drafts were right"
    )
    session.note(
        f"{count} tokens in {seconds:.1f} s, the first after {first - begin:.1f} s: {count / seconds:.1f} a second"
        + guessed
    )
    document = {
        "prompt": prompt,
        "text": done.text,
        "reason": done.reason,
        "prompt_tokens": done.prompt_tokens,
        "new_tokens": count,
        "seconds": seconds,
        "seconds_to_first_token": first - begin,
        "tokens_per_second": count / seconds,
        "acceptance": acceptance,
    }
    # the text was printed as it came
    session.finish(document, lambda console: None)


def _file(
    session: Session,
    generator: Generator,
    source: Path,
    target: Path,
    defaults: Defaults,
    identity: dict[str, Any],
    overwrite: bool,
) -> None:
    from ..model.batch_file import continue_file

    begin = time.perf_counter()
    session.last_words = "interrupted; the same command goes on with the prompts that are left"
    with session.progress() as bars:
        results = continue_file(
            generator, source, target, defaults, identity=identity, overwrite=overwrite, progress=bars
        )
    seconds = time.perf_counter() - begin
    errors = sum("error" in result for result in results)
    document = {
        "output": str(target),
        "prompts": len(results),
        "errors": errors,
        "new_tokens": generator.counts.tokens,
        "seconds": seconds,
        "tokens_per_second": generator.counts.tokens / seconds,
        "acceptance": generator.counts.acceptance,
    }
    if errors:
        session.note(f"brise: {errors} of {len(results)} prompts have errors, see {target}")
    session.note(f"{generator.counts.tokens} tokens in {seconds:.1f} s")
    session.finish(document, lambda console: print(target))
    if errors:
        raise typer.Exit(1)


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(generate)
    app.command(epilog=CHAT_EPILOG)(chat_)
