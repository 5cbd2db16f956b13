"""bitsandbytes: NF4 and FP4 with plain or double-quantized scales, and LLM.int8's rows; read and written.

A 4-bit weight ``X`` (usually ``Y.weight``) is stored as

    X                    codes, uint8 [ceil(N K / 2), 1], the high nibble first; or the same bytes as another dtype
    X.absmax             scales, float32 [blocks], or their uint8 codes where nested
    X.quant_map          the codebook, float32 [16]
    X.nested_absmax      where nested: float32, one for 256 scales
    X.nested_quant_map   where nested: the dynamic map, float32 [256]
    X.quant_state.bitsandbytes__nf4 (or fp4)   JSON as uint8: quant_type, blocksize, dtype, shape, nested_blocksize,
                                               nested_dtype, nested_offset

and an 8-bit one as ``Y.weight`` int8 [N, K], ``Y.SCB`` float32 [N] (absolute maxima of rows), ``Y.weight_format`` (0).

Codes and scales of 4 bits are ours, byte for byte, so that decoded weights are equal to the bit. In 8 bits the scale is
SCB / 127, rounded to float32; bitsandbytes multiplies by SCB and by 1/127, so that float32 weights may differ in the
last two bits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit_rs import codebooks
from lowbit_rs.errors import invalid, unsupported
from lowbit_rs.files.metadata import QuantizedTensor
from lowbit_rs.files.safetensors_format import TensorInfo, brief, is_size, parse_json, safetensors_dtype
from lowbit_rs.packed import DTYPES, dtype_name, make_spec, state_key, storage

from .source import ForeignWeight, Quantization, TensorSource, foreign_weight

#: Block sizes that bitsandbytes takes.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

_CODEBOOKS: Mapping[str, Callable[[], codebooks.Table]] = {"nf4": codebooks.nf4, "fp4": codebooks.fp4}
_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
_NESTED_BLOCK = 256
#: Fewer bytes than these follow the codes where quant_storage is a wider dtype, of which there are whole elements.
_PADDING = 16
_WEIGHT_FORMATS = {1: "col32", 2: "col_turing", 3: "col_ampere"}

#: Written as bitsandbytes' QuantState takes it: a part's name, and what makes it.
Part = tuple[TensorInfo, Callable[[], Tensor]]


def read(source: TensorSource, quantization: Quantization) -> Iterator[ForeignWeight]:  # noqa: ARG001  # describes itself
    """The quantized weights of a checkpoint of bitsandbytes."""
    for name in source.infos:
        state = _STATE.fullmatch(name)
        if state is not None:
            yield _read_4bit(source, state.group(1), state.group(2))
        elif name.endswith(".SCB"):
            yield _read_8bit(source, name.removesuffix(".SCB"))


def _read_4bit(source: TensorSource, name: str, quant_type: str) -> ForeignWeight:
    state_name = f"{name}.quant_state.bitsandbytes__{quant_type}"
    source.expect(state_name, (torch.uint8,), None)
    state = _parse_state(state_name, source.read(state_name))
    shape, dtype, block_size = tuple(state["shape"]), DTYPES[state["dtype"]], state["blocksize"]
    nested = f"{name}.nested_absmax" in source.infos
    if nested and not state.keys() >= {"nested_blocksize", "nested_offset"}:
        raise invalid(brief(state_name), brief(state), "nested_blocksize and nested_offset in it")
    source.expect(f"{name}.quant_map", (torch.float32,), 16)
    table = source.read(f"{name}.quant_map")
    known = torch.from_numpy(_CODEBOOKS[quant_type]())
    format = quant_type if torch.equal(table, known) else "custom"
    double_quant = nested and _is_ours(source, name, state)
    order = "row" if shape[-1] % block_size == 0 else "flat"
    spec = make_spec((format, block_size, order, double_quant))
    length = table.numel() if format == "custom" else None
    sizes = storage(spec, shape, length)
    _check_bytes(source.info(name), spec.layout(math.prod(shape[:-1]), shape[-1]).code_bytes)

    def load() -> dict[str, Tensor]:
        codes = source.read(name).reshape(-1).view(torch.uint8)[: sizes["data"][0].numel()]
        tensors = {"data": codes, "scale": source.read(f"{name}.absmax")}
        if double_quant:
            tensors["scale_2"] = source.read(f"{name}.nested_absmax")
            tensors["scale_offset"] = torch.tensor([state["nested_offset"]])
        elif nested:
            tensors["scale"] = _restore(source, name, state)
        if format == "custom":
            tensors["codebook"] = table
        return {field: tensor.reshape(sizes[field][0]) for field, tensor in tensors.items()}

    suffixes = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    parts = [f"{name}.{suffix}" for suffix in suffixes if f"{name}.{suffix}" in source.infos]
    _check_scales(source, name, sizes["scale"][0].numel(), state["nested_blocksize"] if nested else None)
    return foreign_weight(name, spec, shape, dtype, (name, *parts, state_name), load, codebook_length=length)


def _parse_state(name: str, data: Tensor) -> dict[str, Any]:
    """The JSON of a quant_state, checked as far as it is used."""
    where = brief(name)
    try:
        state = parse_json(data.numpy().tobytes().decode())
    except ValueError as error:
        raise invalid(where, str(error), "a JSON object") from None
    if not isinstance(state, dict):
        raise invalid(where, brief(state), "a JSON object")
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) not in (2, 3) or not all(is_size(size) for size in shape):
        raise invalid(f"{where}: shape", brief(shape), "two or three sizes")
    if state.get("dtype") not in DTYPES:
        raise invalid(f"{where}: dtype", brief(state.get("dtype")), " or ".join(DTYPES))
    if state.get("blocksize") not in BLOCK_SIZES:
        raise invalid(
            f"{where}: blocksize", brief(state.get("blocksize")), f"one of {', '.join(map(str, BLOCK_SIZES))}"
        )
    offset = state.get("nested_offset", 0.0)
    nested_size = state.get("nested_blocksize", 1)
    if not isinstance(offset, int | float) or not isinstance(nested_size, int) or nested_size < 1:
        raise invalid(f"{where}: nested_offset, nested_blocksize", brief(state), "a number and a positive integer")
    return state


def _check_bytes(info: TensorInfo, code_bytes: int) -> None:
    if not code_bytes <= info.nbytes < code_bytes + _PADDING:
        raise invalid(brief(info.name), f"{info.nbytes} bytes", f"the {code_bytes} that its quant_state tells of")


def _check_scales(source: TensorSource, name: str, blocks: int, nested_size: int | None) -> None:
    nested = nested_size is not None
    info = source.info(f"{name}.absmax")
    expected = safetensors_dtype(torch.uint8 if nested else torch.float32)
    if info.dtype != expected or math.prod(info.shape) != blocks:
        raise invalid(brief(info.name), f"{info.dtype} {list(info.shape)}", f"{expected} [{blocks}]")
    if nested_size is not None:
        source.expect(f"{name}.nested_absmax", (torch.float32,), -(-blocks // nested_size))


def _is_ours(source: TensorSource, name: str, state: Mapping[str, Any]) -> bool:
    """Whether double-quantized scales are stored as ours are: with the same map, and 256 of them in a block.

    If not, they are restored to float32, which decodes to the same weights.
    """
    source.expect(f"{name}.nested_quant_map", (torch.float32,), 256)
    table = source.read(f"{name}.nested_quant_map")
    same_map = torch.equal(table, torch.from_numpy(codebooks.dynamic_map()))
    return same_map and state.get("nested_blocksize") == _NESTED_BLOCK


def _restore(source: TensorSource, name: str, state: Mapping[str, Any]) -> Tensor:
    """Double-quantized scales as float32, with bitsandbytes' two roundings."""
    codes = source.read(f"{name}.absmax").reshape(-1)
    scale_2 = source.read(f"{name}.nested_absmax").repeat_interleave(state["nested_blocksize"])[: codes.numel()]
    return source.read(f"{name}.nested_quant_map")[codes.int()] * scale_2 + torch.tensor(state["nested_offset"])


