"""The checkpoints of tests/data/foreign, which other libraries packed (tests/data/derive_foreign.py), and packers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

FOREIGN = Path(__file__).parent / "data" / "foreign"

#: What each of them decodes to, by the library's own dequantization: [N, K] by case.
EXPECTED = load_file(FOREIGN / "expected.safetensors")


def case(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a case, all of a module ``layer``, and its ``quantization_config``."""
    path = FOREIGN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        config: dict[str, Any] = json.loads(file.metadata()["quantization_config"])
    return load_file(path), config


def write_directory(path: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None, **config: Any) -> Path:
    """A model directory with one safetensors file."""
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    if quantization is not None:
        config["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def write_case(path: Path, name: str, **config: Any) -> Path:
    """A case as a model directory."""
    tensors, quantization = case(name)
    return write_directory(path, tensors, quantization, **config)


# What follows packs weights by the words of each layout, one integer after the other.


def words(integers: np.ndarray[Any, Any], bits: int, axis: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Integers as int32 words of 32 / bits neighbours along an axis; place i of a word has its number order[i]."""
    moved = np.moveaxis(integers, axis, -1)
    each = 32 // bits
    rows = moved.reshape(-1, moved.shape[-1])
    out = np.zeros((rows.shape[0], -(-rows.shape[1] // each)), np.uint32)
    for row in range(rows.shape[0]):
        for place in range(rows.shape[1]):
            word, within = divmod(place, each)
            at = within if order is None else order.index(within)
            out[row, word] |= np.uint32(int(rows[row, place]) << (bits * at))
    out = out.reshape(*moved.shape[:-1], -1)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(out, -1, axis)).view(np.int32))


@dataclasses.dataclass
class Layer:
    """Integers [N, K], scales and zero points [N, groups], the group of each column."""

    q: np.ndarray[Any, Any]
    scale: Tensor
    zero: np.ndarray[Any, Any]
    g_idx: np.ndarray[Any, Any]

    def decoded(self) -> Tensor:
        """The definition, in the dtype of the scales: an exact product, rounded once."""
        difference = torch.from_numpy(self.q - self.zero[:, self.g_idx]).double()
        return (self.scale.double()[:, self.g_idx] * difference).to(self.scale.dtype)


def layer(
    rows: int,
    cols: int,
    group_size: int,
    *,
    bits: int = 4,
    symmetric: bool = False,
    desc_act: bool = False,
    seed: int = 0,
) -> Layer:
    generator = np.random.default_rng(seed)
    groups = -(-cols // group_size)
    q = generator.integers(0, 2**bits, (rows, cols))
    zero = generator.integers(1, 2**bits, (rows, groups))
    if symmetric:
        zero[:] = 2 ** (bits - 1)
    scale = torch.from_numpy(generator.uniform(1e-5, 60, (rows, groups))).half()
    g_idx = np.arange(cols) // group_size
    return Layer(q, scale, zero, generator.permutation(g_idx) if desc_act else g_idx)


def gptq(x: Layer, bits: int = 4) -> dict[str, Tensor]:
    return {
        "layer.qweight": words(x.q, bits, 1).T.contiguous(),
        "layer.qzeros": words(x.zero.T - 1, bits, 1),
        "layer.scales": x.scale.T.contiguous(),
        "layer.g_idx": torch.from_numpy(x.g_idx).to(torch.int32),
    }


def awq_gemm(x: Layer) -> dict[str, Tensor]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "layer.qweight": words(x.q.T, 4, 1, order),
        "layer.qzeros": words(x.zero.T, 4, 1, order),
        "layer.scales": x.scale.T.contiguous(),
    }


def compressed_tensors(x: Layer, bits: int = 4, *, symmetric: bool = True) -> dict[str, Tensor]:
    tensors = {
        "layer.weight_packed": words(x.q, bits, 1),
        "layer.weight_scale": x.scale,
        "layer.weight_shape": torch.tensor(x.q.shape),
    }
    return tensors if symmetric else tensors | {"layer.weight_zero_point": words(x.zero, bits, 0)}
