"""Tests of the tests: a fault is planted in the library, and the comparison with the oracle must notice."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from brise.kernels import native
from brise.quant import dequantize, double_quant, nf4, packing, refine, tensor
from brise.quant import gptq as gptq_module
from brise.quant.config import QuantSpec
from brise.quant.formats import FORMATS
from brise.quant.gptq import gptq
from brise.quant.integer import IntegerFormat
from brise.quant.nf4 import CodebookFormat, CodebookGrid, codebook
from brise.quant.rtn import rtn

from . import test_codebooks, test_double_quant, test_golden_weights, test_integers, test_packing, test_refine
from .gptq_twin import check
from .test_gptq import make_spec
from .twins import random_problem

Patch = pytest.MonkeyPatch


# comparisons with an oracle, each of them what the other test files do


def compare_nf4() -> None:
    for name in ("ties", "near ties under any absmax", "normal", "zero rows and blocks"):
        test_codebooks.assert_equals_bitsandbytes(test_codebooks.hard_weights("nf4")[name], "nf4", 64)


def compare_fp4() -> None:
    test_codebooks.assert_equals_bitsandbytes(test_codebooks.hard_weights("fp4")["normal"], "fp4", 64)


def compare_scales() -> None:
    test_double_quant.test_every_bin_and_its_borders()
    test_double_quant.assert_equals_bitsandbytes(
        torch.rand(40, 40, generator=torch.Generator().manual_seed(0)) + 0.5
    )


def compare_integers() -> None:
    test_integers.test_symmetric_by_hand()
    w = (torch.randn(4, 32, generator=torch.Generator().manual_seed(1)) * 8).round() / 4
    for symmetric in (True, False):
        for scale in (1.0, 0.377):
            spec = QuantSpec(format="int4", group_size=8, symmetric=symmetric)
            test_integers.assert_equals_twin(w * scale, spec)


def compare_packing() -> None:
    for bits, codes, expected in test_packing.GOLDEN:
        test_packing.test_bytes_by_hand(bits, codes, expected)


def compare_golden() -> None:
    for entry in test_golden_weights.GOLDEN:
        test_golden_weights.test_stored_bytes_are_read_as_ever(entry)


def compare_gptq(format: str = "int4", **options) -> Callable[[], None]:
    def compare() -> None:
        w, hessian = random_problem(24, 64, seed=31)
        spec = make_spec(format, symmetric=format != "int4", **{"block_size": 24, **options})
        check(w, spec, hessian, gptq(w, spec, hessian))

    return compare


def compare_fit() -> None:
    test_refine.test_scales_are_the_least_squares_solution("int4", False, False)


def compare_descent() -> None:
    test_refine.test_descent_takes_the_best_of_all_codes("int4", True, 48)


# the faults


def codebook_encode(
    encode: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> Callable[[Patch], None]:
    """Another way to find the place of a weight among the midpoints of the sorted values."""

    def plant(patch: Patch) -> None:
        def faulty(self, w, scale, zero=None):
            table = codebook(self.values, w.device)
            order = torch.argsort(table, stable=True)
            middles = (table[order][:-1] + table[order][1:]) / 2
            return order[encode(w, scale.clamp(min=1e-38), middles)].to(torch.uint8)

        patch.setattr(CodebookFormat, "encode", faulty)

    return plant


ties_go_up = codebook_encode(lambda w, s, m: torch.bucketize(w * (1 / s), m, right=True))
divided_not_multiplied = codebook_encode(lambda w, s, m: torch.bucketize(w / s, m))
no_fault = codebook_encode(lambda w, s, m: torch.bucketize(w * (1 / s), m))


def one_value_is_off(patch: Patch) -> None:
    values = list(FORMATS["fp4"].values)  # type: ignore[attr-defined]
    values[6] = 0.1667
    patch.setattr(native, "active", lambda: None)  # the compiled code has the table of kernels/
    patch.setitem(FORMATS, "fp4", dataclasses.replace(FORMATS["fp4"], values=tuple(values)))  # type: ignore[type-var]


def absmax_is_the_maximum(patch: Patch) -> None:
    patch.setattr(CodebookFormat, "fit", lambda self, groups, spec: (groups.amax(-1), None))


def nearest_scale_code(patch: Patch) -> None:
    """The nearest value of the dynamic map, where bitsandbytes takes that of a bin."""
    plain = double_quant.quantize_scales

    def faulty(scale):
        _, absmax, offset = plain(scale)
        table = double_quant.dynamic_map(scale.device)
        per_scale = absmax.repeat_interleave(256)[: scale.numel()].view(scale.shape)
        ratio = (scale - offset) * (1 / per_scale)
        return torch.bucketize(ratio, (table[:-1] + table[1:]) / 2).to(torch.uint8), absmax, offset

    patch.setattr(test_double_quant, "quantize_scales", faulty)


def offset_is_left_out(patch: Patch) -> None:
    plain = double_quant.quantize_scales
    patch.setattr(test_double_quant, "quantize_scales", lambda s: (*plain(s - s.mean())[:2], plain(s)[2] * 0))


def wrong_zero_point(patch: Patch) -> None:
    plain = IntegerFormat.fit

    def faulty(self, groups, spec):
        scale, zero = plain(self, groups, spec)
        return scale, None if zero is None else (zero.to(torch.int16) + 1).clamp(0, self.top).to(torch.uint8)

    patch.setattr(IntegerFormat, "fit", faulty)


def halves_go_up(patch: Patch) -> None:
    def faulty(self, w, scale, zero=None):
        middle = self.middle if zero is None else zero
        steps = torch.where(scale == 0, 0, w / scale + 0.5).floor()
        return steps.add_(middle).clamp_(0, self.top).to(torch.uint8)

    patch.setattr(IntegerFormat, "encode", faulty)


def top_code_is_missing(patch: Patch) -> None:
    plain = IntegerFormat.encode
    patch.setattr(
        IntegerFormat, "encode", lambda self, w, s, z=None: plain(self, w, s, z).clamp(max=self.top - 1)
    )


def top_step_is_missing(patch: Patch) -> None:
    plain = IntegerFormat.grid

    def faulty(self, scale, zero=None):
        grid = plain(self, scale, zero)
        return dataclasses.replace(grid, most=grid.most - 1)

    patch.setattr(IntegerFormat, "grid", faulty)


def nearest_of_the_next_group(patch: Patch) -> None:
    plain = CodebookGrid.nearest
    patch.setattr(CodebookGrid, "nearest", lambda self, w, g: plain(self, w, (g + 1) % self.scale.shape[0]))


def rounds_with_the_exact_scale(patch: Patch) -> None:
    patch.setitem(FORMATS, "int4", dataclasses.replace(FORMATS["int4"], codes_from_exact_scale=True))  # type: ignore[type-var]


def high_nibble_first(patch: Patch) -> None:
    plain = packing.pack_codes

    def faulty(codes, bits):
        out = plain(codes, bits)
        return (out << 4) | (out >> 4) if bits == 4 else out

    patch.setattr(test_packing, "pack_codes", faulty)


def three_bits_most_significant_first(patch: Patch) -> None:
    def reversed_bits(codes):
        return ((codes & 1) << 2) | (codes & 2) | (codes >> 2)

    plain = packing.unpack_codes
    patch.setattr(
        tensor, "unpack_codes", lambda p, b, n: reversed_bits(plain(p, b, n)) if b == 3 else plain(p, b, n)
    )
    patch.setattr(
        "brise.quant.dequantize.unpack_codes",
        lambda p, b, n: reversed_bits(plain(p, b, n)) if b == 3 else plain(p, b, n),
    )


def factor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        plain = gptq_module.inverse_factor

        def faulty(h):
            u = plain(h)
            return None if u is None else change(u)

        patch.setattr(gptq_module, "inverse_factor", faulty)

    return plant


def factor_of_the_hessian_itself(patch: Patch) -> None:
    patch.setattr(gptq_module, "inverse_factor", lambda h: torch.linalg.cholesky(h).T.contiguous())


def blocks_keep_their_errors(patch: Patch) -> None:
    patch.setattr(torch.Tensor, "addmm_", lambda self, *args, **kw: self)


def ascending_order(patch: Patch) -> None:
    plain = torch.argsort
    patch.setattr(torch, "argsort", lambda x, descending=False, stable=False: plain(x, stable=stable))


def order_is_not_undone(patch: Patch) -> None:
    patch.setattr(torch.Tensor, "index_copy_", lambda self, dim, index, source: self.copy_(source))


def scales_from_the_original_weights(patch: Patch) -> None:
    """Groups that move, with scales chosen as if no error had been carried over yet."""
    w, hessian = random_problem(24, 64, seed=31)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    plain = gptq_module.choose_params
    begin = iter(range(0, 64, 16))

    def faulty(now, spec, hessian=None):
        at = next(begin)
        return plain(w[:, order[at : at + 16]], spec, hessian)

    patch.setattr(gptq_module, "choose_params", faulty)


def damping_is_left_out(patch: Patch) -> None:
    plain = gptq_module.inverse_factor
    _, hessian = random_problem(24, 64, seed=31)
    extra = 0.01 * hessian.diagonal().double().mean()
    patch.setattr(
        gptq_module, "inverse_factor", lambda h: plain(h - extra * torch.eye(64, dtype=torch.float64))
    )


def codes_with_the_exact_scale(patch: Patch) -> None:
    patch.setattr(gptq_module, "stored_params", lambda params, spec: params)


def scales_a_little_large(patch: Patch) -> None:
    plain = refine.fit_scales
    patch.setattr(test_refine, "fit_scales", lambda *args: plain(*args) * 1.0005)


def half_of_the_hessian(patch: Patch) -> None:
    plain = refine.fit_scales
    patch.setattr(
        test_refine, "fit_scales", lambda w, spec, codes, params, h: plain(w, spec, codes, params, h.triu())
    )


def steps_are_carried_one_way(patch: Patch) -> None:
    plain = refine.descend
    patch.setattr(
        test_refine,
        "descend",
        lambda w, spec, codes, used, h: plain(w, spec, codes, used, h.triu()),
    )


def one_code_in_a_thousand(patch: Patch) -> None:
    plain = refine.descend

    def faulty(w, spec, codes, used, h):
        out = plain(w, spec, codes, used, h).clone()
        out[3, 17] ^= 1
        return out

    patch.setattr(test_refine, "descend", faulty)


FAULTS = [
    (compare_nf4, ties_go_up),
    (compare_nf4, divided_not_multiplied),
    (compare_nf4, absmax_is_the_maximum),
    (compare_fp4, one_value_is_off),
    (compare_scales, nearest_scale_code),
    (compare_scales, offset_is_left_out),
    (compare_integers, wrong_zero_point),
    (compare_integers, halves_go_up),
    (compare_integers, top_code_is_missing),
    (compare_integers, rounds_with_the_exact_scale),
    (compare_packing, high_nibble_first),
    (compare_golden, three_bits_most_significant_first),
    (compare_gptq(), factor(lambda u: u.diagonal().diag())),  # no error is carried over
    (compare_gptq(), factor(lambda u: 2 * u.diagonal().diag() - u)),  # with the wrong sign
    (compare_gptq(), factor(lambda u: u * (1 + 0.01 * torch.eye(64)))),  # each error 1 % too small
    (compare_gptq(act_order=False), factor_of_the_hessian_itself),
    (compare_gptq("nf4"), blocks_keep_their_errors),
    (compare_gptq(), ascending_order),
    (compare_gptq("nf4"), order_is_not_undone),
    (compare_gptq("int3", static_groups=False), scales_from_the_original_weights),
    (compare_gptq("int3"), damping_is_left_out),
    (compare_gptq(scale_dtype="bfloat16"), codes_with_the_exact_scale),
    (compare_gptq("int8"), top_step_is_missing),
    (compare_gptq("nf4"), nearest_of_the_next_group),
    (compare_fit, scales_a_little_large),
    (compare_fit, half_of_the_hessian),
    (compare_descent, steps_are_carried_one_way),
    (compare_descent, one_code_in_a_thousand),
]


@pytest.mark.parametrize(
    ("compare", "plant"),
    FAULTS,
    ids=[f"{i}-{plant.__qualname__.split('.')[0]}" for i, (_, plant) in enumerate(FAULTS)],
)
def test_the_comparison_notices(compare, plant, monkeypatch, request):
    compare()
    plant(monkeypatch)
    forget_tables()  # what the fault is in may have been looked up before
    request.addfinalizer(forget_tables)
    with pytest.raises(AssertionError):
        compare()


def forget_tables() -> None:
    for cached in (codebook, nf4._bins, dequantize._pairs):
        cached.cache_clear()


def test_the_rewritten_encoder_is_no_fault_by_itself(monkeypatch):
    """The faults above go through another encoder: without its fault it must pass."""
    no_fault(monkeypatch)
    compare_nf4()
    assert torch.equal(rtn(torch.eye(64), QuantSpec(format="nf4")).codes().diagonal(), torch.full((64,), 15))
