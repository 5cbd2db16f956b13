"""Makes tests/data/foreign: small checkpoints that other quantization libraries packed, and what they decode to.

    python derive_foreign.py SITE OUT

SITE is a directory with the unpacked wheels of auto-gptq 0.7.1 and autoawq 0.2.7.post3, whose modules are loaded one by
one: the packages as a whole ask for an old transformers. bitsandbytes 0.50.2 and compressed-tensors 0.20.0 are
installed. All of it runs on the CPU.

Each case is a file CASE.safetensors with the tensors of a layer ``layer`` under the library's names and, in its
metadata, ``quantization_config`` as JSON; its decoded weight [N, K] is the tensor CASE of expected.safetensors.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Case = tuple[dict[str, Any], dict[str, Tensor], Tensor]

N, K = 32, 128


def load(site: Path, package: str, name: str) -> Any:
    """A module of a package, without running the ``__init__`` of the package."""
    parts = name.split(".")
    for depth in range(len(parts)):
        full = ".".join([package, *parts[:depth]])
        shell = types.ModuleType(full)
        shell.__path__ = [str(site.joinpath(package, *parts[:depth]))]
        sys.modules.setdefault(full, shell)
    return importlib.import_module(f"{package}.{name}")


def weight(dtype: torch.dtype, rows: int = N, cols: int = K) -> Tensor:
    return (torch.randn(rows, cols) * 0.05 + torch.randn(rows, 1) * 0.01).to(dtype)


def bitsandbytes_4bit() -> Iterator[tuple[str, Case]]:
    import bitsandbytes

    variants = {
        "bitsandbytes-nf4-nested": ("nf4", torch.bfloat16, 64, True, torch.uint8, K),
        "bitsandbytes-nf4-float-storage": ("nf4", torch.bfloat16, 32, True, torch.bfloat16, K),
        "bitsandbytes-fp4": ("fp4", torch.float16, 64, False, torch.uint8, K),
        "bitsandbytes-nf4-straddling": ("nf4", torch.float32, 64, False, torch.uint8, 75),
    }
    for name, (format, dtype, block_size, nested, storage, cols) in variants.items():
        packed, state = bitsandbytes.functional.quantize_4bit(
            weight(dtype, N, cols),
            blocksize=block_size,
            compress_statistics=nested,
            quant_type=format,
            quant_storage=storage,
        )
        tensors = {f"layer.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": format}
        decoded = bitsandbytes.functional.dequantize_4bit(packed, state)
        yield name, (config, {"layer.weight": packed, **tensors}, decoded.reshape(N, cols))


def bitsandbytes_8bit() -> Iterator[tuple[str, Case]]:
    import bitsandbytes

    codes, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(weight(torch.float16))
    decoded = bitsandbytes.functional.int8_vectorwise_dequant(codes, absmax)
    tensors = {
        "layer.weight": codes,
        "layer.SCB": absmax,
        "layer.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    yield "bitsandbytes-int8", ({"quant_method": "bitsandbytes", "load_in_8bit": True}, tensors, decoded)


def affine(
    x: Tensor, group_size: int, bits: int, symmetric: bool, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scales and zero points, float16 and int [N, groups], of the groups of columns of ``x``."""
    index = torch.arange(x.shape[1]) // group_size if groups is None else groups
    scales, zeros = [], []
    for group in range(math.ceil(x.shape[1] / group_size)):
        columns = x[:, index == group].float()
        low, high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scale = ((high - low) / (2**bits - 1)).half()
        scales.append(scale)
        zero = torch.full_like(low, 2 ** (bits - 1)) if symmetric else torch.round(-low / scale.float()).clamp(1)
        zeros.append(zero)
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def gptq(site: Path) -> Iterator[tuple[str, Case]]:
    module = load(site, "auto_gptq", "nn_modules.qlinear.qlinear_cuda")
    #: bits, group size, symmetric, desc_act
    variants = {
        "gptq-sym": (4, 32, True, False),
        "gptq-asym": (4, 32, False, False),
        "gptq-desc-act": (4, 32, False, True),
        "gptq-row": (4, -1, True, False),
        "gptq-8bit": (8, 32, True, False),
        "gptq-8bit-asym": (8, 32, False, False),
    }
    for name, (bits, group_size, symmetric, desc_act) in variants.items():
        linear = nn.Linear(K, N).half()
        linear.weight.data = weight(torch.float16)
        size = K if group_size == -1 else group_size
        g_idx = torch.empty(K, dtype=torch.int32)
        g_idx[torch.randperm(K) if desc_act else torch.arange(K)] = (torch.arange(K) // size).to(torch.int32)
        scales, zeros = affine(linear.weight.data, size, bits, symmetric, g_idx)
        layer = module.QuantLinear(bits, group_size, K, N, True)
        layer.pack(linear, scales, zeros, g_idx)
        tensors = {f"layer.{key}": getattr(layer, key) for key in ("qweight", "qzeros", "scales", "g_idx", "bias")}
        layer.bias.data.zero_()
        decoded = layer(torch.eye(K).half()).T
        config = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "desc_act": desc_act,
            "sym": symmetric,
            "checkpoint_format": "gptq",
        }
        tensors["layer.bias"] = linear.bias.detach()
        yield name, (config, tensors, decoded)
        if name == "gptq-asym":  # as GPTQModel makes one of the other
            second = tensors | {"layer.qzeros": tensors["layer.qzeros"] + 0x11111111}
            yield "gptq-v2", ({**config, "checkpoint_format": "gptq_v2"}, second, decoded)


