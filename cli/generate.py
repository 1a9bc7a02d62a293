"""``brise generate``: text from a checkpoint, as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .options import Device, Dtype, torch_dtype
from .session import Debug, Json, session_of
from .sources import SRC_HELP, resolve

EPILOG = """
[bold]brise generate build/nf4 --prompt "The capital of France is"[/bold]

[bold]brise generate build/nf4 --chat --prompt "Why is the sky blue?" --temperature 0.7[/bold]
"""


class Streamer:
    """Prints tokens as transformers' ``generate`` hands them over, whole characters only.

    A token may end in the middle of a UTF-8 character, and may be decoded in another way when it is alone: so
    all of the text is decoded each time, and what is new of it is printed once its last character is whole.
    """

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], None]) -> None:
        self.ids: list[int] = []
        self.text = ""
        self._decode = decode
        self._write = write
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """Token ids int64 [1, T] (the prompt, once) or [1]."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        text = self._decode(self.ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._print(text)

    def end(self) -> None:
        self._print(self._decode(self.ids))

    def _print(self, text: str) -> None:
        self._write(text[len(self.text) :])
        self.text = text


def generate(
    ctx: typer.Context,
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help=SRC_HELP)],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 128,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from this share of probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Of the computation; the default is the checkpoint's own.")
    ] = None,
    device: Device = "cpu",
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt, and print the text as it comes."""
    session = session_of(ctx)
    folder = resolve(checkpoint, session)

    import torch

    from ..model.checkpoint import load_model, load_tokenizer

    # transformers types what these two take and give by every modality and mixin there is
    tokenizer: Any = load_tokenizer(folder)
    if chat and not tokenizer.chat_template:
        raise ValueError(f"{checkpoint} has no chat template; leave out --chat")
    if chat:
        message = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    if encoded["input_ids"].shape[1] == 0:
        raise ValueError("the prompt has no tokens, and the tokenizer puts none before it; give a longer one")
    model: Any = load_model(folder, dtype=torch_dtype(dtype), device=device)
    streamer = Streamer(
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        lambda text: print(text, end="", flush=True),
    )
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p}
        if temperature
        else {"do_sample": False}
    )
    torch.manual_seed(seed)
    begin = time.perf_counter()
    model.generate(
        input_ids=encoded["input_ids"].to(device),
        attention_mask=encoded["attention_mask"].to(device),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=streamer,
        **sampling,
    )
    seconds = time.perf_counter() - begin
    print()
    count = len(streamer.ids)
    session.note(
        f"{count} tokens in {seconds:.1f} s, reading the prompt included: {count / seconds:.1f} a second"
    )
    document = {
        "prompt": prompt,
        "text": streamer.text,
        "prompt_tokens": encoded["input_ids"].shape[1],
        "new_tokens": count,
        "seconds": seconds,
        "tokens_per_second": count / seconds,
    }
    # the text was printed as it came
    session.finish(document, lambda console: None)


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(generate)
