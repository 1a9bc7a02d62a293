"""Other libraries' layouts written out bit by bit, as their documentation has them: slow, and plainly right."""

import torch


def words(bits: list[int], count: int) -> list[int]:
    """int32 words of a stream of bits, least significant first."""
    bits = bits + [0] * (32 * count - len(bits))
    out = []
    for w in range(count):
        value = sum(bit << i for i, bit in enumerate(bits[32 * w : 32 * w + 32]))
        out.append(value - (1 << 32) if value >> 31 else value)
    return out


def stream(codes: list[int], b: int) -> list[int]:
    return [(code >> i) & 1 for code in codes for i in range(b)]


def gptq(codes, zeros, b: int, version: int):
    """(qweight [K*b/32, N], qzeros [G, N*b/32]) of codes [N][K] and zero points [N][G]."""
    n, k, groups = len(codes), len(codes[0]), len(zeros[0])
    columns = [words(stream(row, b), k * b // 32) for row in codes]
    less = version == 1
    rows = [words(stream([zeros[i][g] - less for i in range(n)], b), n * b // 32) for g in range(groups)]
    return torch.tensor(columns, dtype=torch.int32).t(), torch.tensor(rows, dtype=torch.int32)


def awq(codes, zeros):
    """(qweight [K, N/8], qzeros [G, N/8]): nibble i of a word holds the channel (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(table):
        out = []
        for j in range(len(table[0])):
            nibbles = [table[8 * w + i][j] for w in range(len(table) // 8) for i in order]
            out.append(words(stream(nibbles, 4), len(table) // 8))
        return torch.tensor(out, dtype=torch.int32)

    return pack(codes), pack(zeros)


def compressed_tensors(codes, zeros, b: int):
    """(weight_packed [N, ceil(K*b/32)], weight_zero_point [ceil(N*b/32), G])."""
    n, k, groups = len(codes), len(codes[0]), len(zeros[0])
    packed = [words(stream(row, b), -(-k * b // 32)) for row in codes]
    points = [words(stream([zeros[i][g] for i in range(n)], b), -(-n * b // 32)) for g in range(groups)]
    return torch.tensor(packed, dtype=torch.int32), torch.tensor(points, dtype=torch.int32).t()
