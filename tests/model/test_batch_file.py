"""A file of prompts: in order, each alone to blame for its errors, and what is left of a run that was killed."""

import copy
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from brise.model import batch_file
from brise.model.batch_file import BatchError, Defaults, Journal, continue_file
from brise.model.checkpoint import load_model, load_tokenizer
from brise.model.generate import Generator, Request
from brise.model.prompts import encode_prompt
from brise.model.sampling import Sampling

PROMPTS = ["The wind", "a", "The wind is light and the sea is far", "breeze " * 5, "xyz", "Once upon"]


@pytest.fixture(scope="module")
def tools(tiny_checkpoint):
    return load_model(tiny_checkpoint), load_tokenizer(tiny_checkpoint)


@pytest.fixture
def source(tmp_path):
    lines = [
        json.dumps({"prompt": p, "id": f"p{i}", "max_new_tokens": 3 + 2 * i}) for i, p in enumerate(PROMPTS)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines[:3], "", *lines[3:]]) + "\n")
    return tmp_path / "in.jsonl"


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_results_come_in_order_each_as_it_is_alone(tools, source, tmp_path):
    model, tokenizer = tools
    generator = Generator(model, tokenizer, batch_size=2, batch_invariant=True)
    done = continue_file(generator, source, tmp_path / "out.jsonl", Defaults(stop=("\x07",)))
    assert lines_of(tmp_path / "out.jsonl") == done and not (tmp_path / "out.jsonl.part").exists()
    assert [d["id"] for d in done] == [f"p{i}" for i in range(6)] and [d["index"] for d in done] == list(
        range(6)
    )
    alone = Generator(model, tokenizer, batch_invariant=True)
    for i, (prompt, result) in enumerate(zip(PROMPTS, done)):
        request = Request(encode_prompt(tokenizer, prompt), 3 + 2 * i, stop=("\x07",))
        (wanted,) = alone.complete([request])
        assert (result["text"], result["new_tokens"], result["reason"]) == (
            wanted.text, len(wanted.tokens), wanted.reason,
        )  # fmt: skip
    with pytest.raises(BatchError, match="exists"):
        continue_file(generator, source, tmp_path / "out.jsonl", Defaults())
    continue_file(generator, source, tmp_path / "out.jsonl", Defaults(max_new_tokens=1), overwrite=True)


def test_a_line_that_is_wrong_harms_no_other(tools, tmp_path):
    model, tokenizer = tools
    wrong = {
        "not json": "Expecting value",
        '"text"': "expected an object",
        '{"promt": "a"}': "unknown key promt",
        '{"id": 7}': "a prompt or messages",
        '{"prompt": 3}': "must be a string, got int",
        '{"prompt": ""}': "no tokens",
        '{"prompt": "a", "max_new_tokens": 0}': "at least 1, got 0",
        '{"prompt": "a", "temperature": -1}': "temperature must be",
        '{"prompt": "a", "temperature": "hot"}': "temperature must be",
        '{"prompt": "a", "seed": 1.5}': "seed must be an integer",
        '{"prompt": "a", "top_k": 2.5}': "top_k must be an integer",
        '{"prompt": "a", "max_new_tokens": true}': "an integer, got True",
        '{"prompt": "a", "stop": null}': "a string or a list",
        '{"prompt": "a", "stop": ["b", ""]}': "not empty",
        '{"prompt": "a", "prompt": "b"}': "twice",
        '{"prompt": "a", "id": NaN}': "NaN is no JSON",
        '{"prompt": "a", "id": 1e999}': "not JSON compliant",
        '{"prompt": "\\ud800"}': "",
        "[" * 99999: "brackets",
        '{"messages": [{"role": "user", "content": "a"}]}': "no chat template",
        json.dumps({"prompt": "a" * 200}): "128 positions",
    }
    good = json.dumps({"prompt": "The wind", "max_new_tokens": 4})
    (tmp_path / "in").write_text("\n".join([good, *wrong, good]))
    done = continue_file(
        Generator(model, tokenizer, batch_size=2), tmp_path / "in", tmp_path / "out", Defaults()
    )
    assert len(done) == len(wrong) + 2 and done[0]["text"] == done[-1]["text"] and done[0]["new_tokens"] == 4
    for result, says in zip(done[1:-1], wrong.values()):
        assert says in result["error"] and "text" not in result
    assert done[4]["id"] == 7 and lines_of(tmp_path / "out") == done


