"""``brise plan``: what a quantization will take, and which one fits a budget, before anything runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .quantize import Length, Memory, Text, Windows, calibrate, load_config, override_calibration
from .session import Debug, Json, Session, session_of
from .sources import SRC_HELP, resolve

if TYPE_CHECKING:
    from rich.console import Console

    from ..eval.budget_plan import Mixed, Uniform
    from ..eval.plan import Layout, Plan
    from ..quant.config import QuantConfig

EPILOG = """
[bold]brise plan mistralai/Mistral-7B-v0.1 --config nf4-dq-all --lengths 4096,32768[/bold]

[bold]brise plan build/7b --budget 3.5GiB[/bold]  the presets that fit

[bold]brise plan smollm2-135m --like gptq-int3-g64-all --mixed --measure --out results/plan[/bold]
"""


def plan(
    ctx: typer.Context,
    src: Annotated[str, typer.Argument(metavar="SRC", help=SRC_HELP)],
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="The ledger of this preset or file.")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens whose KV cache is counted.")] = "1024,4096,32768",
    memory: Annotated[Memory, typer.Option(help="As in brise quantize.")] = Memory.memory,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE", help="3.5GiB, 900MB, 3.25bits (a weight): propose what fits; may be given twice."
        ),
    ] = None,
    like: Annotated[
        list[str] | None, typer.Option(metavar="PRESET", help="A budget of the bytes that this preset takes.")
    ] = None,
    gptq: Annotated[
        bool, typer.Option("--gptq/--plain", help="Presets and formats under GPTQ, or rounded.")
    ] = True,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Measure sensitivities, and find the best format of every module.")
    ] = False,
    keep_ends: Annotated[
        bool, typer.Option("--keep-ends", help="Leave embedding and head as they are.")
    ] = False,
    text: Text = None,
    windows: Windows = None,
    length: Length = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For the mixed configs, and with --measure the rows.")
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Quantize and evaluate the proposals, beside the preset of --like."),
    ] = False,
    checkpoints: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For those; the default is --out's.")
    ] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a quantization takes before it runs: bytes by kind, bits, the job's peak, the KV cache.

    With a budget, propose what fits. --mixed measures what each module's quantization does to the predictions, on
    a calibration text (8 windows of 512 tokens unless said otherwise; cached), and solves for the least loss.
    """
    session = session_of(ctx)
    # slips show before anything is downloaded
    chosen = None if config is None else override_calibration(load_config(config), text, windows, length)
    models = {name: load_config(name) for name in like or []}
    tokens = _lengths(lengths)
    if chosen is None and not budget and not models:
        raise ValueError("nothing to plan: give --config, --budget or --like")
    if measure and (out is None or not mixed):
        raise ValueError("--measure needs --mixed, and --out for its rows")
    folder = resolve(src, session)

    from ..eval.plan import Layout, parse_size
    from ..model.source import open_source

    layout = Layout.of(open_source(folder))
    document: dict[str, Any] = {"source": src}
    made = None
    if chosen is not None:
        made = layout.plan(chosen, tokens, memory.value)
        document |= {"config": config, **made.to_dict()}
    parameters = layout.parameters
    budgets = {text: parse_size(text, parameters) for text in budget or []}
    budgets |= {f"like-{name}": layout.ledger(model).nbytes for name, model in models.items()}
    proposals = _Proposals(session, folder, layout, gptq, keep_ends, (text, windows, length), mixed)
    found = {name: proposals.propose(size) for name, size in budgets.items()}
    document["budgets"] = {
        name: {
            "budget": budgets[name],
            "uniform": [dataclasses.asdict(u) for u in uniform],
            "mixed": None if best is None else best.to_dict(),
        }
        for name, (uniform, best) in found.items()
    }
    files = _write(out, found)
    document["files"] = [str(file) for file in files]
    if measure and out is not None:
        document["measured"] = _measure(session, str(folder), found, models, out, checkpoints)
    session.finish(document, lambda console: _show(console, document, made, found, budgets))


