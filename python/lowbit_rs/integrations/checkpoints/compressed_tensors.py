"""compressed-tensors' format pack-quantized, W4A16 and W8A16, as llm-compressor writes it.

A linear layer ``Y`` of K inputs and N outputs decodes to w = scale * (q - zero), and is stored as

    Y.weight_packed       int32 [N, ceil(K bits / 32)], q + 2^(bits - 1) along K, the lowest bits first
    Y.weight_scale        [N, groups], of the model's dtype; [N, 1] a row; [1] the whole weight
    Y.weight_zero_point   where asymmetric: int32 [ceil(N bits / 32), groups], zero + 2^(bits - 1) along N
    Y.weight_shape        int64 [2], [N, K]
    Y.weight_g_idx        with actorder "group": int32 [K], the group of each column
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit_rs.errors import invalid, unsupported
from lowbit_rs.files.safetensors_format import brief

from .affine import SCALE_DTYPES, integers, little_endian_bytes, pack_rows, spec_of, tensors_of
from .source import ForeignWeight, Quantization, TensorSource, foreign_weight

_FORMAT = "pack-quantized"
_BITS = (4, 8)
_STRATEGIES = ("group", "channel", "tensor")


def read(source: TensorSource, quantization: Quantization) -> Iterator[ForeignWeight]:
    """The quantized weights of a checkpoint of compressed-tensors."""
    _refuse_extras(quantization)
    groups = _object("config_groups", quantization.get("config_groups"))
    for name, group in groups.items():
        targets = _object(name, group).get("targets")
        if not isinstance(targets, list):
            raise invalid(f"quantization_config: targets of {brief(name)}", brief(targets), "a list of names")
    for name in source.infos:
        if name.endswith(".weight_packed"):
            module = name.removesuffix(".weight_packed")
            yield _read_layer(source, module, _arguments(module, groups, quantization))


def _object(name: str, value: object) -> Mapping[str, Any]:
    """An object of the config, empty where it is null."""
    if value is not None and not isinstance(value, dict):
        raise invalid(f"quantization_config: {name}", brief(value), "an object")
    return value or {}


def _refuse_extras(quantization: Quantization) -> None:
    """Refuses what changes activations or weights beyond the packing of weights."""
    for key in ("kv_cache_scheme", "transform_config"):
        if quantization.get(key):
            raise unsupported(f"compressed-tensors with {key}", "weights alone are quantized here")
    sparsity = _object("sparsity_config", quantization.get("sparsity_config")).get("format", "dense")
    if sparsity != "dense":
        raise unsupported(f"compressed-tensors with sparsity {brief(sparsity)}", "served are dense weights")
    status = quantization.get("quantization_status", default="compressed")
    if status != "compressed":
        raise unsupported(f"quantization_status {brief(status)}", "served are compressed checkpoints")


def _arguments(module: str, groups: Mapping[str, Mapping[str, Any]], quantization: Quantization) -> Mapping[str, Any]:
    """The arguments with which the weight of a module was quantized, checked."""
    group = _group_of(module, groups)
    format = group.get("format") or quantization.get("format")
    arguments = _object("weights", group.get("weights"))
    if format != _FORMAT:
        raise unsupported(f"compressed-tensors format {brief(format)}", f"served is {_FORMAT}")
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise unsupported(f"compressed-tensors with {key}", "activations stay floats here: W4A16 and W8A16")
    served: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("type", ("int",)),
        ("num_bits", _BITS),
        ("strategy", _STRATEGIES),
    )
    for key, values in served:
        if arguments.get(key) not in values:
            raise unsupported(f"compressed-tensors weights with {key} {brief(arguments.get(key))}", f"served: {values}")
    if not isinstance(arguments.get("symmetric"), bool):
        raise invalid("quantization_config: symmetric", brief(arguments.get("symmetric")), "true or false")
    return arguments


def _group_of(module: str, groups: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The group whose targets name the module: by its name or a pattern ``re:...``, before those by class."""
    if len(groups) == 1:
        return next(iter(groups.values()))
    by_class = [group for group in groups.values() if "Linear" in group["targets"]]
    for group in groups.values():
        for target in map(str, group["targets"]):
            if target == module or (target.startswith("re:") and _matches(target, module)):
                return group
    if len(by_class) != 1:
        raise invalid("quantization_config: config_groups", f"{len(by_class)} groups for {brief(module)}", "one")
    return by_class[0]


