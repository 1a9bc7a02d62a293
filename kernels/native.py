"""The compiled part of the CPU's products: ``native.c`` and its headers, built on first use by the C compiler there is.

A codebook of 16 values fits one vector register, so a look-up is one instruction; torch has no operator for it, and
what it takes to imitate one (:mod:`.cpu`) costs ten times as much. As with Triton's launchers, a compiler is needed
where the code runs: ``$CC``, gcc, clang or cc. Where there is none, or no AVX2, or ``BRISE_NATIVE=0`` is set,
:mod:`.cpu` does without. The library is kept in the cache folder, by a hash of its source and of how it was built.

It shares torch's own threads: OpenMP's functions are left open, for the library that torch has loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from . import reference
from .cache_folder import cache_root
from .reference import Weight

SOURCE = Path(__file__).with_suffix(".c")
# all that a library is made of
SOURCES = (SOURCE, *(SOURCE.with_name(f"native_{part}.h") for part in ("vectors", "products", "step")))
# what the compiler may use, by what torch finds on this processor
_FLAGS = {
    "AVX512_BF16": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mfma", "-mf16c"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}
# sums in one order and with the roundings that are written down
_ALWAYS = ("-O3", "-ffp-contract=off", "-fPIC")
_BITS = (2, 4, 8)
# what a library lacks is told at once, where the system can; not in the middle of a product
_NOW = getattr(os, "RTLD_NOW", ctypes.DEFAULT_MODE)
_DOES_NOT_LOAD = "cannot be built, or does not load"
_aside: list[bool] = []
# of activations and decoded weights, by their numbers there
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def processor() -> str:
    """What this processor has, in the names of :data:`_FLAGS`; another name where that is not enough."""
    found = str(torch.backends.cpu.get_cpu_capability())
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return f"{found}_BF16" if found == "AVX512" and probe is not None and probe() else found


@lru_cache(maxsize=4)
def library(kind: str | None = None) -> ctypes.CDLL | None:
    """The compiled library for a ``kind`` of processor (by default this one's), or None without one."""
    kinds = list(_FLAGS)
    wanted = kind or processor()
    if wanted not in kinds or os.environ.get("BRISE_NATIVE") == "0":
        return None
    named = os.environ.get("CC")
    # an older compiler may not know the newest instructions
    for flags in [_FLAGS[wanted]] if kind else [_FLAGS[k] for k in kinds[kinds.index(wanted) :]]:
        for compiler in [named] if named else ["gcc", "clang", "cc"]:
            # without OpenMP where its functions are not there: one thread then, and still the faster way
            for threads in (("-fopenmp",), ()):
                built = _built(compiler, (*_ALWAYS, *flags, *threads))
                if built is not None:
                    return built
    return None


def _build(program: str, flags: tuple[str, ...], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unit, made = f"{folder}/unit.o", f"{folder}/made.so"
        # in two steps, or -fopenmp would link a second OpenMP beside torch's
        for command in (
            [program, *flags, "-c", str(SOURCE), "-o", unit],
            [program, "-shared", unit, "-o", made],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        Path(made).replace(path)


def active() -> ctypes.CDLL | None:
    """The library of this machine; None without one, and where :func:`without` has put it aside."""
    return None if _aside else library()


@contextlib.contextmanager
def without() -> Iterator[None]:
    """Within it the products do without the compiled code: for tests and comparisons."""
    _aside.append(True)
    try:
        yield
    finally:
        _aside.pop()


def _built(compiler: str, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    program = shutil.which(compiler)
    if program is None:
        return None
    sources = [path.read_bytes() for path in SOURCES]
    digest = hashlib.sha256(b"\0".join([*sources, program.encode(), *map(str.encode, flags)])).hexdigest()
    path = cache_root() / "native" / f"{digest[:24]}.so"
    # what the file must be: to load a damaged one can end the process
    record = path.with_suffix(".sha256")
    found = None
    try:
        known = record.read_text() if record.is_file() else ""
        if known == _DOES_NOT_LOAD:
            return None
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != known:
            try:
                _build(program, flags, path)
            except subprocess.CalledProcessError:
                record.parent.mkdir(parents=True, exist_ok=True)
                record.write_text(_DOES_NOT_LOAD)
                return None
            record.write_text(hashlib.sha256(path.read_bytes()).hexdigest())
        try:
            found = ctypes.CDLL(str(path), mode=_NOW)
        except OSError:  # the next process need not try
            record.write_text(_DOES_NOT_LOAD)
    except (OSError, subprocess.SubprocessError):
        return None
    if found is None:
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_ssize_t
    found.brise_matmul.argtypes = [pointer] * 6 + [size] * 4 + [ctypes.c_int] * 2
    found.brise_decode.argtypes = [pointer] * 5 + [size] * 3 + [ctypes.c_int] * 2
    found.brise_dense.argtypes = [pointer] * 3 + [size] * 3
    found.brise_rms_norm.argtypes = [pointer] * 5 + [size] * 2 + [ctypes.c_double]
    found.brise_step.argtypes, found.brise_step_sizes.argtypes = [pointer], [pointer] * 2
    for name in ("rms_norm", "dense", "matmul", "decode", "step", "step_sizes"):
        getattr(found, f"brise_{name}").restype = None
    return found


def takes(fmt: str, width: int, groups: int, library: ctypes.CDLL) -> bool:
    """Whether the compiled code takes rows of ``width`` codes in ``groups``: 2, 4 or 8 bits, and chunks of whole groups
    or groups of whole chunks."""
    bits = reference.BITS.get(fmt)
    if bits not in _BITS or groups < 1 or width < 1 or width * bits % (8 * groups):
        return False
    lane = 1 if bits == 8 else 4
    chunk, group = lane * library.brise_lanes(), width * bits // 8 // groups
    return group % lane == 0 and (groups == 1 or group % chunk == 0 or chunk % group == 0)


def matmul(x: Tensor, w: Weight, library: ctypes.CDLL) -> Tensor:
    """x [M, K] times W^T -> fp32 [M, N]; a row depends on no other row, in any bit.

    Computed in fp32; of bf16 activations, where the processor multiplies those and the weight has 4 bits and no zero
    points, with the format's values in bf16 and sums in fp32.
    """
    bits = reference.BITS[w.format]
    scale, zero = parameters(w)
    bf16 = x.dtype == torch.bfloat16 and bits == 4 and zero is None and bool(library.brise_has_bf16())
    out = torch.empty(x.shape[0], w.shape[0], dtype=torch.float32)
    # held by names while they are read
    ordered = _by_chunks(x, bits, bf16, library.brise_lanes())
    values = _values(w.format, zero is not None)
    library.brise_matmul(
        *_addresses(ordered, w.qweight, scale, zero, values, out),
        x.shape[0], *w.shape, w.groups, bits, int(bf16),
    )  # fmt: skip
    return out


def dense(x: Tensor, weight: Tensor, library: ctypes.CDLL) -> Tensor:
    """x fp32 [M, K] times a dense fp32 weight [N, K], K a multiple of the library's lanes -> [M, N].

    For few rows, where the weight's way through memory is what takes the time. A row depends on no other row, in any
    bit.
    """
    out = torch.empty(x.shape[0], weight.shape[0])
    x = x.contiguous()
    library.brise_dense(*_addresses(x, weight, out), x.shape[0], *weight.shape)
    return out


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, branch: Tensor | None, library: ctypes.CDLL
) -> tuple[Tensor, Tensor]:
    """The norm of x + ``branch`` (all fp32 [R, D], weight [D], D a multiple of the library's lanes), and that sum."""
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    library.brise_rms_norm(*_addresses(x, branch, weight, total, out), *x.shape, eps)
    return out, total


def _by_chunks(x: Tensor, bits: int, bf16: bool, lanes: int) -> Tensor:
    """x [M, K] in the order of the compiled products: [M, chunks, codes a word, words a chunk], then zeros."""
    if bf16:
        words, a_word = 2 * lanes, 4
    else:
        words, a_word = lanes, 1 if bits == 8 else 32 // bits
    rows, width = x.shape
    chunk = words * a_word
    count = -(-width // chunk)
    if width % chunk:
        x = torch.nn.functional.pad(x, (0, count * chunk - width))
    ordered = x.reshape(rows, count, words, a_word).transpose(2, 3)
    dtype = torch.bfloat16 if bf16 else torch.float32
    return torch.empty(ordered.shape, dtype=dtype).copy_(ordered)


def decodes(fmt: str, width: int, groups: int, library: ctypes.CDLL) -> bool:
    """Whether :func:`decode` takes rows of ``width`` codes in ``groups``: 4 or 8 bits, groups of whole vectors."""
    bits = reference.BITS.get(fmt)
    return (
        bits in (4, 8)
        and groups > 0
        and width > 0
        and width * bits % (8 * groups * library.brise_lanes()) == 0
    )


def decode(
    codes: Tensor, fmt: str, scale: Tensor, zero: Tensor | None, out: Tensor, library: ctypes.CDLL
) -> Tensor:
    """Packed codes uint8 [R, B] of 4 or 8 bits, ``scale`` and ``zero`` fp32 [R, G] -> ``out`` [R, K] of any dtype but
    fp64: computed in fp32 and rounded once."""
    bits = reference.BITS[fmt]
    rows, width = out.shape
    values = _values(fmt, zero is not None)
    library.brise_decode(
        *_addresses(codes, scale, zero, values, out),
        rows, width, scale.shape[1], bits, DTYPES[out.dtype],
    )  # fmt: skip
    return out


def decode_into(
    out: Tensor, codes: Tensor, fmt: str, scale: Tensor, zero: Tensor | None, g_idx: Tensor | None
) -> bool:
    """As :func:`decode`, where the compiled code is there and takes this weight; False, and nothing done, elsewhere."""
    compiled = active()
    if compiled is None or g_idx is not None or out.dtype not in DTYPES or not (out.is_cpu and codes.is_cpu):
        return False
    if not decodes(fmt, out.shape[1], scale.shape[1], compiled):
        return False
    if scale.dtype != torch.float32 or not out.is_contiguous():
        return False
    zero = None if zero is None else zero.to(torch.float32).contiguous()
    decode(codes.contiguous(), fmt, scale.contiguous(), zero, out, compiled)
    return True


def parameters(w: Weight) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points, fp32 [N, G], contiguous."""
    scale = reference.scales(w).contiguous()
    bits = reference.BITS[w.format]
    if w.zeros is not None:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        zeros = w.zeros[:, :, None].bitwise_right_shift(shifts).bitwise_and_((1 << bits) - 1)
        return scale, zeros.flatten(1)[:, : w.groups].to(torch.float32).contiguous()
    return scale, None


@lru_cache(maxsize=16)
def _values(fmt: str, has_zero: bool) -> Tensor:
    """What the low 4 bits of a code stand for, fp32 [16]; with fewer bits the higher ones are another code's."""
    count = 1 << min(4, reference.BITS[fmt])
    middle = 0 if has_zero else count // 2
    values = reference.CODEBOOKS.get(fmt) or [float(code - middle) for code in range(count)]
    return torch.tensor(values, dtype=torch.float32).repeat(16 // count)


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    for tensor in tensors:
        assert tensor is None or tensor.is_contiguous(), "the compiled code knows no strides"
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]
