"""The writer: bytes as safetensors has them, all or nothing at any moment, and nothing left lying about."""

import errno
import json
import os
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from brise.model import atomic
from brise.model.checkpoint import CheckpointError, CheckpointReader, CheckpointWriter

from .written import INDEX, siblings, state, tensors, write

# --- bytes


def test_a_file_is_what_safetensors_writes(tmp_path):
    """The oracle is its own writer: the same header and data; only the blanks after the header are ours."""
    write(tmp_path / "m")
    path = tmp_path / "oracle.safetensors"
    save_file({n: t.contiguous() for n, t in tensors().items()}, path, metadata={"format": "pt"})

    def parts(file):
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        return json.loads(data[8:end], object_pairs_hook=list), data[end:], end

    (ours, our_data, start), (theirs, their_data, _) = (
        parts(p) for p in (tmp_path / "m/model.safetensors", path)
    )
    assert ours == theirs and our_data == their_data
    assert start % 64 == 0
    with safe_open(tmp_path / "m/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors().items():
            assert file.get_tensor(name).float().equal(tensor.float())


def test_bytes_do_not_depend_on_when_or_in_which_order(tmp_path):
    write(tmp_path / "a")
    with CheckpointWriter(tmp_path / "b") as writer:
        for name, tensor in reversed(tensors().items()):
            writer.add(name, tensor)
        writer.finish({"fill": 1})
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_shards_and_index(tmp_path):
    out = write(tmp_path / "m", max_shard_bytes=200)
    index = json.loads((out / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    count = len(shards)
    assert count > 2
    assert shards == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert sorted(p.name for p in out.iterdir()) == sorted([*shards, INDEX, "config.json"])
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors().values())
    for shard in shards:
        with safe_open(out / shard, "pt") as file:
            names = list(file.keys())
            assert all(index["weight_map"][n] == shard for n in names)
            assert len(names) == 1 or sum(tensors()[n].nbytes for n in names) <= 200
    assert state(out) == 1


def test_exactly_full_is_one_shard(tmp_path):
    total = sum(t.nbytes for t in tensors().values())
    assert not (write(tmp_path / "a", max_shard_bytes=total) / INDEX).exists()
    assert (write(tmp_path / "b", max_shard_bytes=total - 1) / INDEX).exists()


def test_files_are_readable_as_the_umask_says(tmp_path):
    old = os.umask(0o022)
    try:
        out = write(tmp_path / "m")
    finally:
        os.umask(old)
    assert stat.S_IMODE(out.stat().st_mode) == 0o755
    assert {stat.S_IMODE(p.stat().st_mode) for p in out.iterdir()} == {0o644}


# --- what goes along


def test_companions(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "NOTICE.txt", "generation_config.json"):
        (source / name).write_text(name)
    for name in (
        "README.md",
        "model.safetensors",
        "modeling.py",
        "config.json",
        "pytorch_model.bin",
        "x.json",
    ):
        (source / name).write_text("not to be copied")
    out = write(
        tmp_path / "m",
        copy_from=source,
        config={"auto_map": {"AutoModel": "modeling.M"}, "fill": 1},
        extra={"quantization_report.json": "{}\n", "generation_config.json": "ours"},
    )
    assert json.loads((out / "config.json").read_text()) == {"fill": 1}
    assert (out / "generation_config.json").read_text() == "ours"
    assert sorted(p.name for p in out.iterdir()) == [
        "LICENSE",
        "NOTICE.txt",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "quantization_report.json",
        "tokenizer.json",
    ]
    assert (out / "tokenizer.json").read_text() == "tokenizer.json"


def test_a_companion_that_links_elsewhere_is_refused(tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link that leads out"):
        write(tmp_path / "m", copy_from=tmp_path / "source")
    assert siblings(tmp_path / "m") == ["secret", "source"]


@pytest.mark.parametrize("name", ["../x", "a/b", "", "..", "/x", "config.json", "model.safetensors"])
def test_extra_files_stay_in_the_folder(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"file|written by the checkpoint"):
        write(tmp_path / "deep" / "m", extra={name: "x"})
    assert list((tmp_path / "deep").iterdir()) == [] and siblings(tmp_path / "deep") == []


# --- misuse


def test_misuse(tmp_path):
    out = tmp_path / "m"
    with pytest.raises(CheckpointError, match="not open"):
        CheckpointWriter(out).add("a", torch.ones(1))
    with pytest.raises(CheckpointError, match="no tensor was added"), CheckpointWriter(out) as writer:
        writer.finish({})
    for name, tensor, message in [
        ("", torch.ones(1), "name"),
        ("__metadata__", torch.ones(1), "name"),
        ("a", torch.ones(1), "added twice"),
        ("m", torch.ones(1, device="meta"), "m: expected a dense tensor with data"),
        ("s", torch.ones(1).to_sparse(), "s: expected a dense"),
        ("c", torch.ones(1, dtype=torch.complex64), "c: expected a dense"),
    ]:
        with pytest.raises(CheckpointError, match=message), CheckpointWriter(out) as writer:
            writer.add("a", torch.ones(1))
            writer.add(name, tensor)
    with CheckpointWriter(out) as writer:
        writer.add("a", torch.ones(1))
        writer.finish({})
        with pytest.raises(CheckpointError, match="not open"):
            writer.add("b", torch.ones(1))
    with pytest.raises(CheckpointError, match="positive"):
        CheckpointWriter(out, max_shard_bytes=0)
    assert siblings(out) == []


def test_leaving_without_finish_leaves_nothing(tmp_path):
    write(tmp_path / "deep" / "m", finish=False)
    assert list((tmp_path / "deep").iterdir()) == []
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "deep" / "m") as writer:
        writer.add("a", torch.ones(1))
        raise KeyboardInterrupt
    assert list((tmp_path / "deep").iterdir()) == []


# --- what may be replaced


def test_what_is_there_is_not_replaced_unasked(tmp_path):
    out = write(tmp_path / "m")
    with pytest.raises(CheckpointError, match="not empty"):
        write(out, fill=2)
    assert state(out) == 1
    assert state(write(out, fill=2, overwrite=True)) == 2
    assert siblings(out) == []

    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        write(tmp_path / "file", overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        write(tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "letters.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert state(write(tmp_path / "empty")) == 1


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(CheckpointError, match="not empty"), CheckpointWriter(tmp_path / "m") as writer:
        writer.add("a", torch.ones(1))
        write(tmp_path / "m", fill=3)
        writer.finish({})
    assert state(tmp_path / "m") == 3 and siblings(tmp_path / "m") == []


def test_a_link_to_a_folder_is_written_through(tmp_path):
    write(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", fill=2, overwrite=True)
    assert (tmp_path / "link").is_symlink() and state(tmp_path / "real") == 2


def test_the_source_may_be_what_is_replaced(tmp_path):
    out = write(tmp_path / "m", extra={"tokenizer.json": "words"})
    reader = CheckpointReader(out)
    with CheckpointWriter(out, overwrite=True) as writer:
        for name, tensor in reader.tensors():
            writer.add(name, tensor)
        writer.finish(reader.config, copy_from=out)
    assert state(out) == 1 and (out / "tokenizer.json").read_text() == "words"


def test_replacing_where_names_cannot_be_swapped(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    out = write(tmp_path / "m")
    write(out, fill=2, overwrite=True)
    assert state(out) == 2 and siblings(out) == []

    real, calls = os.rename, []

    def failing(a, b):
        if str(b).endswith(".safetensors"):
            return real(a, b)
        calls.append((a, b))
        if len(calls) == 2:
            raise OSError(errno.EIO, "planted")
        real(a, b)

    with pytest.raises(OSError, match="planted"), CheckpointWriter(out, overwrite=True) as writer:
        for name, tensor in tensors(3).items():
            writer.add(name, tensor)
        monkeypatch.setattr(os, "rename", failing)
        writer.finish({"fill": 3})
    assert len(calls) == 3 and state(out) == 2 and siblings(out) == []