def _matches(target: str, module: str) -> bool:
    try:
        return re.match(target.removeprefix("re:"), module) is not None
    except re.error as error:
        raise invalid("quantization_config: targets", brief(target), f"a regular expression ({error})") from None


def _read_layer(source: TensorSource, module: str, arguments: Mapping[str, Any]) -> ForeignWeight:
    names = {part: f"{module}.weight_{part}" for part in ("packed", "scale", "shape", "zero_point", "g_idx")}
    bits = arguments["num_bits"]
    source.expect(names["shape"], (torch.int64, torch.int32), 2)
    rows, cols = map(int, source.read(names["shape"]).tolist())
    source.expect(names["packed"], (torch.int32,), rows, -(-cols * bits // 32))
    scale = _scale(source, names["scale"], rows)
    groups = scale.shape[1]
    group_size = _group_size(arguments, module, groups, cols)
    zeros = None
    if not arguments["symmetric"]:
        source.expect(names["zero_point"], (torch.int32,), -(-rows * bits // 32), groups)
        words = source.read(names["zero_point"]).T
        zeros = integers(little_endian_bytes(words).flatten(1), bits)[:, :rows].T.contiguous()
    permutation = _permutation(source, names["g_idx"], group_size, cols)
    spec = spec_of(bits, zeros, group_size, cols, scale.dtype)

    def load() -> dict[str, Tensor]:
        codes = little_endian_bytes(source.read(names["packed"])).flatten(1)
        data = pack_rows(codes, bits, cols, permutation)
        tensors = tensors_of(spec, data, _scale(source, names["scale"], rows), zeros, group_size, cols)
        return tensors if permutation is None else tensors | {"permutation": permutation}

    parts = tuple(name for part, name in names.items() if name in source.infos)
    name = f"{module}.weight"
    return foreign_weight(name, spec, (rows, cols), scale.dtype, parts, load, permuted=permutation is not None)


def _scale(source: TensorSource, name: str, rows: int) -> Tensor:
    """Scales [N, groups]; one of the whole weight is repeated for each row."""
    shape = source.info(name).shape
    if shape in ((), (1,), (1, 1)):
        source.expect(name, SCALE_DTYPES, *shape)
        return source.read(name).reshape(1, 1).expand(rows, 1)
    source.expect(name, SCALE_DTYPES, rows, None)
    return source.read(name)


def _group_size(arguments: Mapping[str, Any], module: str, groups: int, cols: int) -> int:
    group_size = arguments.get("group_size") if arguments["strategy"] == "group" else cols
    if not isinstance(group_size, int) or group_size < 1 or -(-cols // group_size) != groups:
        raise invalid(f"{brief(module)}: group_size", f"{brief(group_size)} for {groups} groups", f"{cols} columns")
    return group_size


def _permutation(source: TensorSource, name: str, group_size: int, cols: int) -> Tensor | None:
    """What sorts the columns by group, int32 [K], where they are not in order."""
    if name not in source.infos:
        return None
    source.expect(name, (torch.int32, torch.int64), cols)
    g_idx = source.read(name)
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[order], (torch.arange(cols) // group_size).to(g_idx.dtype)):
        raise unsupported(f"{brief(name)}: groups of several sizes", f"each but the last has {group_size} columns")
    return None if torch.equal(order, torch.arange(cols)) else order.to(torch.int32)
