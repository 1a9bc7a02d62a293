"""What makes a job: whatever may change a byte of what is made is in it, and nothing else."""

import os
import shutil

import pytest
import torch

from brise.model import identity
from brise.model.identity import goes_on, job_identity
from brise.model.source import open_source
from brise.model.trouble import ACTIONS, Policy
from brise.quant.presets import PRESETS

IDS = torch.arange(24).view(2, 12)
CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "src")


def of(folder, *, config="gptq-int4-g32", policy=None, shard=10**9, ids=IDS, world=1, device=CPU):
    source = open_source(folder)
    return job_identity(source, PRESETS[config], policy or Policy(), shard, ids, world, device)


@pytest.mark.parametrize(
    "change, part",
    [
        ({"config": "gptq-int4-g64"}, "config"),
        ({"policy": Policy(dead="fail")}, "policy"),
        ({"shard": 10**9 + 1}, "max_shard_bytes"),
        ({"ids": IDS.flip(0)}, "calibration windows"),
        ({"ids": IDS.view(3, 8)}, "calibration windows"),
        ({"world": 2}, "processes"),
    ],
)
def test_another_argument_is_another_job(folder, change, part):
    before, after = of(folder), of(folder, **change)
    assert [key for key in before if before[key] != after[key]] == [part]


def test_what_the_last_bit_of_a_sum_depends_on(folder, monkeypatch):
    before, plain = of(folder), of(folder, config="nf4", ids=None)
    monkeypatch.setattr(identity.torch, "get_num_threads", lambda: 77)
    monkeypatch.setattr(identity.torch, "__version__", "0.0")
    after = of(folder)
    assert sorted(key for key in before if before[key] != after[key]) == ["threads", "torch"]
    # plain rounding has the same bits whatever they are, and whoever shares it
    assert of(folder, config="nf4", ids=None, world=2) == plain
    monkeypatch.setattr(identity.torch.cuda, "get_device_name", lambda device: "a GPU")
    assert of(folder, device=torch.device("cuda"))["device"] == "a GPU" != before["device"]
    monkeypatch.setattr(identity, "version", lambda name: "0.0.0")
    assert of(folder)["brise"] == "0.0.0" != before["brise"]


@pytest.mark.parametrize("file", ["model.safetensors", "its header", "config.json"])
def test_another_source_is_another_job(folder, file):
    """A file of the same size whose bytes may be others is known by its time, header and config by their contents."""
    before = of(folder)
    if file == "config.json":
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace('"rope_theta": 10000.0', '"rope_theta": 10001.0'))
        assert (folder / file).read_text() != text
    elif file == "its header":  # with the time of the file put back
        path = folder / "model.safetensors"
        status, data = path.stat(), path.read_bytes()
        path.write_bytes(data.replace(b'"format":"pt"', b'"format":"pq"', 1))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert path.read_bytes() != data
    else:
        status = (folder / file).stat()
        os.utime(folder / file, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    after = of(folder)
    assert [key for key in before if before[key] != after[key]] == ["source"]


@pytest.mark.parametrize("kind", ACTIONS)
def test_only_what_was_to_fail_may_change(kind):
    for old in ACTIONS[kind]:
        for new in ACTIONS[kind]:
            before, after = (Policy(**{kind: action}).to_dict() for action in (old, new))
            assert goes_on("policy", before, after) == (old in ("fail", new))
    assert not goes_on("policy", None, Policy().to_dict()) and not goes_on("config", {"a": 1}, {"a": 2})
    assert not goes_on("device", "cpu", "a GPU")