def test_a_mark_before_the_first_line_and_names_that_are_no_text(tools, tmp_path):
    model, tokenizer = tools
    names = ['"é\U0001f32c"', r'"\ud800é"', "[1]", "0", '""']
    text = "\n".join(f'{{"prompt": "a", "max_new_tokens": 1, "id": {name}}}' for name in names)
    (tmp_path / "in").write_text("\ufeff" + text, encoding="utf-8")
    done = continue_file(Generator(model, tokenizer), tmp_path / "in", tmp_path / "out", Defaults())
    assert [d["id"] for d in done] == ["é\U0001f32c", "\ud800é", [1], 0, ""] and lines_of(
        tmp_path / "out"
    ) == done
    assert "é" in (tmp_path / "out").read_text(encoding="utf-8")


def test_a_conversation_within_a_conversation(tools, tmp_path):
    model, tokenizer = tools[0], copy.copy(tools[1])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}a"
    lines = ['{"messages": [[{"role": "user", "content": "a"}]]}', '{"prompt": "a", "max_new_tokens": 2}']
    (tmp_path / "in").write_text("\n".join(lines))
    done = continue_file(Generator(model, tokenizer), tmp_path / "in", tmp_path / "out", Defaults())
    assert "one conversation" in done[0]["error"] and done[1]["new_tokens"] == 2


def test_what_a_line_does_not_say_is_that_of_the_defaults(tools, tmp_path):
    model, tokenizer = tools
    lines = ['{"prompt": "The wind"}', '{"prompt": "The wind", "stop": [], "max_new_tokens": 5}']
    (tmp_path / "in").write_text("\n".join(lines))
    alone = Generator(model, tokenizer, eos=())
    (whole,) = alone.complete([Request(encode_prompt(tokenizer, "The wind"), 20)])
    stop = next(c for c in whole.text[2:] if c != "\N{REPLACEMENT CHARACTER}")
    defaults = Defaults(max_new_tokens=20, stop=(stop,))
    first, second = continue_file(alone, tmp_path / "in", tmp_path / "out", defaults)
    assert first["reason"] == "stop" and first["text"] == whole.text[: whole.text.index(stop)]
    assert (second["reason"], second["new_tokens"]) == ("length", 5)


def test_no_two_samples_are_alike(tools, tmp_path):
    model, tokenizer = tools
    (tmp_path / "in").write_text('{"prompt": "The wind"}\n' * 2 + '{"prompt": "The wind", "seed": 4}\n')
    defaults = Defaults(max_new_tokens=12, sampling=Sampling(1.5, seed=4))
    generator = Generator(model, tokenizer)
    done = continue_file(generator, tmp_path / "in", tmp_path / "out", defaults)
    prompt = encode_prompt(tokenizer, "The wind")
    wanted = generator.complete([Request(prompt, 12, Sampling(1.5, seed=seed)) for seed in (4, 5, 4)])
    assert [d["text"] for d in done] == [c.text for c in wanted] and done[0]["text"] != done[1]["text"]


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.5, seed=4)], ids=["greedy", "sampled"]
)
def test_a_run_that_was_cut_off_is_taken_up_where_it_was(tools, source, tmp_path, sampling, monkeypatch):
    model, tokenizer = tools
    defaults = Defaults(sampling=sampling)
    new = lambda: Generator(model, tokenizer, batch_size=2, batch_invariant=True)  # noqa: E731
    whole = continue_file(new(), source, tmp_path / "whole", defaults)
    add = Journal.add
    for cut in (0, 1, 3, 5):
        left = [cut]

        def failing(self, result, left=left):
            if left[0] == 0:
                raise Stopped
            left[0] -= 1
            add(self, result)

        monkeypatch.setattr(Journal, "add", failing)
        with pytest.raises(Stopped):
            continue_file(new(), source, tmp_path / "out", defaults)
        monkeypatch.setattr(Journal, "add", add)
        assert not (tmp_path / "out").exists()
        part = tmp_path / "out.part"
        assert len(lines_of(part)) == cut + 1
        with part.open("a") as file:
            file.write('{"index": 5, "te')  # a line that the kill cut in two
        written = []

        def counting(self, result, written=written):
            written.append(result["index"])
            add(self, result)

        monkeypatch.setattr(Journal, "add", counting)
        assert continue_file(new(), source, tmp_path / "out", defaults) == whole
        monkeypatch.setattr(Journal, "add", add)
        assert len(written) == 6 - cut and lines_of(tmp_path / "out") == whole and not part.exists()
        (tmp_path / "out").unlink()


