"""``brise generate`` with a file, drafts and stop strings, and ``brise chat``."""

import json
import os
import shutil

import pytest
from typer.testing import CliRunner

from brise.cli.main import app
from brise.model import batch_file

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


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
    result = invoke(*args, input="hello\n" + "a" * 200 + "\n/reset\nhello\n", code=1)
    assert result.stderr.count("128 positions") == 1 and "/reset" in result.stderr
    *_, line = result.stdout.splitlines()
    assert json.loads(line)["messages"] == document(*args[:-1], input="hello\n")["messages"]
