"""The values of the 4-bit codebooks, once for all: by the code that stands for them, relative to the group's absmax."""

# NF4: QLoRA, arXiv:2305.14314, appendix E
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# FP4: sign, two exponent bits, one mantissa bit, in the order of bitsandbytes
_FP4_MAGNITUDES = (
    0.0,
    0.0052083334885537624,
    0.6666666865348816,
    1.0,
    0.3333333432674408,
    0.5,
    0.1666666716337204,
    0.25,
)
# code 8 is a second zero, and a positive one: bitsandbytes dequantizes it to +0.0
FP4_VALUES = (*_FP4_MAGNITUDES, 0.0, *(-value for value in _FP4_MAGNITUDES[1:]))
CODEBOOKS = {"nf4": NF4_VALUES, "fp4": FP4_VALUES}
