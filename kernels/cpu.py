"""Matrix products with quantized weights on a CPU, without ever making the whole dense matrix.

Where the machine has a C compiler, by the compiled code of :mod:`.native`: few rows in registers, for many a block of
the weight is decoded into memory and multiplied by torch's own product. What follows is the way without.

A block of a million weights is decoded, multiplied and dropped (smaller ones that fit the L2 cache lost to
the cost of calling operators: 4096 x 4096 nf4 took 25 ms at 2^20 weights a block, 45 at 2^16). Three tricks
make torch's own elementwise operators fast enough at it (measured on AVX-512, one thread): nf4, fp4, int3
and int2 look up four weights at a time (nf4 in a table of 65536: 0.6 ns a weight, 0.4 where its values may be
fp16; byte pairs 0.7, a gather of single codes 1.5); 4-bit integers are never interleaved, the even and the
odd channels are two products; and uint8 -> float copies run at 0.2 ns a weight where uint8 -> int32 takes 2.
int4 under bf16 activations uses torch's packed int4 product, which is an order of magnitude faster still (in fp32 and
fp16 that operator is scalar code and is not used), and int8 its int8 product.
"""

from __future__ import annotations

from ctypes import CDLL
from functools import lru_cache

import torch
from torch import Tensor

from . import native, reference
from .reference import Weight

# weights decoded at a time
_BLOCK = 1 << 20
# from this many rows on the product, not the decoding, takes the time: bf16 pays where the chip multiplies it
_MANY_ROWS = 32
# rows up to which the compiled product, which decodes once for four rows, beats decoding into memory once for all: of 2
# to 4 bits, and of 8
_FEW_ROWS = (48, 16)
# and where torch's bf16 product is fast
_FEW_ROWS_BF16 = (16, 4)
# and by tile registers (native_tiles.h), by the groups of a chunk, as fewer tokens share a register then: of integers,
# with x in bf16, and there of one scale a row, which is multiplied once, and of values in bf16
_FEW_ROWS_TILES = {1: 1 << 30, 2: 64}
_FEW_ROWS_TILES_BF16 = {1: 64, 2: 16}
_FEW_ROWS_TILES_BF16_ONE_SCALE = 256
_FEW_ROWS_VALUES = {1: 512, 2: 64, 4: 32}
# input channels from which int4 is two products
_WIDE = 256
# rows up to which torch's int8 product is faster than decoding the weight once for all of them
_INT8PACK_ROWS = 16
_QUAD_BITS = ("nf4", "fp4", "int3", "int2")
_HALVES = (torch.float16, torch.bfloat16)
INT4PACK_GROUPS = (32, 64, 128, 256)
# rows up to which torch's packed int4 product is faster than decoding the weight once for all of them
INT4PACK_ROWS = 32


def matmul(x: Tensor, w: Weight, bias: Tensor | None = None, batch_invariant: bool = False) -> Tensor:
    """x [M, K] @ W^T (+ bias) -> [M, N] in x's dtype; sums in fp32, or in x's dtype's own product for many
    rows."""
    compiled = compiled_for(w, x.dtype)
    if compiled is not None and (batch_invariant or x.shape[0] <= few_rows(w, x.dtype, compiled)):
        return native.matmul(x, w, bias, compiled, batch_invariant)
    if _takes_int8pack(x, w, batch_invariant):
        return _int8pack(x, w, bias, batch_invariant)
    return _in_blocks(x, w, bias, batch_invariant, compiled)


def few_rows(w: Weight, dtype: torch.dtype, compiled: CDLL) -> int:
    """Rows of ``dtype`` up to which the compiled product is the faster one."""
    fast = dtype == torch.bfloat16 and _has_bf16_products()
    parts = native.tile_parts(w, dtype, compiled)
    if parts:
        if w.format in reference.CODEBOOKS:
            return _FEW_ROWS_VALUES[parts]
        if fast and w.groups == 1:
            return _FEW_ROWS_TILES_BF16_ONE_SCALE
        return (_FEW_ROWS_TILES_BF16 if fast else _FEW_ROWS_TILES)[parts]
    return (_FEW_ROWS_BF16 if fast else _FEW_ROWS)[w.format == "int8"]


def compiled_for(w: Weight, dtype: torch.dtype) -> CDLL | None:
    """The compiled code, where it takes this weight and activations of ``dtype``."""
    library = native.active()
    if library is None or dtype not in native.DTYPES or w.g_idx is not None or not w.qweight.is_cpu:
        return None
    return library if native.takes(w.format, w.shape[1], w.groups, library) else None


