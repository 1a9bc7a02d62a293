"""``brise quantize`` and ``brise configs``: making a quantized checkpoint, and what it can be made with."""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Device
from .session import Debug, Json, session_of
from .sources import SRC_HELP, resolve

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from ..quant.apply import Report
    from ..quant.config import QuantConfig, QuantSpec

QUANTIZE_EPILOG = """
[bold]brise quantize smollm2-135m build/nf4 --config nf4[/bold]

[bold]brise quantize mistralai/Mistral-7B-v0.1 build/7b --config gptq-int4-g128 --windows 128[/bold]

[bold]brise quantize ./checkpoint build/mine --config mine.yaml --text corpus.txt[/bold]

[bold]brise quantize ./checkpoint build/mine --config mine.yaml --resume[/bold]  after a Ctrl-C or a crash

[bold]torchrun --nproc-per-node 2 --no-python brise quantize ./checkpoint build/nf4 --config nf4[/bold]
"""
CONFIGS_EPILOG = """
[bold]brise configs[/bold]  all presets

[bold]brise configs gptq-nf4 > mine.yaml[/bold]  one of them in full, a start for your own
"""

Config = Annotated[
    str,
    typer.Option("--config", "-c", help="A preset (see [bold]brise configs[/bold]) or a YAML or JSON file."),
]
Text = Annotated[
    str | None,
    typer.Option(
        "--text", help="Calibration text: boolq, wikitext2, a UTF-8 file or hub:NAME:CONFIG:SPLIT:COLUMN."
    ),
]
Windows = Annotated[int | None, typer.Option("--windows", min=1, help="Calibration windows.")]
Length = Annotated[int | None, typer.Option("--length", min=1, help="Tokens of a calibration window.")]


class Memory(StrEnum):
    memory = "memory"
    file = "file"


