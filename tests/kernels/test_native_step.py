"""The compiled decode step against transformers' Mistral in float64: windows, rings, formats, texts side by side."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from transformers import MistralConfig, MistralModel

from brise.kernels import native, reference
from brise.kernels.budget import check_budget
from brise.kernels.native_step import NativeStep, StepBlock, StepWeight
from brise.kernels.reference import Weight
from brise.quant.config import QuantSpec
from brise.quant.double_quant import dynamic_map
from brise.quant.rtn import rtn

KINDS = ("AMX", "AVX512_BF16", "AVX512", "AVX2")
RUNNABLE = KINDS[KINDS.index(native.processor()) :] if native.processor() in KINDS else ()
NAMES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
NAMES |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
FORMATS = [
    None,
    QuantSpec(format="nf4", group_size=64),
    QuantSpec(format="nf4", group_size=32, double_quant=True),
    QuantSpec(format="int4", group_size=None),
    QuantSpec(format="int4", group_size=32, symmetric=False),
    QuantSpec(format="int8", group_size=None),
    QuantSpec(format="int8", group_size=64, symmetric=False),
    QuantSpec(format="int3", group_size=32),
    QuantSpec(format="int3", group_size=64, symmetric=False),
    QuantSpec(format="int2", group_size=64),
]


@pytest.fixture(params=KINDS)
def library(request):
    if request.param not in RUNNABLE:
        pytest.skip(f"this processor has no {request.param}")
    found = native.library(request.param)
    if found is None:
        pytest.skip("there is no C compiler here")
    return found


class Case:
    """A random model: as the step takes it, and as transformers runs it in any precision."""

    def __init__(self, library, spec=None, *, window=None, layers=2, head=32, inner=192, width=128, sharp=1):
        torch.manual_seed(11)
        self.config = MistralConfig(
            vocab_size=8, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=6, num_key_value_heads=2, head_dim=head, sliding_window=window,
            attn_implementation="eager", initializer_range=0.15, max_position_embeddings=512, rms_norm_eps=1e-2,
        )  # fmt: skip
        self.model = MistralModel(self.config).eval()
        blocks = []
        for block in self.model.layers:
            weights = {}
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
            for name, path in NAMES.items():
                layer = block.get_submodule(path)
                layer.weight.data *= sharp if name in ("q", "k") else 1
                stored = _stored(layer.weight.detach(), spec)
                weights[name] = StepWeight.of(stored, library)
                if spec is not None:
                    layer.weight = torch.nn.Parameter(reference.dequantize(stored))
            norms = (block.input_layernorm.weight.detach(), block.post_attention_layernorm.weight.detach())
            blocks.append(StepBlock(*norms, **weights))
        self.window, self.layers = window, layers
        self.step = NativeStep(blocks, 6, 2, head, self.config.rms_norm_eps, head**-0.5, library)

    @torch.inference_mode()
    def oracle(self, x, dtype):
        """x [T, D], one text from its beginning -> [T, D] in ``dtype``, by transformers, before its last norm."""
        model, found = self.model.to(dtype), []
        hook = model.layers[-1].register_forward_hook(lambda _m, _i, out: found.append(out))
        model(inputs_embeds=x.to(dtype)[None], use_cache=False)
        hook.remove()
        self.model.float()
        return found[0][0]

    def rings(self, texts, slots, fill=float("nan")):
        shape = (texts, 2, slots, self.config.head_dim)
        return [[torch.full(shape, fill) for _ in range(self.layers)] for _ in range(2)]

    def run(self, x, rings, first, seen):
        """x [B, T, D] at the positions from ``first`` on."""
        first, seen = (torch.tensor(t, dtype=torch.int32) for t in (first, seen))
        at = first.clamp(min=0)[:, None] + torch.arange(x.shape[1])
        cos, sin = self.model.rotary_emb(x, at)
        return self.step(x, *rings, cos, sin, first, seen, self.window)


def _stored(weight, spec):
    if spec is None:
        return weight
    q = rtn(weight, spec)
    scales_map = dynamic_map(torch.device("cpu")) if spec.double_quant else None
    return Weight(spec.format, q.shape, **q.tensors, scales_map=scales_map)


def write(case, x, slots, sizes, rings=None):
    """One text x [T, D] in steps of ``sizes`` tokens -> [T, D]."""
    rings = rings or case.rings(1, slots)
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return torch.cat([case.run(x[None, a:b], rings, [a], [b])[0] for a, b in pairwise(ends)])


@pytest.mark.parametrize(
    "spec", FORMATS, ids=lambda s: "dense" if s is None else f"{s.format}-{s.group_size}"
)
def test_every_format_keeps_the_budget(library, spec):
    case = Case(library, spec)
    x = torch.randn(9, 128)
    out = write(case, x, 16, [1, 1, 3, 1, 1, 1, 1])
    check_budget(out, case.oracle(x, torch.float32), case.oracle(x, torch.float64))


@pytest.mark.parametrize("fmt, symmetric", [("int4", True), ("int4", False), ("int2", True)])
def test_long_rows_of_integers(library, fmt, symmetric):
    """Wide enough for products in integers, and of a width that ends within a chunk."""
    spec = QuantSpec(format=fmt, group_size=32, symmetric=symmetric)
    case = Case(library, spec, layers=1, inner=1056)
    x = torch.randn(4, 128)
    out = write(case, x, 8, [1, 2, 1])
    check_budget(out, case.oracle(x, torch.float32), case.oracle(x, torch.float64))


@pytest.mark.parametrize("window, spare", [(1, 0), (5, 0), (5, 2), (8, 2), (None, 0)])
@pytest.mark.parametrize("head", [16, 80])
def test_windows_and_rings_that_wrap(library, window, spare, head):
    case = Case(library, window=window, head=head)
    x = torch.randn(23, 128)
    slots = 23 if window is None else window + spare
    sizes = [1 + spare] * (23 // (1 + spare)) + [1] * (23 % (1 + spare))
    out = write(case, x, slots, sizes)
    check_budget(out, case.oracle(x, torch.float32), case.oracle(x, torch.float64))


def test_texts_longer_than_a_segment(library):
    """Segments whose scores are far apart: e^100 and more between them."""
    case = Case(library, layers=1, sharp=12)
    x = torch.randn(300, 128)
    out = write(case, x, 301, [1] * 300)
    check_budget(out, case.oracle(x, torch.float32), case.oracle(x, torch.float64))


@pytest.mark.parametrize("fmt", ["nf4", "int4"])
def test_a_token_does_not_depend_on_what_it_is_computed_beside(library, fmt):
    """Texts of different lengths, some at rest, and other numbers of threads: the same bits as alone."""
    spec = QuantSpec(format=fmt, group_size=64)
    case = Case(library, spec, window=6, inner=1152, width=384)
    texts = [torch.randn(n, 384) for n in (12, 3, 7, 9, 1, 5, 2, 8, 4, 6)]
    rings = case.rings(len(texts), 6)
    before = torch.get_num_threads()
    found = [[] for _ in texts]
    try:
        for i in range(12):
            torch.set_num_threads(1 + i % 3)
            first = [i if i < len(t) else -1 for t in texts]
            seen = [min(i + 1, len(t)) for t in texts]
            x = torch.stack([t[min(i, len(t) - 1)] for t in texts])[:, None]
            copies = [[t.clone() for t in part] for part in rings]
            out = case.run(x, rings, first, seen)
            for b, t in enumerate(texts):
                if i < len(t):
                    found[b].append(out[b])
                else:
                    for part, copy in zip(rings, copies):
                        assert all(_same(r[b], c[b]) for r, c in zip(part, copy)), (
                            "a text at rest was written"
                        )
    finally:
        torch.set_num_threads(before)
    for t, parts in zip(texts, found):
        assert torch.equal(torch.cat(parts), write(case, t, 6, [1] * len(t)))


def _same(a, b):
    return torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))


def test_a_broken_text_breaks_no_other(library):
    case = Case(library)
    x = torch.randn(2, 4, 128)
    x[0, 1] = float("nan")
    rings = case.rings(2, 8)
    out = torch.cat([case.run(x[:, i : i + 1], rings, [i, i], [i + 1, i + 1]) for i in range(4)], dim=1)
    assert torch.equal(out[1], write(case, x[1], 8, [1] * 4))
    assert torch.isfinite(out[0, 0]).all() and out[0, 1:].isnan().all()


def test_scores_that_are_infinite_come_out_as_no_number(library):
    case = Case(library, layers=1)
    x = torch.randn(3, 128)
    rings = case.rings(1, 4, fill=0.0)
    write(case, x[:2], 4, [1, 1], rings)
    rings[0][0][0, :, 1] = float("inf")
    assert case.run(x[None, 2:], rings, [2], [3]).isnan().all()


def test_a_segment_without_one_number_is_not_passed_over(library):
    case = Case(library, layers=1)
    rings = case.rings(1, 200, fill=0.0)
    rings[0][0][0, :, :128] = float("nan")
    assert case.run(torch.randn(1, 1, 128), rings, [140], [141]).isnan().all()


def test_weights_that_do_not_fit_are_refused():
    library = native.active()
    if library is None:
        pytest.skip("there is no compiled code here")
    case = Case(library)
    block = case.step.blocks[0]
    small = StepWeight.of(torch.randn(64, 128), library)
    with pytest.raises(ValueError, match=r"down of block 0 must be \[128, 192\], got \[64, 128\]"):
        NativeStep([dataclasses.replace(block, down=small)], 6, 2, 32, 1e-5, 1.0, library)
    with pytest.raises(ValueError, match="heads of 24"):
        NativeStep([block], 8, 2, 24, 1e-5, 1.0, library)
    assert StepWeight.of(torch.randn(8, 30), library) is None
    assert StepWeight.of(torch.randn(8, 32).bfloat16(), library) is None
    q = rtn(torch.randn(8, 64), QuantSpec(format="int3", group_size=16))
    assert StepWeight.of(Weight("int3", (8, 64), **q.tensors), library) is None
