"""The rows of a GPU run as Markdown: ceilings, goals, then every case with its peers."""

from __future__ import annotations

from typing import Any

_MET = {"aim": "better than hoped", "limit": "reached", "open": "**missed**", None: "not measured"}


def markdown(rows: list[dict[str, Any]], left: int = 0) -> str:
    """Everything that was measured; ``left`` cases are still to come, or were left out for want of time."""
    first = rows[0]
    origin = first["provenance"]
    measured = [row for row in rows if "ok" in row]
    lines = [
        f"### {origin['device']}",
        "",
        f"- Read {first['read_bytes_per_second'] / 1e12:.2f} TB/s, copy "
        f"{first['copy_bytes_per_second'] / 1e12:.2f} TB/s, bf16 product of {first['product']}^3 "
        f"{first['flops_per_second'] / 1e12:.0f} TFLOP/s, a graph node {first['node_seconds'] * 1e6:.2f} us.",
        f"- {len(measured)} cases, {sum(not r['ok'] for r in measured)} wrong, {left} not measured (time).",
        "- Microseconds: median (20th to 80th percentile) of graph replays over copies of 240 MB in all, all sides "
        "taking turns. Error: relative, against float64.",
        f"- {', '.join(f'{k} {v}' for k, v in origin['versions'].items() if v)}; {origin['time']}.",
        "",
    ]
    lines += _goals(measured) + _sixteen(measured)
    for family in dict.fromkeys(row["family"] for row in measured):
        lines += _family(family, [row for row in measured if row["family"] == family])
    return "\n".join(lines)


def _goals(rows: list[dict[str, Any]]) -> list[str]:
    with_goal = [row for row in rows if row["goal"] is not None]
    if not with_goal:
        return []
    lines = ["| goal | floor | limit | aim | reached | |", "|:--|--:|--:|--:|--:|:--|"]
    for row in with_goal:
        goal = row["goal"]
        sign = "≥" if goal["higher"] else "≤"
        floor = "–" if goal["floor"] is None else f"{goal['floor']:g}"
        value = "–" if goal["value"] is None else f"{goal['value']:.3g} {goal['unit']}"
        lines.append(
            f"| {row['family']} {row['case']} | {floor} | {sign} {goal['limit']:g} | {sign} {goal['aim']:g} "
            f"| {value} | {_MET[goal['met']]} |"
        )
    return [*lines, ""]


def _sixteen(rows: list[dict[str, Any]]) -> list[str]:
    """What sixteen tokens cost beside one, where both were measured: the goal is 1.15 times, the hope 1.05."""
    times = {
        (row["dtype"], row["m"]): row["seconds"]["ours"]["median"]
        for row in rows
        if row["family"] == "matmul" and row["ok"] and (row["format"], row["n"]) == ("int4", 28672)
    }
    lines = [
        f"- int4 {dtype} 28672x4096: 16 tokens take {times[dtype, 16] / times[dtype, 1]:.2f} times as long as one "
        "(goal ≤ 1.15, hoped for ≤ 1.05)."
        for dtype in dict.fromkeys(dtype for dtype, _ in times)
        if {(dtype, 1), (dtype, 16)} <= set(times)
    ]
    return [*lines, ""] if lines else []


def _family(family: str, rows: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in [*row["seconds"], *row["missing"]]))
    lines = [
        f"| {family} | {' | '.join(names)} | error | allowed | TFLOP/s | TB/s |",
        "|:--|" + "--:|" * (len(names) + 4),
    ]
    notes: dict[str, str] = {}
    for row in rows:
        cells = []
        for name in names:
            spread = row["seconds"].get(name)
            cells.append("–" if spread is None else _microseconds(spread))
        for name, why in row["missing"].items():
            notes.setdefault(f"{name}: {why}", row["case"])
        ours = row["seconds"].get(row["ours"], {}).get("median")
        error = row["errors"].get(row["ours"])
        cells.append("–" if error is None else f"{error:.2g}")
        cells.append(f"{row['allowed']:.2g}")
        cells.append("–" if not ours else f"{row['flops'] / ours / 1e12:.3g}")
        cells.append("–" if not ours else f"{row['bytes'] / ours / 1e12:.3g}")
        lines.append(f"| {row['case']} | {' | '.join(cells)} |")
    return [*lines, "", *(f"- {note} (first at {case})" for note, case in notes.items()), ""]


def _microseconds(spread: dict[str, float]) -> str:
    return f"{spread['median'] * 1e6:.2f} ({spread['p20'] * 1e6:.2f}–{spread['p80'] * 1e6:.2f})"