def _in_blocks(
    x: Tensor, w: Weight, bias: Tensor | None, batch_invariant: bool, compiled: CDLL | None
) -> Tensor:
    """A block of rows of W decoded, multiplied, and the next in its place."""
    rows, (n, width) = x.shape[0], w.shape
    step = max(1, _BLOCK // max(1, width))
    tiles = (compiled is not None or rows >= _MANY_ROWS) and not batch_invariant and _multiplies_bf16(x)
    work = torch.bfloat16 if tiles else _work_dtype(x.dtype)
    inputs: _Inputs | _Compiled
    if compiled is not None and native.decodes(w.format, width, w.groups, compiled):
        inputs = _Compiled(x.to(work), w, min(step, n), compiled)
    else:
        inputs = _Inputs(x.to(work), w, min(step, n), batch_invariant, exact=x.dtype not in _HALVES)
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        result = inputs.multiply(part)
        if bias is not None:
            result = result + bias[part].to(result.dtype)
        out[:, part] = result
    return out


def _takes_int8pack(x: Tensor, w: Weight, batch_invariant: bool) -> bool:
    """Whether torch's int8 product is the one: bf16, one scale a row, few rows, whole vectors (it checks no edges)."""
    plain = w.format == "int8" and w.groups == 1 and w.zeros is None and w.g_idx is None
    whole = w.shape[0] % 64 == 0 and w.shape[1] % 64 == 0
    few = x.shape[0] > 0 and (batch_invariant or x.shape[0] <= _INT8PACK_ROWS)
    return plain and whole and few and x.dtype == torch.bfloat16 and has_vectors()


def _int8pack(x: Tensor, w: Weight, bias: Tensor | None, batch_invariant: bool) -> Tensor:
    """bf16 x [M, K] times int8 W; the scales, which that operator takes in bf16 only, are multiplied after it."""
    codes = (w.qweight ^ 128).view(torch.int8)
    ones = torch.ones(w.shape[0], dtype=x.dtype)
    parts = x.contiguous().split(1 if batch_invariant else x.shape[0])
    out = torch.cat([torch._weight_int8pack_mm(part, codes, ones) for part in parts]).float()
    out *= reference.scales(w)[:, 0]
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype)


