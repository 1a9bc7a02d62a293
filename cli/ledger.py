"""``brise inspect``: where the bytes of a checkpoint are, or would be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import numbers
from .quantize import describe_spec, load_config
from .session import Debug, Json, session_of
from .sources import SRC_HELP, resolve
from .surface import sliding_windows

if TYPE_CHECKING:
    from rich.console import Console

    from ..eval.memory import Ledger
    from ..quant.config import QuantConfig, QuantSpec

EPILOG = """
[bold]brise inspect build/nf4[/bold]

[bold]brise inspect smollm2-135m --config gptq-int3-g64[/bold]  what that would take; nothing is quantized

[bold]brise inspect build/nf4 --modules --length 8192[/bold]

[bold]brise inspect ./Mistral-7B-v0.1 --contexts 1024,8192,32768 --sliding own,1024[/bold]
"""


def inspect(
    ctx: typer.Context,
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help=SRC_HELP)],
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", help="Predict what CKPT would take under this preset or file."),
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens of the text whose KV cache is counted.")] = 1024,
    contexts: Annotated[
        str, typer.Option(metavar="1024,8192", help="Contexts of a table of the KV cache, against windows.")
    ] = "",
    sliding: Annotated[
        str | None,
        typer.Option(metavar="own,256", help="Sliding windows of that table; own, the model's, by default."),
    ] = None,
    modules: Annotated[bool, typer.Option("--modules", help="List every stored tensor.")] = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Show where the bytes are: codes, scales, zeros, kept weights, embedding, head, KV cache.

    Read from the headers of the files and checked against what the configuration predicts.
    """
    session = session_of(ctx)
    if sliding is not None and not contexts:
        raise typer.BadParameter("is for the table of --contexts", param_hint="'--sliding'")
    chosen = None if config is None else load_config(config)
    folder = resolve(checkpoint, session)
    ledger, specs, model_config = _ledger(folder, chosen)

    from ..eval.memory import kv_cache_bytes, kv_cache_grid

    document: dict[str, Any] = {
        "checkpoint": checkpoint,
        "predicted_for": config,
        **ledger.to_dict(),
        "kv_cache": kv_cache_bytes(model_config, length),
        "kv_length": length,
        "specs": dict(Counter(describe_spec(spec) for spec in specs.values())),
    }
    if contexts:
        document["kv_caches"] = kv_cache_grid(
            model_config, numbers(contexts), sliding_windows(sliding or "own")
        )
    if modules:
        document["tensors"] = [
            {
                "name": e.name,
                "part": e.part,
                "kind": e.kind,
                "dtype": str(e.dtype).removeprefix("torch."),
                "shape": list(e.shape),
                "bytes": e.nbytes,
            }
            for e in ledger.entries
        ]
    session.finish(document, lambda console: _show(console, document))


def _ledger(folder: Path, config: QuantConfig | None) -> tuple[Ledger, dict[str, QuantSpec], Any]:
    """The ledger, the spec of every quantized module, and the model's configuration.

    Raises:
        ConfigError: the config does not fit the model, or the model is quantized already.
        LedgerError: the files are not what their configuration predicts.
    """
    from ..eval.memory import check_ledger, ledger_of_checkpoint, predict_ledger
    from ..model.checkpoint import empty_model
    from ..model.foreign.reader import open_checkpoint
    from ..model.quantization_entry import read_entry
    from ..quant.apply import find_targets, resolve
    from ..quant.config import ConfigError

    data = dict(open_checkpoint(folder).config)
    entry = data.pop("quantization_config", None)
    model = empty_model(data)
    if config is not None:
        if entry is not None:
            raise ConfigError(
                f"{folder} is quantized already: give the checkpoint it was made from, or no --config"
            )
        specs = {path: spec for path, (spec, _) in resolve(config, find_targets(model)).items() if spec}
        return predict_ledger(model.config, config), specs, model.config
    found = ledger_of_checkpoint(folder)
    if entry is None:
        return found, {}, model.config
    _, specs = read_entry(entry, str(folder / "config.json"))
    check_ledger(predict_ledger(model.config, specs), found)
    return found, specs, model.config


def _show(console: Console, document: dict[str, Any]) -> None:
    from rich.table import Table

    from ..eval.memory import human_bytes

    total = document["bytes"]
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    for heading, parts in (("what the bytes are for", "by_kind"), ("where they are", "by_part")):
        table.add_row(f"[bold]{heading}[/bold]")
        for name, nbytes in document[parts].items():
            if nbytes:
                table.add_row(f"  {name.replace('_', ' ')}", human_bytes(nbytes), f"{nbytes / total:.1%}")
    table.add_row("[bold]in all[/bold]", human_bytes(total), "")
    table.add_row(f"KV cache of {document['kv_length']} tokens", human_bytes(document["kv_cache"]), "")
    console.print(table)
    _show_caches(console, document.get("kv_caches", []))
    bits = document["bits_per_quantized_weight"]
    quantized = "" if bits is None else f", {bits:.3f} per quantized weight"
    weights = f"{document['parameters'] / 1e6:,.1f} M weights"
    print(
        f"\n{weights}, {document['bits_per_weight']:.3f} bits per weight with everything counted{quantized}"
    )
    for spec, count in document["specs"].items():
        print(f"{count} modules: {spec}")
    if document["predicted_for"] is not None:
        print(f"predicted for {document['predicted_for']}; nothing was quantized")
    for t in document.get("tensors", []):
        print(f"{t['bytes']:>12,}  {t['part']:9}  {t['kind']:12}  {t['dtype']:8}  {t['name']}  {t['shape']}")


def _show_caches(console: Console, caches: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from ..eval.memory import human_bytes

    if not caches:
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("KV cache of tokens", justify="right")
    windows = list(dict.fromkeys(cache["window"] for cache in caches))
    for window in windows:
        table.add_column(f"window {window or 'own'}", justify="right")
    for context in dict.fromkeys(cache["context"] for cache in caches):
        sizes = [human_bytes(cache["bytes"]) for cache in caches if cache["context"] == context]
        table.add_row(f"{context:,}", *sizes)
    console.print(table)


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(inspect)
