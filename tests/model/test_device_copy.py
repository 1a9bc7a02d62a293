"""The way to a device and back: the order of the pieces, the same bits, and devices that are not there."""

import json

import pytest
import torch
from typer.testing import CliRunner

from brise.cli.main import app
from brise.model import calibrated, plain
from brise.model.device_copy import DeviceError, DevicePieces, compute_device, one_ahead
from brise.model.job import job_path
from brise.model.reader import CheckpointReader
from brise.model.safetensors_header import CheckpointError
from brise.model.stream import REPORT, quantize_checkpoint
from brise.quant.config import Calibration, QuantConfig, QuantSpec, Rule
from brise.quant.presets import PRESETS
from brise.quant.rows import round_rows
from brise.quant.rtn import rtn
from brise.quant.scales import NonFiniteError
from brise.quant.workers import Workers

CPU = torch.device("cpu")
IDS = torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(0))


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def tensors(folder):
    reader = CheckpointReader(folder)
    return {name: reader.tensor(name) for name in reader.names}


def test_each_piece_is_begun_before_the_one_in_front_of_it_is_used():
    log = []

    def begin(item):
        log.append(f"begin {item}")
        return item * 10

    for got in one_ahead([1, 2, 3], begin):
        log.append(f"use {got}")
    assert log == ["begin 1", "begin 2", "use 10", "begin 3", "use 20", "use 30"]
    assert list(one_ahead([], begin)) == [] and list(one_ahead([7], begin)) == [70]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("format", ["nf4", "int3", "int8"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_pieces_that_were_copied_are_rounded_as_they_are(dtype, format, double_quant):
    """Against rounding the whole weight at once, two weights after each other through the same buffers."""
    spec = QuantSpec(
        format=format, group_size=32, symmetric=format == "nf4" or double_quant, double_quant=double_quant
    )
    read = []
    with DevicePieces(CPU, 1000) as pieces:
        for seed, (count, width) in enumerate(
            [(50, 96), (7, 2048)]
        ):  # in the second a row is more than a piece
            weight = torch.randn(width, count, generator=torch.Generator().manual_seed(seed)).to(dtype).t()

            def rows(start, stop, weight=weight):
                read.append(stop - start)
                return weight[start:stop]

            got = round_rows(rows, (count, width), spec, pieces)
            expected = rtn(weight.contiguous(), spec)
            assert all(torch.equal(got.tensor.tensors[n], t) for n, t in expected.tensors.items())
            lost = (weight.float() - expected.dequantize()).square().sum()
            assert got.error == pytest.approx(float(lost), rel=1e-5)
            assert got.norm == pytest.approx(float(weight.float().square().sum()), rel=1e-5)
    assert read == [10] * 5 + [1] * 7  # once, though double quantization goes over the rows twice


def test_a_piece_that_cannot_be_rounded_leaves_the_next_weight_alone():
    spec = QuantSpec(format="nf4", group_size=32)
    good = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    bad = good.clone()
    bad[20, 3] = torch.nan
    with DevicePieces(CPU, 500) as pieces:
        with pytest.raises(NonFiniteError):
            round_rows(lambda a, b: bad[a:b], (40, 64), spec, pieces)
        got = round_rows(lambda a, b: good[a:b], (40, 64), spec, pieces)
    assert torch.equal(got.tensor.tensors["qweight"], rtn(good, spec).tensors["qweight"])


def test_a_whole_job_through_copies(tiny_checkpoint, tmp_path, monkeypatch):
    """Every weight that is rounded goes through them, and the folder is the same but for the errors' last bits."""
    for name, ids in (("nf4-dq-all", None), ("gptq-int4-g32-all", IDS)):
        config = PRESETS[name]
        quantize_checkpoint(tiny_checkpoint, tmp_path / name, config, calibration=ids)
        made = []

        class Seen(DevicePieces):
            def each(self, *args, **options):
                made.append(args)  # noqa: B023
                return super().each(*args, **options)

        with monkeypatch.context() as patch:
            for module in (plain, calibrated):
                patch.setattr(module, "pieces_on", lambda device, Seen=Seen: Seen(device, 300))
            quantize_checkpoint(tiny_checkpoint, tmp_path / f"{name}-copied", config, calibration=ids)
        assert len(made) == (1 if ids is not None else 2 * 15)
        one, other = contents(tmp_path / f"{name}-copied"), contents(tmp_path / name)
        assert one.pop(REPORT) and other.pop(REPORT) and one == other


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compute_device("cpu") == compute_device("cpu:0") == CPU
    with pytest.raises(DeviceError, match="cuda: torch sees no CUDA device here; give cpu"):
        compute_device("cuda")
    for name in ("gpu", "mps", "meta"):
        with pytest.raises(DeviceError, match=f"expected the device cpu, cuda or cuda:N, got '{name}'"):
            compute_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert compute_device("cuda") == torch.device("cuda", 0)
    assert compute_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(DeviceError, match="sees 2 CUDA devices, the last is cuda:1"):
        compute_device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "3")  # of torchrun: a GPU for each process, as far as they go
    assert compute_device("cuda") == torch.device("cuda", 1)
    assert compute_device("cuda:0") == torch.device("cuda", 0)


def test_the_command_says_so_before_anything_is_made(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["quantize", str(tiny_checkpoint), str(tmp_path / "q"), "-c", "nf4", "--device", "cuda", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1 and "torch sees no CUDA device" in result.stderr
    assert "torch sees no CUDA device" in json.loads(result.stdout.splitlines()[-1])["error"]
    assert not list(tmp_path.iterdir())


def test_a_job_is_not_gone_on_with_on_another_device(tiny_checkpoint, tmp_path, monkeypatch):
    from brise.model import identity

    out, real = tmp_path / "q", plain.PlainSteps.compute

    def failing(self, step, index):
        if index == 2:
            raise OSError("planted")
        return real(self, step, index)

    with monkeypatch.context() as patch:
        patch.setattr(plain.PlainSteps, "compute", failing)
        with pytest.raises(OSError, match="planted"):
            quantize_checkpoint(tiny_checkpoint, out, PRESETS["nf4"])
    assert job_path(out).exists()
    real_identity = identity.job_identity
    monkeypatch.setattr(
        "brise.model.stream.job_identity", lambda *args: {**real_identity(*args), "device": "another"}
    )
    with pytest.raises(CheckpointError, match=r"differs in device \(cpu, now another\)"):
        quantize_checkpoint(tiny_checkpoint, out, PRESETS["nf4"], resume=True)


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["nf4", "fp4", "int2", "int3", "int4", "int8"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_gives_the_bits_of_the_cpu(format, double_quant, dtype):
    spec = QuantSpec(
        format=format,
        group_size=64,
        symmetric=not format.startswith("int") or double_quant,
        double_quant=double_quant,
    )
    weights = [
        (torch.randn(n, k, generator=torch.Generator().manual_seed(n)) * 0.02).to(dtype)
        for n, k in ((1000, 512), (64, 4096), (3000, 640))
    ]
    with DevicePieces(compute_device("cuda"), 1 << 16) as pieces:
        got = [round_rows(lambda a, b, w=w: w[a:b], tuple(w.shape), spec, pieces) for w in weights]
    with Workers() as workers:
        expected = [round_rows(lambda a, b, w=w: w[a:b], tuple(w.shape), spec, workers) for w in weights]
    for one, other in zip(got, expected, strict=True):
        for name, tensor in other.tensor.tensors.items():
            assert torch.equal(one.tensor.tensors[name], tensor), name
        assert one.error == pytest.approx(other.error, rel=1e-4)


@pytest.mark.gpu
def test_a_job_on_a_gpu_beside_one_on_the_cpu(tiny_checkpoint, tmp_path):
    for name in ("nf4-dq-all", "int4-g32-asym-all"):
        for device in ("cpu", "cuda"):
            quantize_checkpoint(tiny_checkpoint, tmp_path / f"{name}-{device}", PRESETS[name], device=device)
        one, other = (tensors(tmp_path / f"{name}-{device}") for device in ("cpu", "cuda"))
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.gpu
@pytest.mark.parametrize("once", [False, True], ids=["each", "once"])
def test_gptq_on_a_gpu_comes_close_to_the_cpu(tiny_checkpoint, tmp_path, once):
    """A code that falls otherwise moves those behind it, so what is lost is compared, module by module."""
    ids = torch.randint(0, 256, (8, 48), generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(format="int4", group_size=32, algorithm="gptq")
    head = QuantSpec(format="nf4", group_size=32, double_quant=True)
    how = {"hessians": "once", "target": "quantized", "true_sequential": False} if once else {}
    config = QuantConfig((Rule(("*layers.*",), spec), Rule(("*",), head)), Calibration(**how))
    on_cpu, on_gpu = (
        quantize_checkpoint(tiny_checkpoint, tmp_path / device, config, calibration=ids, device=device)
        for device in ("cpu", "cuda")
    )
    for one, other in zip(on_cpu.outcomes, on_gpu.outcomes, strict=True):
        assert (one.path, one.spec) == (other.path, other.spec)
        if one.output_error:
            assert other.output_error == pytest.approx(one.output_error, rel=0.02), one.path
    embedding = "model.embed_tokens.qweight"
    assert torch.equal(tensors(tmp_path / "cpu")[embedding], tensors(tmp_path / "cuda")[embedding])
