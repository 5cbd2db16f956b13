"""AWQ in 4 bits, as AutoAWQ writes it: the layouts GEMM and GEMV.

A linear layer ``Y`` of K inputs and N outputs decodes to w = scale * (q - zero), and is stored as

    GEMM   Y.qweight int32 [K, N / 8], Y.qzeros int32 [groups, N / 8], Y.scales float16 [groups, N]
           the nibbles of a word, lowest first, are its outputs 0, 2, 4, 6, 1, 3, 5, 7
    GEMV   Y.qweight int32 [N, K / 8], Y.qzeros int32 [N, width], Y.scales float16 [N, 8 width]
           nibbles along K, and along groups, in order, lowest first; the width is padded
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from lowbit_rs.errors import invalid, unsupported
from lowbit_rs.files.safetensors_format import brief

from .affine import SCALE_DTYPES, integers, little_endian_bytes, pack_integers, pack_rows, spec_of, tensors_of
from .source import ForeignWeight, Quantization, TensorSource, foreign_weight

#: Where in a word of GEMM its outputs 0 to 7 lie.
_GEMM_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)

_BITS = 4


def read(source: TensorSource, quantization: Quantization) -> Iterator[ForeignWeight]:
    """The quantized weights of an AWQ checkpoint."""
    bits = quantization.integer("bits", "w_bit")
    if bits != _BITS:
        raise unsupported(f"AWQ in {bits} bits", "served is 4")
    version = str(quantization.get("version", "format", default="gemm")).lower()
    layout = _VERSIONS.get(version)
    if layout is None:
        raise unsupported(f"AWQ version {brief(version)}", f"served are {' and '.join(_VERSIONS)}")
    group_size = quantization.integer("group_size", "q_group_size")
    for name in source.infos:
        if name.endswith(".qweight"):
            yield layout(source, name.removesuffix(".qweight"), group_size)


def _read_gemm(source: TensorSource, module: str, group_size: int) -> ForeignWeight:
    cols, words = source.expect(f"{module}.qweight", (torch.int32,), None, None).shape
    group_size, groups = _groups(module, group_size, cols)
    source.expect(f"{module}.qzeros", (torch.int32,), groups, words)
    source.expect(f"{module}.scales", SCALE_DTYPES, groups, 8 * words)

    def outputs_first(words: Tensor) -> Tensor:
        """Words [R, N / 8] as integers uint8 [N, R]."""
        values = integers(little_endian_bytes(words), _BITS)
        return values[..., _GEMM_ORDER].flatten(1).T.contiguous()

    zeros = outputs_first(source.read(f"{module}.qzeros"))
    return _weight(
        module,
        (8 * words, cols),
        group_size,
        zeros,
        lambda: pack_integers(outputs_first(source.read(f"{module}.qweight")), _BITS),
        lambda: source.read(f"{module}.scales").T,
    )


def _read_gemv(source: TensorSource, module: str, group_size: int) -> ForeignWeight:
    rows, words = source.expect(f"{module}.qweight", (torch.int32,), None, None).shape
    cols = 8 * words
    group_size, groups = _groups(module, group_size, cols)
    width = source.expect(f"{module}.qzeros", (torch.int32,), rows, None).shape[1]
    source.expect(f"{module}.scales", SCALE_DTYPES, rows, 8 * width)
    if 8 * width < groups:
        raise invalid(f"{module}.qzeros", f"room for {8 * width} groups", f"{groups}")
    zeros = integers(little_endian_bytes(source.read(f"{module}.qzeros")).flatten(1), _BITS)[:, :groups].contiguous()
    return _weight(
        module,
        (rows, cols),
        group_size,
        zeros,
        lambda: pack_rows(little_endian_bytes(source.read(f"{module}.qweight")).flatten(1), _BITS, cols),
        lambda: source.read(f"{module}.scales")[:, :groups],
    )


_VERSIONS: Mapping[str, Callable[[TensorSource, str, int], ForeignWeight]] = {"gemm": _read_gemm, "gemv": _read_gemv}


def _groups(module: str, group_size: int, cols: int) -> tuple[int, int]:
    """The size of a group and their number."""
    group_size = cols if group_size == -1 else group_size
    if group_size < 1 or cols % group_size:
        raise invalid(f"{brief(module)}: group_size", group_size, f"-1 or a divisor of the {cols} columns")
    return group_size, cols // group_size


def _weight(
    module: str,
    shape: tuple[int, int],
    group_size: int,
    zeros: Tensor,
    data: Callable[[], Tensor],
    scale: Callable[[], Tensor],
) -> ForeignWeight:
    parts = (f"{module}.qweight", f"{module}.qzeros", f"{module}.scales")
    dtype = scale().dtype
    spec = spec_of(_BITS, zeros, group_size, shape[1], dtype)

    def load() -> dict[str, Tensor]:
        return tensors_of(spec, data(), scale(), zeros, group_size, shape[1])

    return foreign_weight(f"{module}.weight", spec, shape, dtype, parts, load)