class _Proposals:
    """Proposals for any number of budgets; sensitivities are measured once."""

    def __init__(
        self,
        session: Session,
        folder: Path,
        layout: Layout,
        gptq: bool,
        keep_ends: bool,
        calibration: tuple[str | None, int | None, int | None],
        mixed: bool,
    ) -> None:
        from ..eval.budget_plan import candidates
        from ..eval.sensitivity import measure_sensitivities
        from ..kernels.cache_folder import cache_root
        from ..quant.config import Calibration
        from ..quant.presets import PRESETS

        self.layout, self.keep_ends = layout, keep_ends
        self.prefix = "gptq-" if gptq else ""
        self.losses = None
        if not mixed:
            return
        self.specs = candidates(layout, self.prefix)
        self.calibration = PRESETS["gptq-nf4"].calibration if gptq else Calibration()
        text, windows, length = calibration
        asked = override_calibration(
            dataclasses.replace(PRESETS["gptq-nf4"], calibration=Calibration(windows=8, length=512)),
            text,
            windows,
            length,
        )
        if text is not None and gptq:
            self.calibration = dataclasses.replace(self.calibration, text=text)
        ids = calibrate(folder, asked)
        assert ids is not None
        with session.progress() as bars:
            self.losses = measure_sensitivities(
                layout.source, ids, self.specs, cache_root() / "sensitivity", progress=bars
            )

    def propose(self, budget: int) -> tuple[list[Uniform], Mixed | None]:
        from ..eval.budget_plan import mixed_plan, uniform_plans

        uniform = uniform_plans(self.layout, budget, self.prefix, self.losses)
        if self.losses is None:
            return uniform, None
        best = mixed_plan(
            self.layout, budget, self.losses, self.specs, self.calibration, keep_ends=self.keep_ends
        )
        return uniform, best


def _lengths(text: str) -> list[int]:
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ValueError(f"--lengths takes numbers of tokens with commas between, got {text!r}")
    return found


def _write(out: Path | None, found: dict[str, tuple[list[Uniform], Mixed | None]]) -> list[Path]:
    import yaml

    files = []
    for name, (_, best) in found.items():
        if out is not None and best is not None:
            out.mkdir(parents=True, exist_ok=True)
            files.append(out / f"mixed-{name}.yaml")
            files[-1].write_text(yaml.safe_dump(best.config.to_dict(), sort_keys=False))
    return files


def _measure(
    session: Session,
    source: str,
    found: dict[str, tuple[list[Uniform], Mixed | None]],
    like: dict[str, QuantConfig],
    out: Path,
    checkpoints: Path | None,
) -> dict[str, Any]:
    """KL and its standard error of every mixture and every preset of --like, by the sweep, which resumes."""
    from ..eval.provenance import command_line
    from ..eval.sweep import run_sweep

    configs = {f"mixed-{name}": best.config for name, (_, best) in found.items() if best is not None}
    with session.progress() as bars:
        result = run_sweep(
            source, {**configs, **like}, out, checkpoints=checkpoints, command=command_line(), progress=bars
        )
    if result.failures:
        raise RuntimeError("; ".join(str(failure) for failure in result.failures))
    return {
        row.name: {
            "kl": None if row.divergence is None else row.divergence.kl,
            "kl_stderr": None if row.divergence is None else row.divergence.kl_stderr,
            "bytes": row.memory.bytes,
        }
        for row in result.rows
    }


def _show(
    console: Console,
    document: dict[str, Any],
    made: Plan | None,
    found: dict[str, tuple[list[Uniform], Mixed | None]],
    budgets: dict[str, int],
) -> None:
    from rich.table import Table

    from ..eval.memory import human_bytes

    if made is not None:
        table = Table(box=None, pad_edge=False, show_header=False)
        for heading, parts in (
            ("on disk, by kind", made.ledger.by_kind()),
            ("by part", made.ledger.by_part()),
        ):
            table.add_row(f"[bold]{heading}[/bold]")
            for name, nbytes in parts.items():
                if nbytes:
                    table.add_row(f"  {name.replace('_', ' ')}", f"{nbytes:,} B", human_bytes(nbytes))
        total = made.ledger.nbytes
        table.add_row("[bold]tensors in all[/bold]", f"{total:,} B", human_bytes(total))
        table.add_row("peak of the job, about", "", human_bytes(made.peak))
        if made.scratch:
            table.add_row("activations on disk meanwhile", f"{made.scratch:,} B", human_bytes(made.scratch))
        for length, nbytes in made.kv_cache.items():
            table.add_row(f"KV cache of {length:,} tokens", f"{nbytes:,} B", human_bytes(nbytes))
        console.print(table)
        bits = made.ledger.bits_per_weight
        print(f"{made.ledger.parameters:,} weights, {bits:.3f} bits each with everything counted")
    measured = document.get("measured", {})
    for name, (uniform, best) in found.items():
        table = Table(
            f"within {name} ({budgets[name]:,} B)", "bytes", "bits", "predicted KL", "measured KL", box=None
        )
        if best is not None:
            label, kl = f"mixed-{name}", best.allocation.loss
            table.add_row(label, f"{best.nbytes:,}", f"{best.bits:.3f}", f"{kl:.4f}", _kl(measured, label))
        for u in uniform[:5]:
            predicted = "" if u.predicted is None else f"{u.predicted:.4f}"
            table.add_row(u.name, f"{u.nbytes:,}", f"{u.bits:.3f}", predicted, _kl(measured, u.name))
        console.print(table)
    for file in document["files"]:
        print(file)


def _kl(measured: dict[str, Any], name: str) -> str:
    from ..eval.report import pm

    row = measured.get(name)
    return "" if row is None or row["kl"] is None else pm(row["kl"], row["kl_stderr"], 4)


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(plan)
