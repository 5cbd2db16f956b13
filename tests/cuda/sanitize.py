"""Every kernel once or twice and no library's beside them, for compute-sanitizer: all tests would take it too long.

compute-sanitizer --tool memcheck|racecheck|initcheck --error-exitcode 1 python tests/cuda/sanitize.py
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

import lowbit_rs
from lowbit_rs._backends import cuda
from lowbit_rs._norm_ops import NormKind
from lowbit_rs.nn.norm import normalize

_WEIGHTS: tuple[dict[str, Any], ...] = (
    {},
    {"double_quant": True},
    {"format": "uint4", "double_quant": True, "scale_dtype": torch.float16},
    {"format": "int8", "block_size": 32},
    {"format": "uint8", "block_size": 32},
    {"format": "fp4", "block_size": 32, "scale_dtype": torch.bfloat16},
    {"codebook": (1.0, -1.0, 0.5), "signed_absmax": True, "block_size": "row"},
    {"format": "int8", "block_size": "row"},
    {"block_order": "flat", "block_size": 32},
)


def main() -> None:
    """Packs, unpacks and multiplies small weights, and compares with the CPU."""
    for options, (rows, cols) in product(_WEIGHTS, ((40, 512), (19, 75), (3, 4352))):
        for dtype in (torch.float32, torch.bfloat16):
            weight = torch.randn(rows, cols).to(dtype)
            packed = lowbit_rs.quantize(weight.cuda(), **options)
            same = lowbit_rs.quantize(weight, **options)
            assert packed.to("cpu") == same, options
            assert torch.equal(packed.dequantize().cpu(), same.dequantize()), options
            # Many tokens have a kernel for 16-bit activations and rows of whole 16 bytes.
            has_batches = dtype == torch.bfloat16 and cols % 32 == 0 and "block_order" not in options
            for tokens in (1, 3, 9, 40, 100) if has_batches else (1, 3, 9):
                x = torch.randn(tokens, cols).to(dtype)
                y = lowbit_rs.linear(x.cuda(), packed, torch.ones(rows).cuda()).cpu()
                wanted = lowbit_rs.linear(x, same, torch.ones(rows))
                assert _distance(y, wanted) < 2e-2, (options, rows, cols, dtype, tokens)
            indices = torch.tensor([rows - 1, 0, 2])
            layer = lowbit_rs.QuantEmbedding.from_packed(packed)
            assert torch.equal(layer(indices.cuda()).cpu(), same.dequantize()[indices])
    _int8()
    _experts()
    _norms()
    torch.cuda.synchronize()


def _distance(y: Tensor, wanted: Tensor) -> float:
    return float((y.float() - wanted.float()).norm() / wanted.float().norm())


def _int8() -> None:
    """Rows of activations in int8, and their products where this GPU has them."""
    for (rows, cols), dtype in product(((40, 512), (264, 144)), (torch.float32, torch.bfloat16)):
        if torch.cuda.get_device_capability() != (9, 0):
            return
        packed = lowbit_rs.quantize(torch.randn(rows, cols), "int8", "row")
        for outliers, threshold in ((0, 0.0), (3, 6.0), (min(3 * cols // 4, 300), 6.0)):
            x = torch.randn(150, cols).clamp(-4, 4)
            x[::3, :outliers] = 50.0
            x = x.to(dtype).cuda()
            cuda.round_rows(x, threshold)
            y = lowbit_rs.linear(x, packed.to("cuda"), activation="int8", threshold=threshold).float().cpu()
            wanted = x.cpu().float() @ packed.dequantize().T
            assert _distance(y, wanted) < 2e-2, (rows, cols, dtype, outliers)


def _experts() -> None:
    """Rows sorted by expert times the matrices of a stack, every size of tiles, rows left over."""
    for options in ({}, {"double_quant": True}, {"scale_dtype": torch.float16, "block_size": 128}):
        weight = torch.randn(3, 130, 192)
        packed = lowbit_rs.quantize(weight.cuda(), **options)
        matrices = packed.dequantize(torch.float32).cpu()
        for counts in ([2, 0, 3], [0, 9, 20], [40, 1, 30], [70, 65, 0]):
            x = torch.randn(sum(counts) + 1, 192).to(torch.bfloat16)
            arguments = packed.operands(), list(packed.shape), *packed.scheme, "none"
            y = torch.ops.lowbit_rs.linear_grouped(x.cuda(), torch.tensor(counts).cuda(), *arguments).cpu()
            parts = zip(x[:-1].float().split(counts), matrices, strict=True)
            wanted = torch.cat([*(part @ matrix.T for part, matrix in parts), torch.zeros(1, 130)])
            assert _distance(y, wanted) < 2e-2, (options, counts)


def _norms() -> None:
    """Normalizes rows by every kernel and compares with the CPU."""
    kinds = (NormKind(1e-5), NormKind(1e-5, cast_before_weight=True), NormKind(1e-5, centered=True, unit_offset=True))
    widths = (72, 256, 512, 1000, 2048, 4096, 8192, 16384, 75)
    for kind, width, dtype in product(kinds, widths, (torch.float32, torch.bfloat16)):
        x, residual = torch.randn(5, width).to(dtype), torch.randn(5, width).to(dtype)
        weight = torch.randn(width)
        y, total = normalize(x.cuda(), residual.cuda(), weight.cuda(), weight.to(dtype).cuda(), kind)
        wanted, same = normalize(x, residual, weight, weight.to(dtype), kind)
        assert total is not None
        assert same is not None
        assert torch.equal(total.cpu(), same)
        torch.testing.assert_close(y.cpu(), wanted, rtol=2e-2, atol=2e-2)
        for threshold in (0.0, 1.0):
            y, _, made = cuda.norm_rounded(x.cuda(), residual.cuda(), weight.cuda(), None, kind, threshold)
            assert torch.equal(made.codes, cuda.round_rows(y, threshold).codes)
        gradients = []
        for device in ("cpu", "cuda"):
            rows, factors = x.to(device).requires_grad_(), weight.to(device).requires_grad_()
            results = [part for part in normalize(rows, residual.to(device), factors, None, kind) if part is not None]
            gradients.append(torch.autograd.grad(results, (rows, factors), [residual.to(device)] * 2))
        for mine, other in zip(*gradients, strict=True):
            assert _distance(other.cpu(), mine) < 1e-2, (kind, width, dtype)


if __name__ == "__main__":
    main()
