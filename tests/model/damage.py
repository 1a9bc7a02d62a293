"""Ways to damage a checkpoint, and to hold that it is refused."""

import json
import struct
import time

import pytest
from safetensors.torch import load_file, save_file

from brise.model.checkpoint import CheckpointError, load_model

ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj"
NORM = "model.norm.weight"


def refused(folder, *words):
    """Loading is refused by a message that has all the words, quickly and in one line's worth of text."""
    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert len(message) < 2000 and time.monotonic() - start < 10


def read_raw(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_header(folder, change):
    header, data = read_raw(folder / ONE)
    write_raw(folder / ONE, change(header) or header, data)


def edit_tensors(folder, change, file=ONE):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def edit_json(folder, change, file="config.json"):
    value = json.loads((folder / file).read_text())
    change(value)
    (folder / file).write_text(json.dumps(value))
