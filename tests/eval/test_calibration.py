"""What is said of a calibration set and its Hessians, against numpy; and the benchmark of one pass."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from brise.cli.main import app
from brise.eval.bench_calibrate import bench_calibrate, ten_specs
from brise.eval.calibration import calibration_windows, describe_hessian, report_calibration
from brise.eval.data import load_text
from brise.model.checkpoint import load_tokenizer
from brise.quant.config import Calibration, QuantSpec
from brise.quant.gptq import GPTQOptions


def test_a_hessian_is_described_as_numpy_would():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 8, generator=generator)
    full = describe_hessian(("a",), x.T @ x, GPTQOptions())
    values = np.linalg.eigvalsh((x.T @ x).double().numpy())
    assert (full.width, full.rank, full.dead, full.damping) == (8, 8, 0, 0.01)
    assert full.condition == pytest.approx(values[-1] / values[0])
    ridge = 0.01 * values.mean()
    assert full.damped_condition == pytest.approx((values[-1] + ridge) / (values[0] + ridge))
    low = describe_hessian(("a",), x[:3].T @ x[:3], GPTQOptions())
    assert low.rank == np.linalg.matrix_rank(x[:3].double().numpy()) == 3 and low.condition is None
    x[:, 5] = 0
    assert describe_hessian(("a",), x.T @ x, GPTQOptions()).dead == 1
    # eigenvalues 3 and -1: no damping that is allowed makes it positive
    none = describe_hessian(("a",), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), GPTQOptions(damp_max=0.1))
    assert none.rank == 1 and none.condition is None
    assert none.damping is None and none.damped_condition is None


def test_the_report_of_a_set(tiny_checkpoint, tiny_text, tmp_path):
    calibration = Calibration(text=f"{tiny_text}#calibration", windows=5, length=32)
    options = GPTQOptions(damp=0.03)
    report = report_calibration(tiny_checkpoint, calibration, tmp_path, options=options)
    ids = calibration_windows(tiny_checkpoint, calibration)
    assert (report.windows, report.length, report.tokens) == (5, 32, 160)
    assert report.distinct == len(set(ids.flatten().tolist())) and report.padding == report.bos == 0
    assert [len(h.modules) for h in report.hessians] == [3, 1, 2, 1] * 2 + [1]
    assert [h.width for h in report.hessians] == [64, 64, 64, 128] * 2 + [64]
    assert all(1 <= h.rank <= h.width and h.damping == 0.03 for h in report.hessians)
    assert report.text_sha256 == load_text(calibration.text).sha256
    assert report.ids_sha256 == hashlib.sha256(np.array(ids.tolist(), "<i8").tobytes()).hexdigest()
    drawn = calibration_windows(
        tiny_checkpoint, Calibration(text=calibration.text, windows=5, length=32, seed=1)
    )
    assert not torch.equal(drawn, ids)
    assert report_calibration(tiny_checkpoint, calibration, None).hessians == []


def test_padding_and_bos_are_counted_where_they_stand(tiny_checkpoint, tiny_text, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_checkpoint, folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.bos_token, tokenizer.pad_token = "i", "w"  # letters that the text has too
    tokenizer.save_pretrained(folder)
    calibration = Calibration(text=f"{tiny_text}#calibration", windows=4, length=64)
    ids = calibration_windows(folder, calibration, "always").tolist()
    report = report_calibration(folder, calibration, None, bos="always")
    assert report.bos == 4 < sum(row.count(tokenizer.bos_token_id) for row in ids)
    assert report.padding == sum(row.count(tokenizer.pad_token_id) for row in ids) > 0


def test_the_benchmark_times_both_ways(tiny_checkpoint, tiny_text):
    assert len(ten_specs()) == 10
    specs = {f"int{b}": QuantSpec(format=f"int{b}", group_size=32, algorithm="gptq") for b in (4, 3)}
    calibration = Calibration(text=f"{tiny_text}#calibration", windows=2, length=32)
    found = bench_calibrate(tiny_checkpoint, calibration, exact=1, specs=specs)
    assert list(found.solve) == ["int4", "int3"] and list(found.exact) == ["int4"]
    once = found.gather + sum(found.solve.values())
    assert found.ratio == pytest.approx(2 * found.exact["int4"] / once)
    assert (
        found.in_words().startswith("2 configurations of tiny: one pass")
        and "(scaled from 1)" in found.in_words()
    )
    with pytest.raises(ValueError, match="1 to 2 full runs"):
        bench_calibrate(tiny_checkpoint, calibration, exact=3, specs=specs)


def test_the_command(tiny_checkpoint, tiny_text, tmp_path):
    how = [
        "--text",
        f"{tiny_text}#calibration",
        "--windows",
        "2",
        "--length",
        "32",
        "--out",
        str(tmp_path / "h"),
    ]
    done = CliRunner().invoke(app, ["calibrate", str(tiny_checkpoint), *how, "--json"])
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert (
        said == json.loads((tmp_path / "h" / "calibration.json").read_text()) and len(said["hessians"]) == 9
    )
    plain = CliRunner().invoke(app, ["calibrate", str(tiny_checkpoint), *how])
    assert "64 tokens of" in plain.stdout and "of 128" in plain.stdout
    wrong = CliRunner().invoke(app, ["calibrate", str(tiny_checkpoint), *how, "--exact", "2"])
    assert wrong.exit_code == 2 and "--benchmark" in wrong.stderr
