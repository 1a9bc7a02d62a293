"""Damaged and hostile folders: each kind is planted, and refused by an error that names it."""

import json
import os
import resource
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file

from brise.model.checkpoint import CheckpointError, load_model

from .damage import INDEX, NORM, ONE, Q, edit_header, edit_json, edit_tensors, read_raw, refused, write_raw


def test_the_folders_are_good(made):
    for name in ("single", "sharded", "tied"):
        load_model(made / name)
    assert (made / "sharded" / INDEX).exists()


# --- a file that is cut, or whose header lies


@pytest.mark.parametrize("keep", [0, 5, 8, 300, -1])
def test_truncated(single, keep):
    data = (single / ONE).read_bytes()
    (single / ONE).write_bytes(data[:keep])
    refused(single, ONE, "fetch it again")


def test_truncated_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(sharded, shard.name, "truncated")


def test_trailing_bytes(single):
    with (single / ONE).open("ab") as file:
        file.write(b"x")
    refused(single, ONE, "belongs to no tensor")


@pytest.mark.parametrize("length", [2**64 - 1, 2**40, 10**7])
def test_absurd_header_length(single, length):
    data = (single / ONE).read_bytes()
    (single / ONE).write_bytes(struct.pack("<Q", length) + data[8:])
    refused(single, ONE, str(length))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"", "header"),
        (b"[]", "expected a JSON object"),
        (b"\xff\xfe{}", "header"),
        (b"{" + b" " * 50, "header"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested too deep"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": 1, "a": 2}', "'a' comes twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "header"),
        (b'{"__metadata__": {"format": 1}}', "__metadata__"),
        (b'{"__metadata__": 3}', "__metadata__"),
    ],
)
def test_header_that_is_no_header(single, text, word):
    write_raw(single / ONE, text, b"")
    refused(single, ONE, word)


def entry(**changes):
    def change(header):
        header[NORM] = header[NORM] | changes
        for key in [k for k, v in changes.items() if v is ...]:
            del header[NORM][key]

    return change


BIG = 2**62


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (entry(dtype="F99"), "F99"),
        (entry(dtype=["F32"]), "dtype"),
        (entry(dtype=...), "must have dtype"),
        (entry(more=1), "must have dtype"),
        (entry(shape=[-32]), "-32"),
        (entry(shape=[32.0]), "32.0"),
        (entry(shape=[True] * 32), "sizes"),
        (entry(shape="32"), "sizes"),
        (entry(shape=[1] * 100 + [32]), "sizes"),
        (entry(shape=[BIG, BIG, 0]), "takes 0 bytes"),
        (entry(shape=[BIG, BIG]), "takes"),
        (entry(shape=[2**64 + 32]), "sizes"),
        (entry(shape=[33]), "takes 132 bytes"),
        (entry(data_offsets=[0]), "offsets"),
        (entry(data_offsets=[128, 0]), "offsets"),
        (entry(data_offsets=[-128, 0]), "offsets"),
        (entry(data_offsets=[0, 10**30]), "offsets"),
        (entry(data_offsets=[10**12, 10**12 + 128]), "belong to no tensor"),
        (lambda header: header.update({NORM: 5}), "must have dtype"),
        (lambda header: header.update(x={"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}), "overlaps"),
        (lambda header: header.update(x=dict(header[NORM])), "overlaps"),
    ],
)
def test_header_entries(single, change, word):
    edit_header(single, change)
    refused(single, ONE, word)


def test_offsets_past_the_end_and_gaps(single):
    header, data = read_raw(single / ONE)
    last = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    begin, end = header[last]["data_offsets"]
    longer = {**header[last], "shape": [end - begin + 4], "dtype": "U8", "data_offsets": [begin, end + 4]}
    write_raw(single / ONE, {**header, last: longer}, data)
    refused(single, ONE, "truncated")
    moved = {**header[last], "data_offsets": [begin + 4, end + 4]}
    write_raw(single / ONE, {**header, last: moved}, data + b"0000")
    refused(single, ONE, last, "4 bytes between")


def test_huge_sparse_file(single):
    """A terabyte of nothing, well described but no tensor of the model's: it is never read."""
    size = 1 << 40
    described = {"lm_head.weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    write_raw(single / ONE, described, b"")
    try:
        os.truncate(single / ONE, (single / ONE).stat().st_size + size)
    except OSError:
        pytest.skip("this file system has no files of a terabyte")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(single, "0 blocks")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_many_empty_tensors_are_bounded(single):
    header = {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
    write_raw(single / ONE, header, b"")
    refused(single, "0 blocks")


# --- tensors that are not the model's


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(NORM), [NORM, "missing"]),
        (lambda t: t.pop(f"{Q}.scales"), [f"{Q}.scales", "missing"]),
        (lambda t: t.update(extra=torch.ones(1)), ["extra", "no place"]),
        (lambda t: t.update({f"{Q}.zeros": torch.ones(1)}), [f"{Q}.zeros", "no place"]),
        (lambda t: t.update({f"{Q}.weight": torch.ones(32, 32)}), [f"{Q}.weight", "no place"]),
        (lambda t: t.update({NORM: torch.ones(33)}), [NORM, "[33]", "[32]"]),
        (lambda t: t.update({NORM: torch.ones(32, 1)}), [NORM, "[32, 1]", "[32]"]),
        (
            lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].T.contiguous()}),
            [f"{Q}.qweight", "[16, 32]"],
        ),
        (lambda t: t.update({NORM: torch.ones(32).half()}), [NORM, "float16", "float32"]),
        (lambda t: t.update({NORM: torch.ones(32).int()}), [NORM, "int32", "floating-point"]),
        (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].char()}), [f"{Q}.qweight", "int8", "uint8"]),
        (
            lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].float()}),
            [f"{Q}.scales", "float32", "float16"],
        ),
    ],
)
def test_tensors(single, change, words):
    edit_tensors(single, change)
    refused(single, *words)


