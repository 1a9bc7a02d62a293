"""Inline PTX that turns packed codes into half2 registers; each has a plain twin in matmul.py's ``_decode``.

A code in the low mantissa bits under a fixed exponent is a float offset by a power of two: 0x6400 is 1024
in fp16, 0x4300 is 128 in bf16 (the method of FasterTransformer's cutlass extensions). Four bytes come in
($4, or $2 for int8), halves go out; results 0 and 1 hold o = 0, results 2 and 3 o = 1 in the words of
layout.py.
"""

from __future__ import annotations

import struct

from .codebooks import CODEBOOKS

# fp16: the high nibble sits 4 bits up, as 1024 + 16q: (1024 + 16q) / 16 - 72 = q - 8
INT4_FP16 = """{
.reg .b32 w, magic, low, sixteenth, high;
mov.b32 magic, 0x64006400;
mov.b32 low, 0x64086408;
mov.b32 sixteenth, 0x2c002c00;
mov.b32 high, 0xd480d480;
shr.u32 w, $4, 8;
lop3.b32 $0, $4, 0x000f000f, magic, 0xea;
lop3.b32 $1, $4, 0x00f000f0, magic, 0xea;
lop3.b32 $2, w, 0x000f000f, magic, 0xea;
lop3.b32 $3, w, 0x00f000f0, magic, 0xea;
sub.f16x2 $0, $0, low;
fma.rn.f16x2 $1, $1, sixteenth, high;
sub.f16x2 $2, $2, low;
fma.rn.f16x2 $3, $3, sixteenth, high;
}"""

# bf16 has 7 mantissa bits: every nibble is shifted down; 1 * (128 + q) - 136 (there is no bf16 add before
# sm_90)
INT4_BF16 = """{
.reg .b32 w1, w2, w3, magic, one, minus;
mov.b32 magic, 0x43004300;
mov.b32 one, 0x3f803f80;
mov.b32 minus, 0xc308c308;
shr.u32 w1, $4, 4;
shr.u32 w2, $4, 8;
shr.u32 w3, $4, 12;
lop3.b32 $0, $4, 0x000f000f, magic, 0xea;
lop3.b32 $1, w1, 0x000f000f, magic, 0xea;
lop3.b32 $2, w2, 0x000f000f, magic, 0xea;
lop3.b32 $3, w3, 0x000f000f, magic, 0xea;
fma.rn.bf16x2 $0, $0, one, minus;
fma.rn.bf16x2 $1, $1, one, minus;
fma.rn.bf16x2 $2, $2, one, minus;
fma.rn.bf16x2 $3, $3, one, minus;
}"""

# int8 codes are biased by 128: bytes 0 and 1 under the exponent of 1024, less 1152
INT8_FP16 = """{
.reg .b32 magic, bias;
mov.b32 magic, 0x64646464;
mov.b32 bias, 0x64806480;
prmt.b32 $0, $2, magic, 0x4140;
prmt.b32 $1, $2, magic, 0x4342;
sub.f16x2 $0, $0, bias;
sub.f16x2 $1, $1, bias;
}"""

# 8 bits do not fit bf16's mantissa beside an offset: through fp32, where 0x4B0000qq is 2^23 + q
INT8_BF16 = """{
.reg .b32 a, b, c, d, magic;
.reg .f32 e, f, g, h, bias;
mov.b32 magic, 0x4b000000;
mov.b32 bias, 0x4b000080;
prmt.b32 a, $2, magic, 0x7650;
prmt.b32 b, $2, magic, 0x7651;
prmt.b32 c, $2, magic, 0x7652;
prmt.b32 d, $2, magic, 0x7653;
mov.b32 e, a;
mov.b32 f, b;
mov.b32 g, c;
mov.b32 h, d;
sub.f32 e, e, bias;
sub.f32 f, f, bias;
sub.f32 g, g, bias;
sub.f32 h, h, bias;
cvt.rn.bf16x2.f32 $0, f, e;
cvt.rn.bf16x2.f32 $1, h, g;
}"""


def _half_bits(value: float, dtype: str) -> int:
    """The 16 bits of a value in fp16, or in bf16 rounded to nearest even."""
    if dtype == "fp16":
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    bits = int(struct.unpack("<I", struct.pack("<f", value))[0])
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


def codebook_asm(values: tuple[float, ...], dtype: str) -> str:
    """A table of 16 halves held in eight registers, one byte of each entry in four of them.

    ``prmt`` picks four bytes out of eight by four 3-bit indices, so a plane costs one for entries 0-7, one
    for 8-15 and one that chooses between them by bit 3; two more interleave the planes into half2.
    """
    halves = [_half_bits(v, dtype) for v in values]
    lines = [".reg .b32 w, low, high, pick, p, q, r;", ".reg .b32 l0, l1, l2, l3, h0, h1, h2, h3;"]
    for i in range(4):
        four = halves[4 * i : 4 * i + 4]
        lines.append(f"mov.b32 l{i}, 0x{sum((h & 255) << (8 * j) for j, h in enumerate(four)):08x};")
        lines.append(f"mov.b32 h{i}, 0x{sum((h >> 8) << (8 * j) for j, h in enumerate(four)):08x};")
    for word, (first, second) in enumerate((("$0", "$1"), ("$2", "$3"))):
        source = "$4"
        if word:
            lines.append("shr.u32 w, $4, 16;")
            source = "w"
        lines += [
            f"and.b32 low, {source}, 0x7777;",
            f"shr.u32 pick, {source}, 1;",
            "lop3.b32 pick, pick, 0x4444, 0x3210, 0xea;",
            "prmt.b32 p, l0, l1, low;",
            "prmt.b32 q, l2, l3, low;",
            "prmt.b32 r, p, q, pick;",
            "prmt.b32 p, h0, h1, low;",
            "prmt.b32 q, h2, h3, low;",
            "prmt.b32 high, p, q, pick;",
            f"prmt.b32 {first}, r, high, 0x5140;",
            f"prmt.b32 {second}, r, high, 0x7362;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


CODEBOOK_ASM = {
    (name, dtype): codebook_asm(values, dtype)
    for name, values in CODEBOOKS.items()
    for dtype in ("fp16", "bf16")
}
