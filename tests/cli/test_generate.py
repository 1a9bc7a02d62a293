"""``brise generate`` with a file, drafts and stop strings, and ``brise chat``."""

import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from brise.cli.main import app
from brise.model import batch_file, generate
from brise.model.checkpoint import load_model, load_tokenizer
from brise.model.generate import Generator, Request
from brise.model.prompts import encode_prompt
from brise.model.sampling import Sampling
from brise.model.speculative import DraftModel, PromptLookup

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def invoke(*args, code=0, **kwargs):
    result = CliRunner().invoke(app, [str(a) for a in args], **kwargs)
    assert result.exit_code == code, result.output
    return result


def document(*args, **kwargs):
    return json.loads(invoke(*args, "--json", **kwargs).stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def talker(tiny_checkpoint, tmp_path_factory):
    """The tiny model with a chat template."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("talker") / "model")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TEMPLATE}))
    return folder


def test_a_file_of_prompts_becomes_a_file_of_texts(tiny_checkpoint, tmp_path):
    prompts = ["The wind", "a breeze", "x"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    args = ["generate", tiny_checkpoint, "--max-new-tokens", 6]
    files = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--batch-size", 2]
    assert invoke(*args, *files, "--batch-invariant").stdout == f"{tmp_path / 'out.jsonl'}\n"
    done = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for prompt, result in zip(prompts, done, strict=True):
        assert result["text"] == document(*args, "--prompt", prompt, "--batch-invariant")["text"]
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    result = invoke(*args, *files, "--overwrite", "--json", code=1)
    said = json.loads(result.stdout.splitlines()[-1])
    assert (said["prompts"], said["errors"], said["new_tokens"]) == (
        2,
        1,
        6,
    ) and "1 of 2 prompts" in result.stderr


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_file_of_prompts_goes_on_with_the_model_that_it_began_with(talker, tmp_path, monkeypatch, file):
    """The same folder is another model when another was written into it."""
    (tmp_path / "in").write_text('{"prompt": "a"}')
    args = ["generate", talker, "--max-new-tokens", 2, "--input", tmp_path / "in", "--output", talker / "out"]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(batch_file, "_write_whole", interrupted)
        assert "the same command goes on" in invoke(*args, code=130).stderr
    status = (talker / file).stat()
    os.utime(talker / file, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    assert "another model" in invoke(*args, code=1).stderr and not (talker / "out").exists()
    os.utime(talker / file, ns=(status.st_atime_ns, status.st_mtime_ns))
    invoke(*args)
    (talker / "out").unlink()


def test_drafts_and_a_quantized_cache_and_stop_strings(tiny_checkpoint):
    args = ["generate", tiny_checkpoint, "--prompt", "The wind", "--max-new-tokens", 20]
    plain = document(*args)
    assert plain["acceptance"] is None and plain["reason"] == "length"
    for how in ("lookup", tiny_checkpoint):
        drafted = document(*args, "--speculate", how, "--drafts", 3)
        assert drafted["text"] == plain["text"]
    assert drafted["acceptance"] == 1
    assert document(*args, "--int8-cache")["new_tokens"] == 20
    stop = plain["text"][4:6]
    stopped = document(*args, "--stop", stop)
    assert stopped["reason"] == "stop" and stopped["text"] == plain["text"][: plain["text"].index(stop)]


def test_chat_remembers_what_was_said(talker):
    args = ["chat", talker, "--max-new-tokens", 5]
    result = invoke(*args, input="hello\n\nagain\n/quit\nnever\n")
    said = document(*args, "--system", "be brief", input="hello\nagain\n/reset\nhello\n")["messages"]
    assert [m["role"] for m in said] == ["system", "user", "assistant"] and said[1]["content"] == "hello"
    talk = document(*args, input="hello\nagain\n")["messages"]
    assert [m["role"] for m in talk] == ["user", "assistant"] * 2
    assert result.stdout == "".join(f"{m['content']}\n" for m in talk if m["role"] == "assistant")
    prompt = f"<user>hello<assistant>{talk[1]['content']}<user>again<assistant>"
    again = document("generate", talker, "--prompt", prompt, "--max-new-tokens", 5)
    # what is decoded and encoded again may be other tokens, where bytes were no character
    if "\N{REPLACEMENT CHARACTER}" not in prompt:
        assert again["text"] == talk[3]["content"]


def test_a_conversation_that_is_too_long_says_what_to_do_and_waits_for_it(talker):
    args = ["chat", talker, "--max-new-tokens", 5, "--json"]
    for rest in ("again\n", "/reset\nhello\n"):
        result = invoke(*args, input="hello\n" + "a" * 200 + "\n" + rest, code=1)
        assert result.stderr.count("128 positions") == 1 and "/reset" in result.stderr
        *_, line = result.stdout.splitlines()
        assert json.loads(line)["messages"] == document(*args[:-1], input="hello\n" + rest)["messages"]


SAMPLINGS = {
    "--temperature 1.5": Sampling(1.5),
    "--temperature 1.5 --seed 3": Sampling(1.5, seed=3),
    "--temperature 1.5 --seed 3 --top-k 4": Sampling(1.5, top_k=4, seed=3),
    "--temperature 2.5 --seed 3 --top-p 0.6": Sampling(2.5, top_p=0.6, seed=3),
    "--temperature 2.5 --seed 3 --min-p 0.6": Sampling(2.5, min_p=0.6, seed=3),
    "--repetition-penalty 3": Sampling(repetition_penalty=3.0),
}
TALK = "<user>hello<assistant>"


def test_what_is_said_of_sampling_is_done(talker, tmp_path):
    """By each way in which the command takes prompts, as the library does it."""
    tokenizer = load_tokenizer(talker)
    generator = Generator(load_model(talker), tokenizer)
    (tmp_path / "in").write_text('{"prompt": "hello"}')
    texts = []
    for said, sampling in SAMPLINGS.items():
        args = [*said.split(), "--max-new-tokens", 15]
        (wanted,) = generator.complete([Request(encode_prompt(tokenizer, TALK), 15, sampling)])
        texts.append(wanted.text)
        assert document("generate", talker, "--chat", "--prompt", "hello", *args)["text"] == wanted.text
        assert document("generate", talker, "--prompt", TALK, *args)["text"] == wanted.text
        assert document("chat", talker, *args, input="hello\n")["messages"][-1]["content"] == wanted.text
        files = ["--input", tmp_path / "in", "--output", tmp_path / "out", "--overwrite"]
        invoke("generate", talker, "--chat", *files, *args)
        assert json.loads((tmp_path / "out").read_text())["text"] == wanted.text
    assert len(set(texts)) == len(texts)


@pytest.fixture
def made(monkeypatch):
    """The generators that a command makes; each sees to it that what has come was printed before it goes on."""
    found = []

    class Watched(Generator):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            found.append(self)

        def stream(self, requests, **options):
            text = sys.stdout.buffer.getvalue()
            for event in super().stream(requests, **options):
                yield event
                text += event.text.encode()
                assert sys.stdout.buffer.getvalue() == text
                self.printed = text

    monkeypatch.setattr(generate, "Generator", Watched)
    return found


def test_the_text_is_printed_as_it_comes(talker, made):
    said = invoke("generate", talker, "--prompt", "The wind", "--max-new-tokens", 20).stdout
    assert made.pop().printed.decode() == said[:-1] and len(said) > 10
    said = invoke("chat", talker, "--max-new-tokens", 20, input="hello\nagain\n").stdout
    assert made.pop().printed.decode() == said[:-1] and len(said) > 20


def test_what_is_said_of_the_runtime_is_done(talker, tmp_path, made, monkeypatch):
    monkeypatch.setattr(generate.Generator, "stream", Generator.stream)
    options = ["--int8-cache", "--max-new-tokens", 3, "--drafts", 2, "--dtype", "bfloat16"]
    (tmp_path / "in").write_text('{"prompt": "hello"}\n' * 4)
    files = ["--input", tmp_path / "in", "--output", tmp_path / "out", "--batch-size", 3, "--batch-invariant"]
    for args, kind in (
        (["generate", *files, "--speculate", "lookup"], PromptLookup),
        (["generate", "--prompt", "a", "--batch-invariant", "--speculate", talker], DraftModel),
        (["chat", "--speculate", "lookup"], PromptLookup),
    ):
        invoke(args[0], talker, *args[1:], *options, input="hello\n")
        generator = made.pop()
        assert generator.batch_size == (3 if "--batch-size" in args else 1)
        assert generator.model.invariant == ("--batch-invariant" in args)
        assert type(generator.proposer) is kind and generator.proposer.drafts == 2
        ring = generator._engine.cache.layers[0]
        assert ring.keys.dtype == torch.int8 and generator.model.dtype == torch.bfloat16


def test_a_checkpoint_that_is_broken_is_an_error_and_no_text(talker, tmp_path):
    folder = shutil.copytree(talker, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for command in (["generate", folder, "--prompt", "a"], ["chat", folder]):
        result = invoke(*command, input="a\n", code=1)
        assert "logits are not finite" in result.stderr and result.stdout == "\n"
    (tmp_path / "in").write_text('{"prompt": "a"}')
    invoke("generate", folder, "--input", tmp_path / "in", "--output", tmp_path / "out", code=1)
    (done,) = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert "logits are not finite" in done["error"] and "text" not in done