def test_no_dtype_is_cast_unasked(single):
    edit_tensors(single, lambda t: t.update({NORM: torch.full((32,), 2.0).half()}))
    assert load_model(single, dtype=torch.float32).model.norm.weight.dtype == torch.float32
    with pytest.raises(CheckpointError, match="int32"):
        edit_tensors(single, lambda t: t.update({NORM: torch.ones(32).int()}))
        load_model(single, dtype=torch.float32)


# --- the index


def edit_map(folder, change):
    edit_json(folder, lambda index: change(index["weight_map"]), INDEX)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/outside.safetensors", "a/../../x.safetensors", "..", ""]
)
def test_index_names_a_file_outside(sharded, name):
    shutil.copy(next(sharded.glob("model-*")), sharded.parent / "outside.safetensors")
    edit_map(sharded, lambda m: m.update({NORM: name}))
    refused(sharded, "in this folder" if name.endswith("s") else INDEX)


@pytest.mark.parametrize("which", ["shard", "index", "config"])
def test_link_that_leads_out(sharded, which):
    name = {"shard": sorted(sharded.glob("model-*"))[0].name, "index": INDEX, "config": "config.json"}[which]
    (sharded / name).rename(sharded.parent / "elsewhere")
    (sharded / name).symlink_to(sharded.parent / "elsewhere")
    refused(sharded, name, "leads out of the folder")
    (sharded / name).unlink()
    (sharded / name).symlink_to(name)
    refused(sharded, name, "leads nowhere")


def test_link_within_the_folder_is_fine(sharded):
    shard = sorted(sharded.glob("model-*"))[0]
    shard.rename(sharded / "blob")
    shard.symlink_to("blob")
    load_model(sharded)


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo"])
def test_shard_that_is_none(sharded, kind):
    shard = sorted(sharded.glob("model-*"))[1]
    shard.unlink()
    if kind == "folder":
        shard.mkdir()
    elif kind == "fifo":
        os.mkfifo(shard)
    refused(sharded, shard.name, "missing" if kind == "missing" else "no regular file")


def test_index_and_shards_disagree(sharded):
    good = (sharded / INDEX).read_text()
    weight_map = json.loads(good)["weight_map"]
    first, second = sorted(set(weight_map.values()))[:2]
    in_first = next(n for n, f in weight_map.items() if f == first)

    edit_map(sharded, lambda m: m.update({in_first: second}))
    refused(sharded, INDEX, f"{second} holds {in_first}, but {first} does")
    (sharded / INDEX).write_text(good)
    edit_map(sharded, lambda m: m.update({"ghost": second}))
    refused(sharded, INDEX, "ghost", "does not")
    (sharded / INDEX).write_text(good)
    edit_map(sharded, lambda m: m.pop(in_first))
    refused(sharded, in_first, "does not list")
    (sharded / INDEX).write_text(good)
    edit_map(sharded, lambda m: m.update({in_first: "weights.bin"}))
    refused(sharded, "weights.bin", ".safetensors")
    for bad in ({"weight_map": []}, {"weight_map": {"a": 1}}, {}, {"metadata": {}}):
        (sharded / INDEX).write_text(json.dumps(bad))
        refused(sharded, INDEX, "weight_map")
    (sharded / INDEX).write_text("[]")
    refused(sharded, INDEX, "JSON object")
    (sharded / INDEX).unlink()
    refused(sharded, INDEX, "fetch the index")


def test_tensor_in_two_shards(sharded):
    first, second = sorted(p.name for p in sharded.glob("model-*"))[:2]
    name = next(iter(load_file(sharded / first)))
    edit_tensors(sharded, lambda t: t.update({name: torch.ones(1)}), second)
    refused(sharded, name, "two shards", first, second)


def test_single_file_beside_a_foreign_index(made, sharded):
    shutil.copy(made / "single" / ONE, sharded)
    refused(sharded, ONE, INDEX, "which one")
