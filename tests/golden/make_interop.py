"""Write golden/interop/*.safetensors: weights packed by other libraries, with what they decode them to.

Run in an environment that has the library (see tests/interop/environments.py):

    python tests/golden/make_interop.py gptqmodel
    python tests/golden/make_interop.py compressed-tensors
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

OUT = Path(__file__).parent / "interop"
N, K, G = 64, 96, 32


def problem(bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight on a grid, its scales and zero points [N, K/G]."""
    torch.manual_seed(bits + 10 * symmetric)
    scales = (torch.rand(N, K // G) + 0.5).half().float()
    zeros = torch.full((N, K // G), float(1 << (bits - 1)))
    if not symmetric:
        zeros = torch.randint(1, 1 << bits, (N, K // G)).float()
    codes = torch.randint(0, 1 << bits, (N, K)).float()
    weight = (codes - zeros.repeat_interleave(G, 1)) * scales.repeat_interleave(G, 1)
    return weight, scales, zeros


def write(name: str, tensors: dict[str, torch.Tensor], library: str, config: dict) -> None:
    OUT.mkdir(exist_ok=True)
    metadata = {"made by": f"{library} {version(library)}", "config": json.dumps(config)}
    save_file({n: t.contiguous() for n, t in tensors.items()}, OUT / f"{name}.safetensors", metadata=metadata)


def gptqmodel() -> None:
    os.cpu_count = lambda: 8  # it refuses to start with two
    from gptqmodel.nn_modules.qlinear.gemm_awq import AwqGEMMLinear
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    for bits, symmetric, order in ((2, True, False), (3, False, False), (4, True, False), (4, False, True),
                                   (8, True, False)):  # fmt: skip
        weight, scales, zeros = problem(bits, symmetric)
        g_idx = torch.arange(K, dtype=torch.int32) // G
        if order:
            shuffled = torch.randperm(K)
            weight, g_idx = weight[:, shuffled], g_idx[shuffled]
        linear = torch.nn.Linear(K, N, bias=False)
        linear.weight.data = weight
        packed = TorchLinear(bits, G, symmetric, order, K, N, register_buffers=True)
        packed.pack_block(linear, scales, zeros, g_idx)
        packed.post_init()
        tensors = {n: packed.get_buffer(n) for n in ("qweight", "qzeros", "scales", "g_idx")}
        decoded = packed.dequantize_weight().t().float()
        config = {"bits": bits, "group_size": G, "sym": symmetric, "desc_act": order}
        name = f"gptq_v2-{bits}{'' if symmetric else '-asym'}{'-order' if order else ''}"
        write(name, {**tensors, "decoded": decoded}, "gptqmodel", config)
    weight, scales, zeros = problem(4, False)
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = weight
    packed = AwqGEMMLinear.__new__(AwqGEMMLinear)
    torch.nn.Module.__init__(packed)
    packed.bits, packed.group_size, packed.in_features, packed.out_features = 4, G, K, N
    packed.pack(linear, scales.half(), zeros)
    tensors = {n: packed.get_buffer(n) for n in ("qweight", "qzeros", "scales")}
    reader = AwqTorchLinear(4, G, False, False, K, N, register_buffers=True)
    for n, t in tensors.items():
        reader.register_buffer(n, t)
    reader.post_init()
    with torch.no_grad():
        decoded = reader(torch.eye(K, dtype=torch.float16)).t().float()
    write("awq", {**tensors, "decoded": decoded}, "gptqmodel", {"bits": 4, "group_size": G})


def compressed_tensors() -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Packed
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    for bits, symmetric in ((3, True), (4, True), (4, False), (8, True)):
        weight, scales, zeros = problem(bits, symmetric)
        args = QuantizationArgs(
            num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=G
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        state = {"weight": weight, "weight_scale": scales}
        if not symmetric:
            state["weight_zero_point"] = (zeros - (1 << (bits - 1))).to(torch.int8)
        stored = Packed.compress(state, scheme)
        decoded = Packed.decompress(dict(stored), scheme)["weight"]
        config = {"num_bits": bits, "group_size": G, "symmetric": symmetric}
        name = f"compressed-tensors-{bits}{'' if symmetric else '-asym'}"
        write(name, {**stored, "decoded": decoded}, "compressed-tensors", config)


if __name__ == "__main__":
    {"gptqmodel": gptqmodel, "compressed-tensors": compressed_tensors}[sys.argv[1]]()