def quantize(
    ctx: typer.Context,
    src: Annotated[str, typer.Argument(metavar="SRC", help=SRC_HELP)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    config: Config,
    text: Text = None,
    windows: Windows = None,
    length: Length = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it exists, and begin anew if it was begun.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with a job that was interrupted; begin where there is none."),
    ] = False,
    memory: Annotated[
        Memory,
        typer.Option(
            help="Where calibration activations are kept. A file needs less memory and resumes faster."
        ),
    ] = Memory.memory,
    on: Annotated[
        list[str] | None,
        typer.Option(
            "--on",
            metavar="KIND=ACTION",
            help="What to do about a module in trouble: nonfinite=keep, zero=keep, hessian=round, dead=fail, ...",
        ),
    ] = None,
    device: Device = "cpu",
    shard_size: Annotated[int, typer.Option(min=1, help="Bytes of a shard at most.")] = 5_000_000_000,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize the checkpoint SRC into the folder OUT, block by block.

    OUT appears when it is complete, or not at all. It holds the weights, a config.json in which every rule is
    resolved, the tokenizer, and quantization_report.json: each module, quantized how, or kept and why. What is done
    survives the end of the process: --resume goes on behind the last finished block, and ends with the same bytes.

    Started by torchrun, all processes work on the one OUT: they share blocks out, or calibration windows. With
    --device cuda each takes a GPU of its own.
    """
    session = session_of(ctx)
    # whatever is wrong with the config or OUT shows before anything is downloaded
    chosen = override_calibration(load_config(config), text, windows, length)
    if out.exists() and not (overwrite or resume):
        raise FileExistsError(f"{out} exists; choose another folder, or pass --overwrite to replace it")

    from ..model.device_copy import compute_device
    from ..model.group import joined
    from ..model.stream import Interrupted, quantize_checkpoint
    from ..model.trouble import Policy

    policy = Policy.parse(on or [])
    compute_device(device)
    with joined() as group:
        # one process fetches, the others find it
        folder = resolve(src, session) if group.rank == 0 else None
        group.gather(None)
        folder = folder or resolve(src, session)
        try:
            with session.progress() as bars:
                report = quantize_checkpoint(
                    folder,
                    out,
                    chosen,
                    calibration=calibrate(folder, chosen),
                    overwrite=overwrite,
                    resume=resume,
                    memory=memory.value,
                    policy=policy,
                    max_shard_bytes=shard_size,
                    device=device,
                    progress=lambda what, done, total: bars("quantize", done, total),
                )
        except Interrupted as error:
            session.last_words = f"{error} (the same command with --resume)" if error.kept else str(error)
            raise
        if group.rank:
            return
    session.finish(
        {"path": str(out), "config": config, **summary(report)},
        lambda console: _show_report(console, out, report),
    )


def configs(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print this preset, or file, in full as YAML.")
    ] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """List the configurations that have a name, or print one in full."""
    session = session_of(ctx)
    if name is not None:
        import yaml

        data = load_config(name).to_dict()
        session.finish(data, lambda console: print(yaml.safe_dump(data, sort_keys=False), end=""))
        return
    from ..quant.presets import PRESETS

    session.finish({"configs": {n: c.to_dict() for n, c in PRESETS.items()}}, _show_presets)


def load_config(source: str) -> QuantConfig:
    """A preset by name, or a file.

    Raises:
        ConfigError: there is no such preset and no such file, or its contents do not make a config.
    """
    from ..quant.config import ConfigError, QuantConfig
    from ..quant.presets import PRESETS

    if source not in PRESETS and not Path(source).is_file():
        near = difflib.get_close_matches(source, PRESETS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "brise configs lists the presets"
        raise ConfigError(f"{source!r} is neither a preset nor a file; {hint}")
    return QuantConfig.load(source)


def override_calibration(
    config: QuantConfig, text: str | None, windows: int | None, length: int | None
) -> QuantConfig:
    """The config with another calibration.

    Raises:
        ConfigError: something is given, but the config does not calibrate.
    """
    from ..quant.config import ConfigError

    given: dict[str, Any] = {"text": text, "windows": windows, "length": length}
    given = {key: value for key, value in given.items() if value is not None}
    if not given:
        return config
    if not config.needs_calibration:
        options = ", ".join(f"--{key}" for key in given)
        raise ConfigError(
            f"{options}: this config rounds plainly and takes no calibration text; leave it out"
        )
    return dataclasses.replace(config, calibration=dataclasses.replace(config.calibration, **given))


def calibrate(folder: Path, config: QuantConfig) -> Tensor | None:
    """The windows, int64 [windows, length], that ``config`` asks for; None where it asks for none."""
    if not config.needs_calibration:
        return None
    from ..eval.data import calibration_ids, load_text
    from ..model.checkpoint import load_tokenizer

    wanted = config.calibration
    text = load_text(wanted.text, "calibration")
    return calibration_ids(
        text, load_tokenizer(folder), windows=wanted.windows, length=wanted.length, seed=wanted.seed
    )


def summary(report: Report) -> dict[str, Any]:
    """What a report comes to, JSON-ready: numbers of modules, bytes of the quantized ones, bits a weight."""
    # a tied head has its embedding's tensors: its bytes and weights count once
    own = [o for o in report.quantized if not o.reason.startswith("tied to")]
    nbytes = sum(o.nbytes or 0 for o in own)
    weights = sum(o.shape[0] * o.shape[1] for o in own)
    return {
        "quantized": len(report.quantized),
        "kept": {o.path: o.reason for o in report.kept},
        "troubles": _troubles(report),
        "quantized_bytes": nbytes,
        "bits_per_quantized_weight": 8 * nbytes / weights if weights else None,
    }


def _show_report(console: Console, out: Path, report: Report) -> None:
    from rich.table import Table

    from ..eval.memory import human_bytes

    table = Table("what became of it", "modules", "weights", "stored", box=None, pad_edge=False)
    counts: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for o in report.outcomes:
        label = describe_spec(o.spec) if o.spec else f"kept: {o.reason.removeprefix('kept: ')}"
        counts[label] += 1
        weights[label] += o.shape[0] * o.shape[1]
        nbytes[label] += o.nbytes or 0
    for label, count in counts.items():
        size = human_bytes(nbytes[label]) if nbytes[label] else ""
        table.add_row(label, str(count), f"{weights[label]:,}", size)
    console.print(table)
    for path, words in _troubles(report).items():
        print(f"{path}: {words}")
    bits = summary(report)["bits_per_quantized_weight"]
    print(f"{out}: {bits:.3f} bits per quantized weight, scales included" if bits else out)


def _troubles(report: Report) -> dict[str, str]:
    return {o.path: o.trouble for o in report.outcomes if o.trouble} | report.copied


def _show_presets(console: Console) -> None:
    from rich.table import Table

    from ..quant.presets import PRESETS
    from ..quant.tensor import layout

    table = Table(
        "preset", "weights", "group", "scales", "bits a weight, scales included", box=None, pad_edge=False
    )
    for name, config in PRESETS.items():
        spec = config.rules[0].spec
        if "gptq-" in name or name.endswith("-all") or spec is None:
            continue
        size = 1024 * 1024
        bits = 8 * sum(d.itemsize * _count(s) for d, s in layout(spec, (1024, 1024)).values()) / size
        kind = spec.format if spec.symmetric else f"{spec.format} with zero points"
        scales = "8-bit, in blocks" if spec.double_quant else spec.scale_dtype
        table.add_row(name, kind, str(spec.group_size or "row"), scales, f"{bits:.3f}")
    console.print(table)
    print(
        "\ngptq-NAME chooses codes by GPTQ on calibration text, classic-gptq-NAME as GPTQ was published; NAME-all "
        "quantizes embedding and head too."
    )


def _count(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def describe_spec(spec: QuantSpec) -> str:
    """A spec in a few words: ``nf4, group 64, double quantization, gptq``."""
    parts = [spec.format, "per channel" if spec.group_size is None else f"group {spec.group_size}"]
    if not spec.symmetric:
        parts.append("zero points")
    if spec.double_quant:
        parts.append("double quantization")
    return ", ".join([*parts, spec.algorithm])


def add_to(app: typer.Typer) -> None:
    app.command(epilog=QUANTIZE_EPILOG)(quantize)
    app.command(epilog=CONFIGS_EPILOG)(configs)
