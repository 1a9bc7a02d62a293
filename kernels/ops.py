"""The public ops: an index. Each is a torch custom op in the namespace ``brise``, checked, with a fake, and with a
gradient where there is one; ``impl`` is ``auto``, ``reference`` or ``triton``.

Importing this module neither needs triton nor asks for a device.
"""

from .attention_ops import sliding_attention
from .checks import has_triton
from .cpu_direct import Direct
from .decode_ops import decode_attention
from .epilogue_ops import HalfNormed, matmul_residual, matmul_rope_cache_write, matmul_swiglu
from .fused_ops import rms_norm, rope_cache_write, swiglu
from .matmul_ops import direct, int8_dynamic_matmul, needs_no_op, quant_matmul
from .weights import PackedWeight, dequantize, pack_weight, unpack_weight

__all__ = [
    "Direct",
    "HalfNormed",
    "PackedWeight",
    "decode_attention",
    "dequantize",
    "direct",
    "has_triton",
    "int8_dynamic_matmul",
    "matmul_residual",
    "matmul_rope_cache_write",
    "matmul_swiglu",
    "needs_no_op",
    "pack_weight",
    "quant_matmul",
    "rms_norm",
    "rope_cache_write",
    "sliding_attention",
    "swiglu",
    "unpack_weight",
]
