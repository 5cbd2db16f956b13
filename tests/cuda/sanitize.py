"""Every kernel once or twice and no library's beside them, for compute-sanitizer: all tests would take it too long.

compute-sanitizer --tool memcheck|racecheck|initcheck --error-exitcode 1 python tests/cuda/sanitize.py
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

import lowbit_rs
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
    {"block_order": "flat", "block_size": 32},
)


def main() -> None:
    """Packs, unpacks and multiplies small weights, and compares with the CPU."""
    for options, (rows, cols) in product(_WEIGHTS, ((40, 512), (19, 75))):
        for dtype in (torch.float32, torch.bfloat16):
            weight = torch.randn(rows, cols).to(dtype)
            packed = lowbit_rs.quantize(weight.cuda(), **options)
            same = lowbit_rs.quantize(weight, **options)
            assert packed.to("cpu") == same, options
            assert torch.equal(packed.dequantize().cpu(), same.dequantize()), options
            for tokens in (1, 3, 9):
                x = torch.randn(tokens, cols).to(dtype)
                y = lowbit_rs.linear(x.cuda(), packed, torch.ones(rows).cuda()).cpu()
                wanted = lowbit_rs.linear(x, same, torch.ones(rows))
                torch.testing.assert_close(y, wanted, rtol=2e-2, atol=2e-1)
            indices = torch.tensor([rows - 1, 0, 3])
            layer = lowbit_rs.QuantEmbedding.from_packed(packed)
            assert torch.equal(layer(indices.cuda()).cpu(), same.dequantize()[indices])
    normalize_rows()
    torch.cuda.synchronize()


def normalize_rows() -> None:
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


if __name__ == "__main__":
    main()
