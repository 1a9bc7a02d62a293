"""The public ops: an index. Each is a torch custom op in the namespace ``brise``, checked, with a fake, and with a
gradient where there is one; ``impl`` is ``auto``, ``reference`` or ``triton``.

Importing this module neither needs triton nor asks for a device.
"""

from .checks import has_triton
from .matmul_ops import int8_dynamic_matmul, quant_matmul
from .weights import PackedWeight, dequantize, pack_weight, unpack_weight

__all__ = [
    "PackedWeight",
    "dequantize",
    "has_triton",
    "int8_dynamic_matmul",
    "pack_weight",
    "quant_matmul",
    "unpack_weight",
]
