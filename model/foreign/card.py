"""The README.md of an exported folder: what it is, what it cost, how to load it in each tool, whose licence."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ...quant.config import QuantSpec
from ..reader import CheckpointReader, inside
from .formats import ForeignFormat
from .plan import Plan, Verdict

_MAX_README = 1 << 20


def model_card(
    reader: CheckpointReader,
    format: ForeignFormat,
    plan: Plan,
    name: str,
    *,
    base_model: str | None = None,
    figures: str | None = None,
) -> str:
    """The text of README.md.

    Args:
        reader: the source.
        name: of the new model, its title.
        base_model: hub name of the model it was made from; by default what the source's own card says.
        figures: a table of what was measured, in Markdown; None says that nothing was.
    """
    known = front_matter(reader.folder)
    base = base_model or known.get("base_model")
    licence = known.get("license")
    files = sorted(p.name for p in reader.folder.glob("LICENSE*")) if reader.folder.is_dir() else []
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["quantized", format.name]}
    if isinstance(base, str):
        head |= {"base_model": base, "base_model_relation": "quantized"}
    if isinstance(licence, str):
        head["license"] = licence
    parts = [
        "---\n" + yaml.safe_dump(head, sort_keys=True).strip() + "\n---",
        f"# {name}",
        f"{format.title}, written by brise {version('brise')}"
        + (f" from [{base}](https://huggingface.co/{base})." if isinstance(base, str) else "."),
        "## Configuration\n\n" + configuration(plan),
        "## What it cost\n\n" + (figures or "Nothing was measured of this checkpoint. `brise eval` does."),
        "## How to load it\n\n" + loading(format.loads, name),
        "## Licence\n\n" + licence_text(licence, files, base),
    ]
    return "\n\n".join(parts) + "\n"


def configuration(plan: Plan) -> str:
    """A table of how many weights became what, and what the conversion did."""
    rows = Counter(
        (describe(step.target), step.verdict.value) for step in plan.steps if step.target is not None
    )
    lines = ["| weights | stored as | conversion |", "|--:|:--|:--|"]
    lines += [f"| {count} | {spec} | {verdict} |" for (spec, verdict), count in sorted(rows.items())]
    text = "\n".join(lines) + f"\n\nThe conversion {plan.describe()}."
    decoded = [step.path for step in plan.of(Verdict.DECODED)]
    return text + (f" Decoded: {', '.join(decoded)}." if decoded else "")


def describe(spec: QuantSpec | None) -> str:
    """A spec in words: ``int4, group 64, asymmetric, scales float16``."""
    if spec is None:
        return "not quantized"
    group = "one scale a row" if spec.group_size is None else f"group {spec.group_size}"
    parts = [spec.format, group, "" if spec.symmetric else "asymmetric"]
    parts.append("double quantization" if spec.double_quant else f"scales {spec.scale_dtype}")
    return ", ".join(part for part in parts if part)


def loading(loads: tuple[tuple[str, str], ...], name: str) -> str:
    """How to load the folder in each tool."""
    parts = []
    for tool, code in loads:
        language = "sh" if tool == "llama.cpp" else "python"
        parts.append(f"{tool}:\n\n```{language}\n{code.replace('FOLDER', name)}\n```")
    return "\n\n".join(parts)


def licence_text(licence: Any, files: list[str], base: Any) -> str:
    """Whose licence holds, as far as the source says."""
    of = f"of {base}" if isinstance(base, str) else "of the model that this one was made from"
    if files:
        return f"That {of}: see {', '.join(files)}."
    if isinstance(licence, str):
        return f"That {of}: {licence}."
    return f"The licence {of} holds; its folder named none, so look it up there before you pass this on."


def front_matter(folder: Path) -> dict[str, Any]:
    """What the source's own card says at its head; empty where it has no card, or none that can be read."""
    path = folder / "README.md"
    if not folder.is_dir() or not path.is_file() or path.stat().st_size > _MAX_README:
        return {}
    text = inside(folder, "README.md").read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        data = yaml.safe_load(text[4:].partition("\n---")[0])
    except (yaml.YAMLError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