def matmul_backward(grad: Tensor, w: Weight) -> Tensor:
    """grad [M, N] @ W -> [M, K] in grad's dtype, the sum over blocks of output channels in fp32."""
    n, width = w.shape
    step = max(64, _BLOCK // max(1, width))
    out = torch.zeros(grad.shape[0], width, dtype=_work_dtype(grad.dtype), device=grad.device)
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        out += grad[:, part].to(out.dtype) @ dequantize_rows(w, part, out.dtype)
    return out.to(grad.dtype)


def dequantize_rows(w: Weight, part: slice, dtype: torch.dtype) -> Tensor:
    """Rows ``part`` of W, dense."""
    compiled = compiled_for(w, dtype)
    if compiled is not None and native.decodes(w.format, w.shape[1], w.groups, compiled):
        out = torch.empty(part.stop - part.start, w.shape[1], dtype=dtype)
        return native.decode(w, part.start, out, compiled)
    scale, zero = _parameters(w)
    rows = Weight(
        w.format,
        (part.stop - part.start, w.shape[1]),
        w.qweight[part],
        scale[part],
        None,
        None,
        None,
        None,
        w.g_idx,
    )
    if w.format in reference.CODEBOOKS or zero is None:
        return reference.dequantize(rows, dtype)
    work = _work_dtype(dtype)
    codes = reference.unpack_codes(w.qweight[part], reference.BITS[w.format], w.shape[1]).to(work)
    group = _group_index(w)
    return ((codes - zero[part][:, group]) * scale[part][:, group].to(work)).to(dtype)


@lru_cache(maxsize=1)
def has_vectors() -> bool:
    """Whether torch's packed products are more than a plain loop here."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _multiplies_bf16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and _has_bf16_products()


@lru_cache(maxsize=1)
def _has_bf16_products() -> bool:
    """Whether the processor multiplies bf16 itself; where it does not, torch's bf16 product loses to its fp32 one."""
    probes = (
        getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    return any(probe is not None and probe() for probe in probes)


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _parameters(w: Weight) -> tuple[Tensor, Tensor | None]:
    zero = None
    if w.zeros is not None:
        zero = reference.unpack_codes(w.zeros, reference.BITS[w.format], w.groups).float()
    return reference.scales(w), zero


def _group_index(w: Weight) -> Tensor:
    if w.g_idx is not None:
        return w.g_idx.long()
    return torch.arange(w.shape[1], device=w.qweight.device) // (w.shape[1] // w.groups)


class _Compiled:
    """The activations, and the memory that every block of at most ``step`` rows is decoded into."""

    def __init__(self, x: Tensor, w: Weight, step: int, compiled: CDLL) -> None:
        self.x, self.w, self.compiled = x, w, compiled
        self.block = torch.empty(step, w.shape[1], dtype=x.dtype)

    def multiply(self, part: slice) -> Tensor:
        block = self.block[: part.stop - part.start]
        native.decode(self.w, part.start, block, self.compiled)
        return torch.nn.functional.linear(self.x, block)


class _Inputs:
    """The activations, arranged once, and how a block of at most ``step`` rows is decoded and multiplied.

    Codes and values of every block go into the same memory: fresh pages for each took as long as the decoding.
    Unless ``exact``, a codebook's values are looked up in fp16, in half the memory and half the time: for activations
    of 16 bits that rounding (2^-12) is lost in theirs. Whole numbers are the same in either.
    """

    def __init__(self, x: Tensor, w: Weight, step: int, one_by_one: bool, exact: bool) -> None:
        self.w, self.one_by_one = w, one_by_one
        self.scale, self.zero = _parameters(w)
        width, group = w.shape[1], w.shape[1] // w.groups
        fast = w.g_idx is None and x.dtype != torch.float64
        self.middle = 0 if w.format in reference.CODEBOOKS else 1 << (reference.BITS[w.format] - 1)
        self.quads = fast and w.format in _QUAD_BITS and width % (8 if w.format == "int3" else 4) == 0
        # not for narrow weights: the library's shortest products round more than one of twice the length
        self.halves = fast and w.format == "int4" and group % 2 == 0 and width >= _WIDE
        self.bytes = fast and w.format == "int8"
        # the channels of one product each: int4 keeps even and odd ones apart
        self.xs = [x[:, 0::2].contiguous(), x[:, 1::2].contiguous()] if self.halves else [x]
        if self.quads:
            self.table = _quads(w.format, exact and w.format in reference.CODEBOOKS)
            self.words = torch.empty(step * width // 4, dtype=torch.int32)
            self.values = torch.empty(self.words.numel(), dtype=self.table.dtype)
            self.floats = torch.empty(step if self.table.dtype == torch.int64 else 0, width)
        elif self.halves or self.bytes:
            self.codes = torch.empty(step, width // 2 if self.halves else width, dtype=torch.uint8)
            self.floats = torch.empty(self.codes.shape)

    def multiply(self, part: slice) -> Tensor:
        w, x, rows = self.w, self.xs[0], part.stop - part.start
        scale, zero = self.scale[part], None if self.zero is None else self.zero[part]
        stored = w.qweight[part]
        if self.quads:
            words = _words(stored, w.format, self.words)
            values = torch.index_select(self.table, 0, words, out=self.values[: words.numel()])
            if values.dtype == torch.int64:
                values = self.floats[:rows].copy_(values.view(torch.float16).view(rows, -1))
            return self._linear(x, self._scaled(values.view(torch.float32), scale, zero))
        if self.bytes or self.halves:
            codes, floats = self.codes[:rows], self.floats[:rows]
            signed = codes.view(torch.int8)
        if self.bytes:
            torch.bitwise_xor(stored, 128, out=codes)
            return self._linear(x, self._scaled(floats.copy_(signed), scale, zero))
        if self.halves:
            torch.bitwise_and(stored, 15, out=codes)
            even = self._linear(x, self._scaled(floats.copy_(signed.sub_(8)), scale, zero))
            torch.bitwise_right_shift(stored, 4, out=codes)
            return even.add_(
                self._linear(self.xs[1], self._scaled(floats.copy_(signed.sub_(8)), scale, zero))
            )
        return self._linear(x, dequantize_rows(w, part, x.dtype))

    def _scaled(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        rows, groups = scale.shape
        values = values.view(rows, groups, -1)
        if zero is not None:
            values = values.sub_((zero - self.middle)[:, :, None])
        return values.mul_(scale[:, :, None]).view(rows, -1).to(self.xs[0].dtype)

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.shape[0] == 1 or self.one_by_one:
            # one product a row: what the library does then cannot depend on how many rows there are
            return (
                torch.stack([torch.mv(weight, row) for row in x])
                if x.shape[0]
                else x.new_empty(0, weight.shape[0])
            )
        return torch.nn.functional.linear(x, weight)


def _words(codes: Tensor, fmt: str, out: Tensor) -> Tensor:
    """Packed codes uint8 [R, B] -> int32 [R*B*8/(4*bits)] in ``out``, each the bits of four neighbouring codes."""
    if fmt == "int3":
        first, middle, last = codes.view(-1, 3).to(torch.int32).unbind(1)
        return torch.stack([first | ((middle & 15) << 8), (middle >> 4) | (last << 4)], dim=1).flatten()
    words = codes.flatten() if fmt == "int2" else codes.view(torch.uint16).flatten()
    return out[: words.numel()].copy_(words)


@lru_cache(maxsize=8)
def _quads(fmt: str, exact: bool) -> Tensor:
    """The values of every word of four codes, first channel first: fp32 as one complex128, or fp16 as one int64."""
    bits = reference.BITS[fmt]
    table = torch.tensor(
        reference.CODEBOOKS.get(fmt) or [code - (1 << (bits - 1)) for code in range(1 << bits)]
    )
    word = torch.arange(1 << (4 * bits))
    quads = torch.stack([table.float()[(word >> (bits * i)) & ((1 << bits) - 1)] for i in range(4)], dim=1)
    if not exact:
        return quads.to(torch.float16).view(torch.int64).flatten()
    return quads.contiguous().view(torch.complex128).flatten()


# rows at a time: they are laid out in blocks of as many, and take 4 bytes a code meanwhile
_PACKED_ROWS = 64


def can_pack_int4(w: Weight) -> bool:
    """Whether torch's packed int4 product takes this weight: group 32 to 256, N a multiple of 64 (and no
    g_idx)."""
    n, width = w.shape
    divides = width % w.groups == 0 and width // w.groups in INT4PACK_GROUPS
    return w.format == "int4" and w.g_idx is None and divides and n % 64 == 0


def pack_int4(w: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """-> (torch's packed codes uint8 [N, K/2], bf16 [G, N, 2] of scale and scale*(8-zero), fp32 [G, N]
    remainder).

    The remainder is what rounding to bf16 lost of the offsets, and of the scales times their group's mean
    code: such errors act on a whole group at once, so they do not average out as the rounding of single
    weights does.
    """
    scale, zero = _parameters(w)
    offset = torch.zeros_like(scale) if zero is None else scale * (8 - zero)
    packed = torch.empty(w.shape[0], w.shape[1] // 2, dtype=torch.uint8)
    means = torch.empty(w.shape[0], w.groups)
    for start in range(0, w.shape[0], _PACKED_ROWS):
        rows = slice(start, start + _PACKED_ROWS)
        codes = reference.unpack_codes(w.qweight[rows], 4, w.shape[1]).to(torch.int32)
        packed[rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        means[rows] = codes.unflatten(1, (w.groups, -1)).float().mean(-1) - 8
    pairs = torch.stack([scale.T, offset.T], dim=-1).to(torch.bfloat16).contiguous()
    lost = torch.stack([scale.T, offset.T], dim=-1) - pairs.float()
    return packed, pairs, (lost[..., 1] + lost[..., 0] * means.T).contiguous()


def matmul_int4pack(
    x: Tensor,
    packed: Tensor,
    pairs: Tensor,
    remainder: Tensor | None,
    bias: Tensor | None,
    batch_invariant: bool,
) -> Tensor:
    """bf16 x [M, K] times the weight of :func:`pack_int4` -> bf16 [M, N]."""
    groups = pairs.shape[0]
    x = x.contiguous()

    def product(rows: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, x.shape[1] // groups, pairs)

    if x.shape[0] == 0:
        return x.new_empty(0, pairs.shape[1])
    out = torch.cat([product(row) for row in x.split(1)]) if batch_invariant else product(x)
    if remainder is None and bias is None:
        return out
    exact = out.float()
    if remainder is not None:
        sums = x.unflatten(1, (groups, -1)).float().sum(-1)
        parts = sums.split(1) if batch_invariant else [sums]
        exact = exact + torch.cat([rows @ remainder for rows in parts])
    if bias is not None:
        exact = exact + bias.float()
    return exact.to(x.dtype)


def int8_dynamic_matmul(x: Tensor, w: Weight, bias: Tensor | None, threshold: float) -> Tensor:
    """As the reference of the same name, with torch's int8 product."""
    outlier = reference.outlier_columns(x, threshold)
    q, token_scale = reference.quantize_tokens(x.masked_fill(outlier, 0))
    codes = (w.qweight ^ 128).view(torch.int8)
    scale = reference.scales(w)[:, 0]
    if x.shape[0] == 0:
        return x.new_empty(0, w.shape[0])
    out = torch._int_mm(q, codes.T).to(torch.float32) * token_scale[:, None]
    if bool(outlier.any()):
        out += x[:, outlier].float() @ codes[:, outlier].float().T
    out *= scale
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype)
