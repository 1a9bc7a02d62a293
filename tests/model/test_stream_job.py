"""A quantization job: what it makes, and how it ends before its end."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from brise.cli.main import app
from brise.model import plain, shards, stream
from brise.model.activations import InFiles
from brise.model.atomic import try_lock
from brise.model.checkpoint import load_model
from brise.model.group import Alone
from brise.model.job import JobFolder, job_path
from brise.model.plain import PlainSteps
from brise.model.reader import CheckpointReader
from brise.model.safetensors_header import CheckpointError
from brise.model.stream import Interrupted, quantize_checkpoint
from brise.model.trouble import Policy
from brise.quant.config import QuantConfig, QuantSpec, Rule
from brise.quant.presets import PRESETS
from brise.quant.rtn import rtn

IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
NF4 = PRESETS["nf4-dq-all"]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def fail_at(monkeypatch, step: int, error: BaseException | None = None, action=None) -> list[int]:
    """Let a step fail, or something happen in it; returns the list of the steps that are computed."""
    real, seen = PlainSteps.compute, []

    def compute(self, *args):
        seen.append(args[1])
        if args[1] == step:
            if action is not None:
                action()
            if error is not None:
                raise error
        return real(self, *args)

    monkeypatch.setattr(PlainSteps, "compute", compute)
    return seen


@pytest.mark.parametrize("format", ["nf4", "fp4", "int2", "int3", "int4", "int8"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_weights_are_those_of_plain_rounding(tiny_checkpoint, tmp_path, monkeypatch, format, double_quant):
    monkeypatch.setattr("brise.quant.rows._PIECE", 1000)  # many pieces of a small weight, not all of one size
    symmetric = not format.startswith("int") or double_quant
    spec = QuantSpec(
        format=format, group_size=32, double_quant=double_quant, symmetric=symmetric, scale="mse"
    )
    report = quantize_checkpoint(tiny_checkpoint, tmp_path / "q", QuantConfig((Rule(("*",), spec),)))
    source, made = CheckpointReader(tiny_checkpoint), CheckpointReader(tmp_path / "q")
    for outcome in report.quantized:
        if outcome.reason.startswith("tied"):
            continue
        weight = source.tensor(f"{outcome.path}.weight")
        expected = rtn(weight, spec)
        for name, tensor in expected.tensors.items():
            assert torch.equal(made.tensor(f"{outcome.path}.{name}"), tensor)
        error = (weight - expected.dequantize()).square().sum() / weight.square().sum()
        assert outcome.relative_error == pytest.approx(float(error), rel=1e-5)
    for name in source.names:
        if name.endswith("norm.weight"):
            assert torch.equal(made.tensor(name), source.tensor(name))
    assert load_model(tmp_path / "q")(IDS).logits.isfinite().all()


def test_shards_say_nothing_of_how_they_were_filled(tiny_checkpoint, tmp_path):
    quantize_checkpoint(tiny_checkpoint, tmp_path / "one", NF4)
    quantize_checkpoint(tiny_checkpoint, tmp_path / "many", NF4, max_shard_bytes=3000)
    one, many = CheckpointReader(tmp_path / "one"), CheckpointReader(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*"))) > 5 and one.names == many.names
    assert all(torch.equal(one.tensor(n), many.tensor(n)) for n in one.names)


def test_a_shard_is_filled_to_the_last_byte():
    """Sizes by hand: a tensor that just fits goes in, one byte more begins the next, a larger one is alone."""
    sizes = {"a": 40, "b": 60, "c": 1, "d": 99, "e": 250, "f": 100}
    planned = [shards.Planned(name, torch.uint8, (size,)) for name, size in sizes.items()]
    assert [sorted(s.begins) for s in shards.lay_out(planned, 100)] == [["a", "b"], ["c", "d"], ["e"], ["f"]]


def test_killed_at_any_moment_and_resumed_it_ends_with_the_same_bytes(tmp_path):
    script = Path(__file__).with_name("killed_jobs.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "0"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["problems"] == [], done.stderr[-2000:]
    assert said["kills"] > 30 and said["resumed"] > 5 and said["ended"] >= 6


def test_what_is_finished_is_not_done_again(tiny_checkpoint, tmp_path, monkeypatch):
    quantize_checkpoint(tiny_checkpoint, tmp_path / "whole", NF4)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_at(patch, 2, OSError(errno.EIO, "planted"))
        with pytest.raises(OSError, match="planted") as caught:
            quantize_checkpoint(tiny_checkpoint, out, NF4)
    assert "2 of 4 steps are kept: resume" in caught.value.__notes__[0]
    assert not out.exists() and job_path(out).exists()

    with pytest.raises(CheckpointError, match="2 steps are done: go on with it"):
        quantize_checkpoint(tiny_checkpoint, out, NF4)
    with pytest.raises(CheckpointError, match=r"differs in config \("):
        quantize_checkpoint(tiny_checkpoint, out, PRESETS["nf4-all"], resume=True)
    with pytest.raises(CheckpointError, match=r"differs in policy \("):
        quantize_checkpoint(tiny_checkpoint, out, NF4, resume=True, policy=Policy(zero="keep"))
    with pytest.raises(CheckpointError, match=r"differs in max_shard_bytes \(5000000000, now 3000\)"):
        quantize_checkpoint(tiny_checkpoint, out, NF4, resume=True, max_shard_bytes=3000)
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(CheckpointError, match=r"differs in source \("):
        quantize_checkpoint(other, out, NF4, resume=True)
    with monkeypatch.context() as patch:
        seen = fail_at(patch, -1)
        quantize_checkpoint(tiny_checkpoint, out, NF4, resume=True)
    assert seen == [2, 3] and contents(out) == contents(tmp_path / "whole")
    assert not job_path(out).exists()
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        quantize_checkpoint(tiny_checkpoint, out, NF4, resume=True)


@pytest.mark.parametrize("shard", [5_000_000_000, 3000], ids=["one", "many"])
def test_nothing_is_on_record_before_it_is_on_the_disk(tiny_checkpoint, tmp_path, monkeypatch, shard):
    """What a kill cannot show, since the system keeps its pages: every file is waited for, then the journal's line.

    The names of new files too: a weight of zeros is kept, for which the shards are laid out anew.
    """
    src, kept = shutil.copytree(tiny_checkpoint, tmp_path / "src"), "model.layers.1.mlp.down_proj"
    tensors = load_file(src / "model.safetensors")
    tensors[f"{kept}.weight"].zero_()
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    dirty, synced, lines = set(), set(), []
    real_pwrite, real_sync, real_fsync, real_open = os.pwrite, InFiles.sync, os.fsync, os.open

    def opening(path, flags, *mode):
        if flags & os.O_CREAT and Path(path).name.startswith("shard-"):
            dirty.add(Path(path).parent.stat().st_ino)
        return real_open(path, flags, *mode)

    def pwrite(fd, data, at):
        dirty.add(os.fstat(fd).st_ino)
        return real_pwrite(fd, data, at)

    def fsync(fd):
        dirty.discard(os.fstat(fd).st_ino)
        return real_fsync(fd)

    def sync(self, step):
        real_sync(self, step)
        synced.add(step)

    def append(self, record):
        (index,) = [step["step"] for step in record["steps"]]
        lines.append((index, set(dirty), index + 1 in synced))
        journal = (self.path / "journal").stat().st_ino
        dirty.add(journal)
        real_append(self, record)
        assert journal not in dirty

    real_append = JobFolder.append
    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "fdatasync", fsync)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(InFiles, "sync", sync)
    monkeypatch.setattr(JobFolder, "append", append)
    config = PRESETS["gptq-int3-g32-all"]
    options = {"max_shard_bytes": shard, "policy": Policy(zero="keep")}
    report = quantize_checkpoint(src, tmp_path / "q", config, calibration=IDS, memory="file", **options)
    assert [o.path for o in report.kept] == [kept]
    # behind the last block that is calibrated in nothing needs the activations
    assert lines == [(0, set(), True), (1, set(), True), (2, set(), False), (3, set(), False)]


def test_overwriting_begins_anew(tiny_checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_at(patch, 3, OSError(errno.EIO, "planted"))
        with pytest.raises(OSError):
            quantize_checkpoint(tiny_checkpoint, out, NF4)
    seen = fail_at(monkeypatch, -1)
    quantize_checkpoint(tiny_checkpoint, out, PRESETS["int8-all"], overwrite=True)
    assert seen == [0, 1, 2, 3] and not job_path(out).exists()


@pytest.mark.parametrize("memory", ["memory", "file"])
def test_calibration_goes_on_where_it_was(tiny_checkpoint, tmp_path, monkeypatch, memory):
    """From the file, or by running the finished blocks again; from either into either."""
    from brise.model import calibrated

    config = PRESETS["gptq-int3-g32-all"]
    quantize_checkpoint(tiny_checkpoint, tmp_path / "whole", config, calibration=IDS)
    out = tmp_path / "out"
    real = calibrated.quantize_block

    def failing(layer, load, setting, activations, context, prefix):
        if prefix.endswith(".1"):
            activations.hidden.fill_(7.0)  # half of a block's work
            raise OSError(errno.EIO, "planted")
        return real(layer, load, setting, activations, context, prefix)

    with monkeypatch.context() as patch:
        patch.setattr(calibrated, "quantize_block", failing)
        with pytest.raises(OSError, match="planted"):
            quantize_checkpoint(tiny_checkpoint, out, config, calibration=IDS, memory=memory)
    with pytest.raises(CheckpointError, match="differs in calibration windows"):
        quantize_checkpoint(tiny_checkpoint, out, config, calibration=IDS.flip(0), resume=True)
    quantize_checkpoint(tiny_checkpoint, out, config, calibration=IDS, memory="file", resume=True)
    assert contents(out) == contents(tmp_path / "whole")


def test_each_process_takes_its_share_of_the_windows(tiny_checkpoint, monkeypatch):
    """All of them at each would give the same weights, since GPTQ looks past a factor of the Hessian."""

    class Third(Alone):
        rank, world = 1, 3

    monkeypatch.setattr(stream, "current_group", Third)
    config, ids, cpu = PRESETS["gptq-int4-g32"], torch.arange(7)[:, None].repeat(1, 4), torch.device("cpu")
    source = CheckpointReader(tiny_checkpoint)
    job = stream._Job(source, tiny_checkpoint, config, ids, "memory", Policy(), 10**9, cpu, None)
    assert job.worker.ids[:, 0].tolist() == [1, 4]


def test_a_second_process_on_the_same_output_is_told(tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    job_path(out).mkdir()
    lock = try_lock(job_path(out))
    try:
        with pytest.raises(CheckpointError, match=r"another process.* is writing"):
            quantize_checkpoint(tiny_checkpoint, out, NF4, overwrite=True, resume=True)
    finally:
        os.close(lock)
    quantize_checkpoint(tiny_checkpoint, out, NF4)
    assert out.exists()


def _shorter(path):
    os.truncate(path, path.stat().st_size // 2)


def _replaced(path):
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize(
    "change, says",
    [
        (_shorter, "became shorter while it was read|was changed, replaced or removed"),
        (_replaced, "was changed, replaced or removed"),
        (lambda path: os.utime(path, ns=(0, 0)), "was changed, replaced or removed"),
        (lambda path: path.unlink(), "was changed, replaced or removed"),
    ],
)
def test_a_source_that_changes_underneath(tiny_checkpoint, tmp_path, monkeypatch, change, says):
    src, out = tmp_path / "src", tmp_path / "out"
    shutil.copytree(tiny_checkpoint, src)
    fail_at(monkeypatch, 2, action=lambda: change(src / "model.safetensors"))
    with pytest.raises(CheckpointError, match=says):
        quantize_checkpoint(src, out, NF4)
    lines = (job_path(out) / "journal").read_text().splitlines()
    assert len(lines) in (1, 2) and not out.exists()


def test_a_full_disk_shows_before_the_work(tiny_checkpoint, tmp_path, monkeypatch):
    def full(fd, offset, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.os, "posix_fallocate", full)
    seen = fail_at(monkeypatch, -1)
    with pytest.raises(OSError, match=r"the checkpoint takes [\d,]+ bytes, [\d,]+ are free here") as caught:
        quantize_checkpoint(tiny_checkpoint, tmp_path / "out", NF4)
    assert caught.value.errno == errno.ENOSPC and seen == []
    assert sorted(p.name for p in tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way(tiny_checkpoint, tmp_path, monkeypatch):
    quantize_checkpoint(tiny_checkpoint, tmp_path / "whole", NF4)
    out, real, calls = tmp_path / "out", os.pwrite, []

    def filling(fd, data, offset):
        calls.append(offset)
        if len(calls) > 60:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[: max(1, len(data) // 2)], offset)  # a write may also take less than it is given

    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "pwrite", filling)
        result = CliRunner().invoke(app, ["quantize", str(tiny_checkpoint), str(out), "-c", "nf4-dq-all"])
    assert result.exit_code == 1
    assert f"{job_path(out) / 'folder'}: No space left on device" in result.stderr.replace("\n", "")
    if (job_path(out) / "journal").exists():
        assert "steps are kept: resume to go on" in result.stderr
    quantize_checkpoint(tiny_checkpoint, out, NF4, resume=True)
    assert contents(out) == contents(tmp_path / "whole")


def test_an_interrupt_says_how_to_go_on(tiny_checkpoint, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, 0, KeyboardInterrupt())
        with pytest.raises(Interrupted, match="nothing is kept"):
            quantize_checkpoint(tiny_checkpoint, tmp_path / "out", NF4)
    assert sorted(p.name for p in tmp_path.iterdir()) == []
    command = ["quantize", str(tiny_checkpoint), str(tmp_path / "out"), "-c", "nf4-dq-all"]
    with monkeypatch.context() as patch:
        fail_at(patch, 3, KeyboardInterrupt())
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 130
    assert "3 of 4 steps are kept: resume to go on (the same command with --resume)" in result.stderr
    assert CliRunner().invoke(app, [*command, "--resume"]).exit_code == 0


def test_the_commands_options_reach_the_job(tiny_checkpoint, tmp_path, monkeypatch):
    seen = {}

    def capture(src, out, config, **options):
        seen.update(options)
        raise ValueError("seen")

    monkeypatch.setattr(stream, "quantize_checkpoint", capture)
    words = ["quantize", str(tiny_checkpoint), str(tmp_path / "q"), "-c", "nf4", "--overwrite", "--resume"]
    words += ["--memory", "file", "--shard-size", "77", "--on", "dead=fail", "--device", "cpu:0"]
    assert CliRunner().invoke(app, words).stderr.strip() == "brise: seen"
    del seen["progress"]
    assert seen == {
        "calibration": None,
        "overwrite": True,
        "resume": True,
        "memory": "file",
        "policy": Policy(dead="fail"),
        "max_shard_bytes": 77,
        "device": "cpu:0",
    }


@pytest.mark.parametrize(
    "torn", [lambda text: text[:-20], lambda text: text[:-9] + b"0" * 8 + b"\n", lambda text: text[:-1]]
)
def test_a_torn_journal_loses_its_last_line_only(tiny_checkpoint, tmp_path, monkeypatch, torn):
    """A line that is cut short, by its end alone too, and one of which a part never reached the disk."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_at(patch, 3, OSError(errno.EIO, "planted"))
        with pytest.raises(OSError):
            quantize_checkpoint(tiny_checkpoint, out, NF4)
    journal = job_path(out) / "journal"
    whole = journal.read_bytes()
    journal.write_bytes(torn(whole))
    with monkeypatch.context() as patch:
        seen = fail_at(patch, 3, OSError(errno.EIO, "planted"))
        with pytest.raises(OSError):
            quantize_checkpoint(tiny_checkpoint, out, NF4, resume=True)
    assert seen == [2, 3] and plain.PlainSteps is PlainSteps
    # what was torn is gone, and the lines behind it are read
    seen = fail_at(monkeypatch, -1)
    quantize_checkpoint(tiny_checkpoint, out, NF4, resume=True)
    assert seen == [3]