def _read_8bit(source: TensorSource, module: str) -> ForeignWeight:
    name, scale_name, format_name = f"{module}.weight", f"{module}.SCB", f"{module}.weight_format"
    shape = source.expect(name, (torch.int8,), None, None).shape
    source.expect(scale_name, (torch.float32,), shape[0])
    parts: tuple[str, ...] = (name, scale_name)
    if format_name in source.infos:
        parts = (*parts, format_name)
        source.expect(format_name, (torch.uint8,))
        order = int(source.read(format_name))
        if order != 0:
            kind = _WEIGHT_FORMATS.get(order, "unknown")
            reason = "load it with the bitsandbytes that wrote it and save it anew, which makes it row-major (0)"
            raise unsupported(f"{brief(format_name)}: {order} ({kind})", reason)
    dtype = source.dtype or torch.float16  # the one in which bitsandbytes quantizes to 8 bits

    def load() -> dict[str, Tensor]:
        return {"data": source.read(name), "scale": (source.read(scale_name) / 127)[:, None]}

    return foreign_weight(name, make_spec(("int8", 0, "row", False)), shape, dtype, parts, load)


def products(quantization: Quantization) -> dict[str, Any]:
    """How the weights of a checkpoint are multiplied, as options of a LowbitConfig.

    Rows in 8 bits are meant for activations in 8 bits, but for outliers: those from 6 on where nothing is said.
    """
    if quantization.get("load_in_8bit") is not True:
        return {}
    return {"activation": "auto", "threshold": quantization.get("llm_int8_threshold", default=6.0)}


def write(tensor: QuantizedTensor, source: TensorSource) -> list[Part]:
    """The parts of a native weight in bitsandbytes' layout. Raises Unsupported where that has none for it."""
    if tensor.permuted:
        raise unsupported(f"{brief(tensor.name)} with permuted columns", "bitsandbytes keeps columns in order")
    if tensor.spec.format in _CODEBOOKS:
        return _write_4bit(tensor, source)
    if tensor.spec.format == "int8":
        return _write_8bit(tensor, source)
    raise unsupported(f"{brief(tensor.name)} in {tensor.spec.format}", "bitsandbytes has nf4, fp4 and int8 alone")