def awq(site: Path) -> Iterator[tuple[str, Case]]:
    unpacking = load(site, "awq", "utils.packing_utils")
    if importlib.util.find_spec("accelerate") is None:  # imported there for other functions
        sys.modules["accelerate"] = types.ModuleType("accelerate")
    for version, group_size in (("gemm", 32), ("gemv", 64)):
        module = load(site, "awq", f"modules.linear.{version}")
        linear = nn.Linear(K, N).half()
        scales, zeros = affine(linear.weight.data, group_size, 4, symmetric=False)
        kind = {"gemm": "WQLinear_GEMM", "gemv": "WQLinear_GEMV"}[version]
        if version == "gemm":
            layer = module.__dict__[kind].from_linear(
                linear, 4, group_size, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
            )
            decoded = unpacking.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, group_size).T
        else:
            layer = module.__dict__[kind].from_linear(linear, 4, group_size, scales=scales, zeros=zeros)
            codes = linear.weight.data + (zeros * scales).repeat_interleave(group_size, 1)
            codes = torch.round(codes / scales.repeat_interleave(group_size, 1)).int()
            decoded = (codes - zeros.int().repeat_interleave(group_size, 1)) * scales.repeat_interleave(group_size, 1)
        config = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,
            "version": version,
        }
        tensors = {f"layer.{key}": getattr(layer, key) for key in ("qweight", "qzeros", "scales", "bias")}
        yield f"awq-{version}", (config, tensors, decoded)


def compressed_tensors() -> Iterator[tuple[str, Case]]:
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    #: bits, symmetric, strategy, group size, dtype, columns
    variants = {
        "compressed-tensors-w4a16": (4, True, "group", 32, torch.bfloat16, K),
        "compressed-tensors-w4a16-asym": (4, False, "group", 32, torch.float16, K),
        "compressed-tensors-w4a16-channel": (4, True, "channel", None, torch.float16, 100),
        "compressed-tensors-w8a16": (8, True, "group", 64, torch.bfloat16, K),
        "compressed-tensors-w8a16-channel": (8, True, "channel", None, torch.float16, 99),
        "compressed-tensors-w8a16-asym": (8, False, "group", 32, torch.bfloat16, K),
    }
    for name, (bits, symmetric, strategy, group_size, dtype, cols) in variants.items():
        args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group_size)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        x = weight(dtype, N, cols)
        grouped = x.reshape(N, -1, group_size or cols)
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        state = {"weight": x, "weight_scale": scale.to(dtype), "weight_zero_point": zero}
        packed = PackedQuantizationCompressor.compress(state, scheme)
        decoded = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": strategy,
            "group_size": group_size,
            "actorder": None,
            "dynamic": False,
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        config = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
        }
        yield name, (config, {f"layer.{key}": value for key, value in packed.items()}, decoded)


def main(site: Path, out: Path) -> None:
    torch.manual_seed(0)
    expected = {}
    makers = (bitsandbytes_4bit(), bitsandbytes_8bit(), gptq(site), awq(site), compressed_tensors())
    for maker in makers:
        for name, (config, tensors, decoded) in maker:
            contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
            save_file(contiguous, out / f"{name}.safetensors", {"quantization_config": json.dumps(config)})
            expected[name] = decoded.detach().contiguous()
    save_file(expected, out / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
