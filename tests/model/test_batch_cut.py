"""A file of prompts whose run is cut off: what is on the disk by then, and that what failed is done with as well."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch

from brise.model.batch_file import Defaults, Journal, continue_file
from brise.model.checkpoint import load_model, load_tokenizer
from brise.model.generate import Generator

BROKEN = "z"
LINES = [
    "not json",
    *(
        json.dumps({"prompt": p, "max_new_tokens": n})
        for p, n in (("The wind", 5), (BROKEN, 5), ("a" * 200, 5))
    ),
    *(json.dumps({"prompt": p, "max_new_tokens": n}) for p, n in (("a", 9), ("sea", 2))),
]
ERRORS = [0, 2, 3]


@pytest.fixture(scope="module")
def tools(tiny_checkpoint):
    """A model whose logits behind one letter are not finite."""
    model, tokenizer = load_model(tiny_checkpoint), load_tokenizer(tiny_checkpoint)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer(BROKEN)["input_ids"]] = float("nan")
    return model, tokenizer


class Cut(Exception):
    pass


def cut_after(count):
    def progress(_, done, total):
        assert total == len(LINES)
        if done == count:
            raise Cut

    return progress


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("rows", [1, 3])
def test_cut_off_again_and_again_every_line_is_done_once(tools, tmp_path, monkeypatch, rows):
    """What failed too; and each time the end of the journal is half a line."""
    source, target, part = (tmp_path / name for name in ("in", "out", "out.part"))
    source.write_text("\n".join(LINES))

    def run(target, **options):
        generator = Generator(*tools, batch_size=rows, batch_invariant=True)
        return continue_file(generator, source, target, Defaults(), **options)

    whole = run(tmp_path / "whole")
    assert [i for i, result in enumerate(whole) if "error" in result] == ERRORS
    # those that are no prompts are done before the first text is
    for count in range(2, len(LINES)):
        with pytest.raises(Cut):
            run(target, progress=cut_after(count))
        assert len(lines_of(part)) == 1 + count and not target.exists()
        with part.open("a") as file:
            file.write('{"index": 3, "err')
    close = Journal.close
    monkeypatch.setattr(Journal, "close", lambda self, remove=False: close(self))
    assert run(target) == whole == lines_of(target)
    assert sorted(line["index"] for line in lines_of(part)[1:]) == list(range(len(LINES)))


def test_when_the_power_goes_what_was_done_is_there(tools, tmp_path, monkeypatch):
    """On a disk that keeps of a file, and of the names in a folder, what was there when it was last synced."""
    files, names, sync, replace = {}, {}, os.fsync, os.replace

    def fsync(descriptor):
        sync(descriptor)
        status = os.fstat(descriptor)
        there = {path.name: path for path in tmp_path.iterdir()}
        if stat.S_ISDIR(status.st_mode):
            names.clear()
            names.update({name: path.stat().st_ino for name, path in there.items()})
        else:
            (path,) = (path for path in there.values() if path.stat().st_ino == status.st_ino)
            files[status.st_ino] = path.read_bytes()

    def left(name):
        """A file's lines after the cut, None where there is no such name."""
        return files.get(names[name], b"").splitlines() if name in names else None

    def replaced(new, old):
        assert files[Path(new).stat().st_ino] == Path(new).read_bytes(), "a name for what may not be there"
        replace(new, old)

    def progress(_, done, total):
        assert left("out") is None and len(left("out.part")) == 1 + done

    def close(self, remove=False):
        if remove:
            assert b"".join(line + b"\n" for line in left("out")) == (tmp_path / "out").read_bytes()
        self._file.close()

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(Journal, "close", close)
    (tmp_path / "in").write_text("\n".join(LINES))
    continue_file(Generator(*tools), tmp_path / "in", tmp_path / "out", Defaults(), progress=progress)
    assert len(left("out")) == len(LINES)
