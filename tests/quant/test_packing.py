"""The bit order of codes: bytes worked out by hand, and round trips."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brise.quant.packing import pack_codes, packed_width, unpack_codes

# bits, codes, bytes: worked out by hand from "code i occupies bits i*b .. i*b+b-1, least significant first"
GOLDEN = [
    (8, [0, 1, 127, 128, 255], [0x00, 0x01, 0x7F, 0x80, 0xFF]),
    # 0xB | 0x3 << 4; the odd one out sits in the low nibble, the high one is zero
    (4, [0xB, 0x3, 0xF], [0x3B, 0x0F]),
    (4, [0, 15, 15, 0], [0xF0, 0x0F]),
    # 1 + 2*4 + 3*16 + 0*64, then 3
    (2, [1, 2, 3, 0, 3], [0b00111001, 0b00000011]),
    # stream of 1..7,0, three bits each, read from the right: 000 111 110 101 100 011 010 001
    (3, [1, 2, 3, 4, 5, 6, 7, 0], [0b11010001, 0b01011000, 0b00011111]),
    # code 2 straddles bytes 0 and 1, code 5 straddles bytes 1 and 2: only those two are set
    (3, [0, 0, 7, 0, 0, 7, 0, 0], [0b11000000, 0b10000001, 0b00000011]),
    # ten codes take 30 bits: the last two of byte 3 stay zero
    (3, [0, 0, 0, 0, 0, 0, 0, 0, 7, 7], [0, 0, 0, 0b00111111]),
    # one bit of the third byte is used: 3 codes are 9 bits
    (3, [0, 0, 4], [0x00, 0x01]),
    (1, [1, 0, 1, 1, 0, 0, 0, 0, 1], [0b00001101, 1]),
]


@pytest.mark.parametrize(("bits", "codes", "expected"), GOLDEN)
def test_bytes_by_hand(bits, codes, expected):
    packed = pack_codes(torch.tensor([codes], dtype=torch.uint8), bits)
    assert packed.tolist() == [expected]
    assert packed.dtype == torch.uint8
    assert packed_width(len(codes), bits) == len(expected)
    assert unpack_codes(packed, bits, len(codes)).tolist() == [codes]


def stream_twin(codes: list[int], bits: int) -> list[int]:
    """The whole row as one number, cut into bytes."""
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    return list(number.to_bytes((len(codes) * bits + 7) // 8, "little"))


@given(
    bits=st.integers(1, 8),
    leading=st.lists(st.integers(0, 3), max_size=2),
    count=st.integers(1, 70),
    seed=st.integers(0, 2**32 - 1),
    strided=st.booleans(),
)
@settings(max_examples=150)
def test_round_trip(bits, leading, count, seed, strided):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (*leading, count), generator=generator, dtype=torch.uint8)
    if strided:  # a view with gaps, as a column slice is
        codes = torch.stack([codes, 255 - codes], dim=-1)[..., 0]
    before = codes.clone()
    packed = pack_codes(codes, bits)
    assert packed.shape == (*leading, packed_width(count, bits))
    for row, packed_row in zip(codes.reshape(-1, count), packed.reshape(-1, packed.shape[-1]), strict=True):
        assert packed_row.tolist() == stream_twin(row.tolist(), bits)
    back = unpack_codes(packed, bits, count)
    assert back.dtype == torch.uint8
    assert torch.equal(back, codes)
    assert torch.equal(codes, before)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_row_starts_on_a_byte_of_its_own(bits):
    codes = torch.full((3, 5), 2**bits - 1, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert torch.equal(packed[1], pack_codes(codes[1], bits))
    assert torch.equal(unpack_codes(packed[1:2], bits, 5), codes[1:2])


def test_errors():
    codes = torch.zeros(2, 8, dtype=torch.uint8)
    for bits in (0, 9, -1):
        with pytest.raises(ValueError, match=rf"bits must be 1\.\.8, got {bits}"):
            pack_codes(codes, bits)
        with pytest.raises(ValueError, match=rf"bits must be 1\.\.8, got {bits}"):
            unpack_codes(codes, bits, 8)
    for bits in range(1, 8):
        too_large = codes.clone()
        too_large[1, 3] = 2**bits
        with pytest.raises(ValueError, match=rf"code {2**bits} does not fit in {bits} bits"):
            pack_codes(too_large, bits)
    with pytest.raises(TypeError, match=r"codes must be uint8, got torch\.int64"):
        pack_codes(codes.long(), 4)
    with pytest.raises(TypeError, match=r"packed codes must be uint8, got torch\.int8"):
        unpack_codes(codes.to(torch.int8), 4, 16)
    for count in (14, 17):
        with pytest.raises(ValueError, match=rf"{count} codes of 4 bits take \d bytes a row, got 8"):
            unpack_codes(codes, 4, count)
    with pytest.raises(ValueError, match="10 codes of 3 bits take 4 bytes a row, got 3"):
        unpack_codes(codes[:, :3], 3, 10)
