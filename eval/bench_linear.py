"""QuantLinear on the CPU beside bitsandbytes' layers and the dense one, in one run.

All sides hold the same weight and take turns on the same input, so that what else the machine does falls on all
alike; a ratio is taken turn by turn. Before anything is timed, each of our products must keep the error budget of
the kernels against float64, and our NF4 layer must stand for the weight that bitsandbytes' stands for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.budget import relative_error
from ..quant.config import QuantSpec
from ..quant.linear import QuantLinear
from ..quant.rtn import rtn
from .timing import BenchError, Spread, bitsandbytes_module, take_turns

DTYPES = ("float32", "bfloat16")
TOKENS = (1, 16, 512)
SPECS = {
    "int4": QuantSpec(format="int4", group_size=128),
    "nf4": QuantSpec(format="nf4"),
    "int8": QuantSpec(format="int8", group_size=None),
}
# whom each of ours is set beside
PEERS = {"int4": "bitsandbytes-4bit", "nf4": "bitsandbytes-4bit", "int8": "bitsandbytes-8bit"}
BENCH = "linear"
# int4 once more, with rows that do not depend on one another: what that costs; not for prompts
INVARIANT, INVARIANT_TOKENS = "int4-invariant", 16


def linear_rows(
    size: int,
    repeats: int,
    tokens: tuple[int, ...] = TOKENS,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Time the layers [size, size] of all sides, without a bias and without gradients.

    Returns:
        A dict for every dtype and number of tokens: seconds by side, and ratios ours / peer.

    Raises:
        ImportError: bitsandbytes is not installed.
        BenchError: a product is not what its weight gives.
    """
    say = progress or (lambda *_: None)
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES:
        made = sides(size, getattr(torch, dtype))
        for count in tokens:
            say("Linear", len(rows), len(DTYPES) * len(tokens))
            x = torch.randn(count, size, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
            with torch.inference_mode():
                taking = {n: m for n, m in made.items() if n != INVARIANT or count <= INVARIANT_TOKENS}
                errors = check(taking, x)
                times = dict(zip(taking, take_turns({n: _call(m, x) for n, m in taking.items()}, repeats)))
            rows.append(
                {
                    "bench": BENCH,
                    "dtype": dtype,
                    "shape": [size, size],
                    "tokens": count,
                    "repeats": repeats,
                    "seconds": {name: dataclasses.asdict(Spread.of(t)) for name, t in times.items()},
                    "ratios": {
                        f"{ours}/{peer}": dataclasses.asdict(
                            Spread.of([a / b for a, b in zip(times[ours], times[peer], strict=True)])
                        )
                        for name, theirs in PEERS.items()
                        for ours in (name,)
                        for peer in (theirs, "dense")
                    },
                    "errors": errors,
                    "bitsandbytes_fused": bool(bitsandbytes_module().functional.has_avx512bf16()),
                }
            )
    say("Linear", len(rows), len(rows))
    return rows


def sides(size: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The layers by name, all with one weight [size, size], ready to multiply."""
    weight = (torch.randn(size, size, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    out: dict[str, nn.Module] = {
        name: QuantLinear.from_quantized(rtn(weight.float(), spec)).eval() for name, spec in SPECS.items()
    }
    invariant = QuantLinear.from_quantized(_layer(out, "int4").quantized()).eval()
    invariant.batch_invariant = True
    bnb = bitsandbytes_module()
    four = bnb.nn.Linear4bit(size, size, False, dtype, compress_statistics=False, quant_type="nf4")
    four.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=False, quant_type="nf4")
    eight = bnb.nn.Linear8bitLt(size, size, False, has_fp16_weights=False, threshold=6.0)
    eight.weight = bnb.nn.Int8Params(weight, has_fp16_weights=False, requires_grad=False)
    dense = nn.Linear(size, size, bias=False, dtype=dtype)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    return {
        **out,
        INVARIANT: invariant,
        "bitsandbytes-4bit": four.to("cpu").eval(),
        "bitsandbytes-8bit": eight.to("cpu").eval(),
        "dense": dense.eval(),
    }


def check(made: dict[str, nn.Module], x: Tensor) -> dict[str, float]:
    """Relative error of each product against float64 on the weight that the side stands for.

    bitsandbytes' 8-bit layer rounds x as well: its error is against the dense weight, like that of ``dense``.

    Raises:
        BenchError: one of ours makes more than twice the error of eager code of that dtype.
    """
    errors = {}
    exact_x = x.double()
    for name, module in made.items():
        if isinstance(module, QuantLinear):
            weight = module.quantized().dequantize(torch.float64)
        elif name == "bitsandbytes-4bit":
            # it may hold its weight re-packed: ours is the same to the bit (tests/quant/test_codebooks.py)
            weight = _layer(made, "nf4").quantized().dequantize(torch.float64)
        else:
            weight = made["dense"].get_parameter("weight").double()
        exact = exact_x @ weight.T
        errors[name] = relative_error(module(x), exact)
        if isinstance(module, QuantLinear):
            eager = relative_error(nn.functional.linear(x, weight.to(x.dtype)), exact)
            allowed = max(2 * eager, torch.finfo(x.dtype).eps / 2)
            if not errors[name] <= allowed:
                raise BenchError(
                    f"{name} {x.dtype} with {x.shape[0]} rows: error {errors[name]:.3g}, allowed {allowed:.3g}"
                )
    return errors


def _layer(made: dict[str, nn.Module], name: str) -> QuantLinear:
    module = made[name]
    assert isinstance(module, QuantLinear)
    return module


def _call(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: module(x)


def linear_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines of the rows that :func:`linear_rows` gave."""
    shape = " × ".join(map(str, rows[0]["shape"]))
    names = list(rows[0]["seconds"])
    lines = [
        f"### Linear layers on the CPU, weight {shape}: milliseconds, all taking turns",
        "",
        f"| dtype | tokens | {' | '.join(names)} | int4 / bnb 4-bit | nf4 / bnb 4-bit | int8 / bnb 8-bit |",
        "|:--|--:|" + "--:|" * (len(names) + 3),
    ]
    for row in rows:
        cells = [row["dtype"], str(row["tokens"])]
        times = (row["seconds"].get(name) for name in names)
        cells += ["–" if t is None else Spread(**t).text(1e3) for t in times]
        cells += [Spread(**row["ratios"][f"{ours}/{peer}"]).text(1, 2) for ours, peer in PEERS.items()]
        lines.append("| " + " | ".join(cells) + " |")
    fused = "its fused product" if rows[0]["bitsandbytes_fused"] else "it decodes the weight"
    return [
        *lines,
        "",
        f"- Median (20th to 80th percentile) of {rows[0]['repeats']} turns; a ratio is taken turn by turn.",
        "- int4: groups of 128; nf4: blocks of 64; int8: per channel, weights only. bitsandbytes: NF4 in blocks of "
        "64; LLM.int8 with threshold 6, which rounds the activations to int8 as well.",
        "- int4-invariant: no row depends, in any bit, on the other rows of its batch.",
        f"- bitsandbytes' 4-bit layer has a fused product for processors with AVX512-BF16; here {fused}.",
        "- Each product of ours kept twice the error of eager code against float64 before it was timed.",
    ]