def _write_4bit(tensor: QuantizedTensor, source: TensorSource) -> list[Part]:
    spec, cols = tensor.spec, tensor.shape[-1]
    block_size = cols if spec.block_size == "row" else int(spec.block_size)
    if block_size not in BLOCK_SIZES or (spec.block_order == "row" and cols % block_size):
        reason = f"bitsandbytes cuts the flattened matrix into blocks of {', '.join(map(str, BLOCK_SIZES))}"
        raise unsupported(f"{brief(tensor.name)} of {cols} columns in blocks of {block_size} by row", reason)
    stored = tensor.parts()
    name, code_bytes = tensor.name, stored["data"].nbytes
    table = torch.from_numpy(_CODEBOOKS[spec.format]()) + 0.0  # bitsandbytes has FP4's -0 as 0
    state = {
        "quant_type": spec.format,
        "blocksize": block_size,
        "dtype": dtype_name(tensor.dtype),
        "shape": list(tensor.shape),
    }
    blocks = math.prod(stored["scale"].shape)
    scale = stored["scale"].name
    parts = [
        _part(name, torch.uint8, (code_bytes, 1), lambda: source.read(name).reshape(code_bytes, 1)),
        _part(f"{name}.quant_map", torch.float32, (16,), lambda: table),
    ]
    if spec.double_quant:
        nested = math.prod(stored["scale_2"].shape)
        offset = float(source.read(state_key(name, "scale_offset")))
        state |= {"nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        dynamic_map = torch.from_numpy(codebooks.dynamic_map())
        parts += [
            _part(f"{name}.absmax", torch.uint8, (blocks,), lambda: source.read(scale).reshape(-1)),
            _part(f"{name}.nested_absmax", torch.float32, (nested,), lambda: source.read(stored["scale_2"].name)),
            _part(f"{name}.nested_quant_map", torch.float32, (256,), lambda: dynamic_map),
        ]
    else:
        parts.append(_part(f"{name}.absmax", torch.float32, (blocks,), lambda: source.read(scale).reshape(-1).float()))
    encoded = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    state_name = f"{name}.quant_state.bitsandbytes__{spec.format}"
    return [*parts, _part(state_name, torch.uint8, (encoded.numel(),), lambda: encoded)]


def _write_8bit(tensor: QuantizedTensor, source: TensorSource) -> list[Part]:
    rows_only = len(tensor.shape) == 2 and tensor.parts()["scale"].shape == (tensor.shape[0], 1)
    if not rows_only or tensor.spec.double_quant or not tensor.name.endswith(".weight"):
        reason = 'bitsandbytes has one float32 scale a row: block_size="row", without double_quant, for *.weight [N, K]'
        raise unsupported(f"{brief(tensor.name)} in int8 blocks of {tensor.spec.block_size}", reason)
    name, module = tensor.name, tensor.name.removesuffix(".weight")
    scale_name = state_key(name, "scale")
    return [
        _part(name, torch.int8, tuple(tensor.shape), lambda: source.read(name)),
        _part(f"{module}.SCB", torch.float32, (tensor.shape[0],), lambda: _absmax(source.read(scale_name).flatten())),
        _part(f"{module}.weight_format", torch.uint8, (), lambda: torch.tensor(0, dtype=torch.uint8)),
    ]


def _absmax(scale: Tensor) -> Tensor:
    """The float32 whose 127th part is ``scale``, or where rounding leaves none the nearest."""
    absmax = scale.float() * 127
    for candidate in (absmax.nextafter(torch.zeros(())), absmax.nextafter(torch.tensor(torch.inf))):
        absmax = torch.where((absmax / 127 != scale) & (candidate / 127 == scale), candidate, absmax)
    return absmax


def _part(name: str, dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Part:
    return TensorInfo(name, safetensors_dtype(dtype), shape), make


def config_of(tensors: list[QuantizedTensor], unquantized: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` with which transformers loads these weights.

    ``unquantized`` are names of modules with a float matrix. Raises Unsupported for 4 and 8 bits in one checkpoint,
    for which bitsandbytes' config has no words.
    """
    formats = {tensor.spec.format for tensor in tensors}
    if len(formats) != 1 or len({tensor.spec.double_quant for tensor in tensors}) != 1:
        what = f"a model with weights in {' and '.join(sorted(formats))}, double-quantized and not"
        raise unsupported(what, "bitsandbytes' config names one format for all of a model")
    four_bits = formats != {"int8"}
    config: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four_bits,
        "load_in_8bit": not four_bits,
        "llm_int8_skip_modules": unquantized,
        "llm_int8_threshold": 6.0,
    }
    if four_bits:
        config |= {
            "bnb_4bit_quant_type": formats.pop(),
            "bnb_4bit_use_double_quant": tensors[0].spec.double_quant,
            "bnb_4bit_compute_dtype": dtype_name(tensors[0].dtype),
            "bnb_4bit_quant_storage": "uint8",
        }
    return config