def test_a_journal_of_another_run_is_refused(tools, source, tmp_path):
    model, tokenizer = tools
    generator = Generator(model, tokenizer)
    journal = Journal(tmp_path / "out.part", "another")
    with pytest.raises(BatchError, match="another run is writing"):
        continue_file(generator, source, tmp_path / "out", Defaults())
    journal.close()
    with pytest.raises(BatchError, match="file of the prompts"):
        continue_file(generator, source, source, Defaults(), overwrite=True)
    with pytest.raises(BatchError, match="other prompts, another model or other settings"):
        continue_file(generator, source, tmp_path / "out", Defaults())
    (tmp_path / "out.part").write_text("[]\n")
    with pytest.raises(BatchError, match="damaged"):
        continue_file(generator, source, tmp_path / "out", Defaults())


def test_killed_between_the_output_and_the_end_of_its_journal(tools, source, tmp_path, monkeypatch):
    model, tokenizer = tools
    monkeypatch.setattr(Journal, "close", lambda self, remove=False: self._file.close())
    done = continue_file(Generator(model, tokenizer, batch_size=3), source, tmp_path / "out", Defaults())
    monkeypatch.undo()
    assert (tmp_path / "out.part").exists()
    monkeypatch.setattr(batch_file, "_result", lambda *_: pytest.fail("was done before"))
    assert (
        continue_file(Generator(model, tokenizer, batch_size=3), source, tmp_path / "out", Defaults()) == done
    )
    assert not (tmp_path / "out.part").exists()


@pytest.mark.parametrize("moment", ["before the lock", "before the file"])
def test_a_run_that_ends_while_another_begins(tools, source, tmp_path, monkeypatch, moment):
    model, tokenizer = tools
    target = tmp_path / "out"
    run = lambda: continue_file(Generator(model, tokenizer, batch_size=3), source, target, Defaults())  # noqa: E731
    lock, read, done = Journal._lock, type(source).read_text, []

    def other(*_):
        monkeypatch.setattr(Journal, "_lock", lock)
        monkeypatch.setattr(type(source), "read_text", read)
        done.extend(run())

    if moment == "before the lock":
        monkeypatch.setattr(Journal, "_lock", lambda self: (other(), lock(self)))
    else:
        monkeypatch.setattr(type(source), "read_text", lambda *a, **k: (other(), read(*a, **k))[1])
    with pytest.raises(BatchError, match="just finished" if moment == "before the lock" else "exists"):
        run()
    assert lines_of(target) == done and len(done) == 6 and not (tmp_path / "out.part").exists()


KILLED = """
import os, signal, sys
from brise.model import batch_file
from brise.model.batch_file import Defaults, Journal, continue_file
from brise.model.checkpoint import load_model, load_tokenizer
from brise.model.generate import Generator
folder, source, target = sys.argv[1:]
add = Journal.add
def killing(self, result, done=[]):
    add(self, result)
    done.append(1)
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.add = killing
continue_file(Generator(load_model(folder), load_tokenizer(folder), batch_size=2), source, target, Defaults())
"""


def test_sigkill_loses_nothing_and_doubles_nothing(tools, tiny_checkpoint, source, tmp_path):
    target = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(tiny_checkpoint), str(source), str(target)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    assert subprocess.run(command, timeout=120, env=environment).returncode == -signal.SIGKILL
    assert not target.exists() and len(lines_of(tmp_path / "out.part")) == 3
    model, tokenizer = tools
    generator = Generator(model, tokenizer, batch_size=2)
    done = continue_file(generator, source, target, Defaults())
    assert [d["index"] for d in lines_of(target)] == list(range(6)) and lines_of(target) == done
    assert generator.counts.tokens < sum(d["new_tokens"] for d in done)
    assert done == continue_file(
        Generator(model, tokenizer, batch_size=2), source, tmp_path / "again", Defaults()
    )
