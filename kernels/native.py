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

from .cache_folder import cache_root
from .native_weights import DTYPES, NativeWeight, addresses, decodes, described, stored, takes
from .reference import Weight

__all__ = ["DTYPES", "decodes", "described", "stored", "takes"]

SOURCE = Path(__file__).with_suffix(".c")
# all that a library is made of
_PARTS = ("vectors", "weights", "products", "integers", "tile_x", "tiles", "rows", "step")
SOURCES = (SOURCE, *(SOURCE.with_name(f"native_{part}.h") for part in _PARTS))
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c")
# every processor with the one has the other
_AVX512_BF16 = (*_AVX512, "-mavx512bf16", "-mavx512vnni")
# what the compiler may use, by what torch finds on this processor
_FLAGS = {
    "AMX": (*_AVX512_BF16, "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
    "AVX512_BF16": _AVX512_BF16,
    "AVX512": _AVX512,
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}
# sums in one order and with the roundings that are written down
_ALWAYS = ("-O3", "-ffp-contract=off", "-fPIC")
# what a library lacks is told at once, where the system can; not in the middle of a product
_NOW = getattr(os, "RTLD_NOW", ctypes.DEFAULT_MODE)
_DOES_NOT_LOAD = "cannot be built, or does not load"
_aside: list[bool] = []


def processor() -> str:
    """What this processor has, in the names of :data:`_FLAGS`; another name where that is not enough."""
    found = str(torch.backends.cpu.get_cpu_capability())
    if found == "AVX512" and _probed("_is_avx512_bf16_supported"):
        return "AMX" if _probed("_is_amx_tile_supported") else "AVX512_BF16"
    return found


def _probed(name: str) -> bool:
    # not in every version of torch
    probe = getattr(torch.cpu, name, None)
    return probe is not None and bool(probe())


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
    pointer, size, weight = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.POINTER(NativeWeight)
    found.brise_matmul.argtypes = [weight, *[pointer] * 3, size, ctypes.c_int, ctypes.c_int]
    found.brise_tile_parts.argtypes = [weight, ctypes.c_int]
    found.brise_decode.argtypes = [weight, pointer, size, size, ctypes.c_int]
    found.brise_dense.argtypes = [pointer] * 3 + [size] * 3
    found.brise_rms_norm.argtypes = [pointer] * 5 + [size] * 2 + [ctypes.c_double]
    found.brise_step.argtypes, found.brise_step_sizes.argtypes = [pointer], [pointer] * 2
    for name in ("rms_norm", "dense", "decode", "step", "step_sizes"):
        getattr(found, f"brise_{name}").restype = None
    return found


def tile_parts(w: Weight, dtype: torch.dtype, library: ctypes.CDLL) -> int:
    """Groups of a chunk of 64 bytes where tile registers (AMX) multiply this weight with x of ``dtype``; else 0."""
    return int(library.brise_tile_parts(described(stored(w)), DTYPES[dtype]))


def matmul(
    x: Tensor, w: Weight, bias: Tensor | None, library: ctypes.CDLL, batch_invariant: bool = False
) -> Tensor:
    """x [M, K] times W^T (+ bias [N]) -> [M, N] in x's dtype; with ``batch_invariant`` a row depends on no other row,
    in any bit.

    Computed in fp32 and rounded once. Where the processor adds up products of bytes, integers of 2, 4 and by tile
    registers 8 bits are multiplied in integers: x of fp32 is rounded to 24 bits of the largest in a few channels, x of
    16 bits to 16 of them, or any to 26 and more of a group. Where it multiplies bf16, nf4 and fp4 of bf16 activations
    with the format's values in bf16. Sums are fp32 in either.
    """
    w = stored(w)
    return multiply(x, described(w), w.shape, bias, library, batch_invariant)


def multiply(
    x: Tensor,
    w: NativeWeight,
    shape: tuple[int, int],
    bias: Tensor | None,
    library: ctypes.CDLL,
    batch_invariant: bool,
) -> Tensor:
    """As :func:`matmul` of x [..., K], with a weight [N, K] that has been described; its tensors are the caller's to
    hold."""
    n, k = shape
    x = x.contiguous()
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    out = x.new_empty((*x.shape[:-1], n))
    added = None if bias is None else bias.data_ptr()
    rows, kind = x.numel() // k, DTYPES[x.dtype]
    if library.brise_matmul(w, x.data_ptr(), added, out.data_ptr(), rows, kind, batch_invariant):
        raise MemoryError(f"no memory for the activations {list(x.shape)} in the order of the product")
    return out


def dense(x: Tensor, weight: Tensor, library: ctypes.CDLL) -> Tensor:
    """x fp32 [M, K] times a dense fp32 weight [N, K], K a multiple of the library's lanes -> [M, N].

    For few rows, where the weight's way through memory is what takes the time. A row depends on no other row, in any
    bit.
    """
    out = torch.empty(x.shape[0], weight.shape[0])
    x = x.contiguous()
    library.brise_dense(*addresses(x, weight, out), x.shape[0], *weight.shape)
    return out


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, branch: Tensor | None, library: ctypes.CDLL
) -> tuple[Tensor, Tensor]:
    """The norm of x + ``branch`` (all fp32 [R, D], weight [D], D a multiple of the library's lanes), and that sum."""
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    library.brise_rms_norm(*addresses(x, branch, weight, total, out), *x.shape, eps)
    return out, total


def decode(w: Weight, first: int, out: Tensor, library: ctypes.CDLL) -> Tensor:
    """Rows ``first`` .. of a weight of 4 or 8 bits -> ``out`` [R, K] of any dtype but fp64, computed in fp32 and
    rounded once."""
    w = stored(w)
    library.brise_decode(described(w), *addresses(out), first, first + out.shape[0], DTYPES[out.dtype])
    return out


def decode_into(
    out: Tensor, codes: Tensor, fmt: str, scale: Tensor, zero: Tensor | None, g_idx: Tensor | None
) -> bool:
    """Packed codes uint8 [R, B], ``scale`` and ``zero`` fp32 [R, G] -> ``out`` [R, K] as :func:`decode`, where the
    compiled code is there and takes this weight; False, and nothing done, elsewhere."""
    compiled = active()
    if compiled is None or g_idx is not None or out.dtype not in DTYPES or not (out.is_cpu and codes.is_cpu):
        return False
    if not decodes(fmt, out.shape[1], scale.shape[1], compiled):
        return False
    if scale.dtype != torch.float32 or not out.is_contiguous():
        return False
    zero = None if zero is None else zero.to(torch.float32)
    decode(Weight(fmt, (out.shape[0], out.shape[1]), codes, scale, zero), 0, out, compiled)
    return True
