"""Where a job writes: a disk without room, and folders that are not to be replaced."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from brise.model.checkpoint import load_model
from brise.model.job import job_path
from brise.model.safetensors_header import CheckpointError
from brise.model.stream import quantize_checkpoint
from brise.quant.presets import PRESETS

IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
NF4 = PRESETS["nf4-dq-all"]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("when", [1, 2], ids=["first", "later"])
def test_a_disk_without_room_for_the_activations(tiny_checkpoint, tmp_path, monkeypatch, when):
    """Those of the embedding, and the copy that a block works on: how much it is, and nothing half done."""
    config, out, wanted = PRESETS["gptq-int3-g32"], tmp_path / "out", IDS.numel() * 64 * 4
    real, copy, made = os.posix_fallocate, shutil.copyfile, []

    def full(path):
        made.append(path)
        if len(made) == when:
            raise OSError(errno.ENOSPC, "No space left on device")

    def reserve(fd, offset, length):
        if length == wanted:
            full(fd)
        return real(fd, offset, length)

    def copyfile(source, target, **options):
        if Path(target).suffix == ".f32":
            full(target)
        return copy(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", reserve)
        patch.setattr(shutil, "copyfile", copyfile)
        with pytest.raises(OSError, match=rf"activations take {wanted:,} bytes in a file, [\d,]+ are free"):
            quantize_checkpoint(tiny_checkpoint, out, config, calibration=IDS, memory="file")
    quantize_checkpoint(tiny_checkpoint, tmp_path / "whole", config, calibration=IDS)
    quantize_checkpoint(tiny_checkpoint, out, config, calibration=IDS, memory="file", resume=True)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("where", ["same", "above", "link"])
def test_the_source_is_not_replaced_by_what_is_made_of_it(tiny_checkpoint, tmp_path, where):
    """Also not where overwriting is allowed."""
    home = shutil.copytree(tiny_checkpoint, tmp_path / "home")
    src = shutil.copytree(tiny_checkpoint, home / "inner") if where == "above" else home
    out = home
    if where == "link":
        out = tmp_path / "link"
        out.symlink_to(home, target_is_directory=True)
    before = contents(src)
    with pytest.raises(CheckpointError, match=r"holds, the source .* choose another folder"):
        quantize_checkpoint(src, out, NF4, overwrite=True)
    assert contents(src) == before and not job_path(home).exists()
    quantize_checkpoint(home, home / "below", NF4)  # which harms nothing
    assert load_model(home / "below") is not None and contents(src).items() >= before.items()


def test_a_line_of_the_journal_that_a_disk_takes_half_of(tiny_checkpoint, tmp_path, monkeypatch):
    """It is an error at once, and the step is done again."""
    out, real, lines = tmp_path / "out", os.write, []

    def write(fd, data):
        if b'"steps"' in data:
            lines.append(data)
        return real(fd, data[:-7] if len(lines) == 2 else data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(OSError, match=r"journal: \d+ of \d+ bytes written: is the disk full\?"):
            quantize_checkpoint(tiny_checkpoint, out, NF4)
    quantize_checkpoint(tiny_checkpoint, tmp_path / "whole", NF4)
    quantize_checkpoint(tiny_checkpoint, out, NF4, resume=True)
    assert contents(out) == contents(tmp_path / "whole")
