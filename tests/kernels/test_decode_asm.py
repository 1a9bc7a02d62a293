"""The inline PTX, run by a few lines of Python: every byte pattern against the codes it stands for."""

import struct

import pytest
import torch

from brise.kernels import decode_asm
from brise.kernels.codebooks import CODEBOOKS


def half(bits: int, dtype: str) -> float:
    if dtype == "fp16":
        return struct.unpack("<e", struct.pack("<H", bits))[0]
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0]


def to_half(value: float, dtype: str) -> int:
    kind = torch.float16 if dtype == "fp16" else torch.bfloat16
    return int(torch.tensor(value, dtype=torch.float64).to(kind).view(torch.int16)) & 0xFFFF


def run(asm: str, word: int, outputs: int, dtype: str) -> list[float]:
    """Execute the assembly on one input register; the halves of the output registers, low first."""
    r: dict[str, int] = {f"${outputs}": word}

    def value(operand: str) -> int:
        return r[operand] if operand in r else int(operand, 0)

    def both(a: int, b: int, c: int, f) -> int:
        low = [half(v & 0xFFFF, dtype) for v in (a, b, c)]
        high = [half(v >> 16, dtype) for v in (a, b, c)]
        return to_half(f(*low), dtype) | to_half(f(*high), dtype) << 16

    def single(bits: int) -> float:
        return struct.unpack("<f", struct.pack("<I", bits))[0]

    for line in asm.strip("{}\n").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        op, rest = line.strip().split(None, 1)
        d, *sources = [part.strip() for part in rest.split(",")]
        v = [value(s) for s in sources]
        if op == "mov.b32":
            r[d] = v[0]
        elif op == "shr.u32":
            r[d] = v[0] >> v[1]
        elif op == "and.b32":
            r[d] = v[0] & v[1]
        elif op == "lop3.b32":
            assert v[3] == 0xEA
            r[d] = (v[0] & v[1]) | v[2]
        elif op == "prmt.b32":
            eight = v[0] | v[1] << 32
            picks = [(v[2] >> (4 * i)) & 15 for i in range(4)]
            assert all(p < 8 for p in picks), "a pick above 7 would replicate a sign"
            r[d] = sum((eight >> (8 * p) & 255) << (8 * i) for i, p in enumerate(picks))
        elif op == "sub.f16x2":
            r[d] = both(v[0], v[1], 0, lambda a, b, _: a - b)
        elif op in ("fma.rn.f16x2", "fma.rn.bf16x2"):
            r[d] = both(*v, lambda a, b, c: a * b + c)
        elif op == "sub.f32":
            r[d] = struct.unpack("<I", struct.pack("<f", single(v[0]) - single(v[1])))[0]
        elif op == "cvt.rn.bf16x2.f32":
            r[d] = to_half(single(v[0]), dtype) << 16 | to_half(single(v[1]), dtype)
        else:
            raise AssertionError(f"unknown instruction {op}")
    return [half(r[f"${i}"] >> shift & 0xFFFF, dtype) for i in range(outputs) for shift in (0, 16)]


WORDS = [0, 0xFFFFFFFF, 0x76543210, 0xFEDCBA98, 0x01234567, 0x89ABCDEF, 0xA5C3F00F, 0x13579BDF]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_int4_pairs_nibbles_i_and_i_plus_4(dtype):
    asm = decode_asm.INT4_FP16 if dtype == "fp16" else decode_asm.INT4_BF16
    for word in WORDS:
        nibbles = [(word >> (4 * i) & 15) - 8 for i in range(8)]
        assert run(asm, word, 4, dtype) == [nibbles[i + 4 * half] for i in range(4) for half in (0, 1)]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_int8_is_exact(dtype):
    asm = decode_asm.INT8_FP16 if dtype == "fp16" else decode_asm.INT8_BF16
    for first in range(0, 256, 4):
        word = sum((first + i) << (8 * i) for i in range(4))
        assert run(asm, word, 2, dtype) == [first + i - 128 for i in range(4)]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("fmt", ["nf4", "fp4"])
def test_codebooks_are_looked_up_in_order_and_rounded_once(fmt, dtype):
    for word in WORDS:
        want = [half(to_half(CODEBOOKS[fmt][word >> (4 * i) & 15], dtype), dtype) for i in range(8)]
        assert run(decode_asm.CODEBOOK_ASM[fmt, dtype], word, 4, dtype) == want
