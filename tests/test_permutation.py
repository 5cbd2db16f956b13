"""Weights whose columns were sorted before they were packed, as GPTQ's desc_act does."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowbit_rs
from lowbit_rs import InvalidArgument, PackedWeight, QuantEmbedding, QuantLinear
from lowbit_rs.files import load_model, load_packed, save_packed
from lowbit_rs.functional import embedding


def permuted(weight: Tensor, permutation: Tensor, **options: object) -> PackedWeight:
    packed = lowbit_rs.quantize(weight[:, permutation.long()], "int4", 16, **options)  # type: ignore[arg-type]
    tensors = packed.tensors() | {"permutation": permutation}
    return PackedWeight.from_tensors(packed.spec, packed.shape, packed.dtype, tensors)


@pytest.fixture
def permutation() -> Tensor:
    return torch.randperm(75).to(torch.int32)


@pytest.fixture
def packed(permutation: Tensor) -> PackedWeight:
    return permuted(torch.randn(12, 75), permutation)


def test_dequantize_gives_the_columns_back_their_places(permutation: Tensor) -> None:
    first_of_blocks = permutation.long()[::16]
    weight = torch.randint(-7, 8, (12, 75)).float()
    weight[:, first_of_blocks] = 7.0  # so that every scale is 1 and codes are exact
    assert torch.equal(permuted(weight, permutation).dequantize(), weight)


def test_linear_is_the_product_with_the_dequantized_weight(packed: PackedWeight, dtype: torch.dtype) -> None:
    x = torch.randint(-4, 5, (2, 3, 75)).to(dtype)
    plain = PackedWeight.from_tensors(
        packed.spec, packed.shape, packed.dtype, {k: v for k, v in packed.tensors().items() if k != "permutation"}
    )
    assert packed.permutation is not None
    assert torch.equal(lowbit_rs.linear(x, packed), lowbit_rs.linear(x[..., packed.permutation.long()], plain))
    exact = x.double() @ packed.dequantize(torch.float32).double().T
    torch.testing.assert_close(lowbit_rs.linear(x, packed).double(), exact, rtol=2e-2, atol=2e-2)


def test_wrong_width_is_refused(packed: PackedWeight) -> None:
    for x in (torch.randn(2, 76), torch.tensor(1.0)):
        with pytest.raises(InvalidArgument, match="x: got shape"):
            lowbit_rs.linear(x, packed)


def test_gradient_goes_to_the_columns_where_they_came_from(packed: PackedWeight) -> None:
    x = torch.randn(4, 75, requires_grad=True)
    grad = torch.randn(4, 12)
    lowbit_rs.linear(x, packed).backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, grad @ packed.dequantize())


def test_embedding(packed: PackedWeight) -> None:
    rows = torch.tensor([[3, 0], [11, 3]])
    assert torch.equal(embedding(rows, packed), packed.dequantize()[rows])
    assert torch.equal(QuantEmbedding.from_packed(packed)(rows), packed.dequantize()[rows])


def test_equality_and_size_count_the_permutation(packed: PackedWeight, permutation: Tensor) -> None:
    plain = PackedWeight.from_tensors(
        packed.spec, packed.shape, packed.dtype, {k: v for k, v in packed.tensors().items() if k != "permutation"}
    )
    assert packed != plain
    assert packed == copy.deepcopy(packed) == pickle.loads(pickle.dumps(packed))
    assert packed.nbytes - plain.nbytes == 4 * 75
    for wrong in (permutation.long(), permutation[:-1]):
        with pytest.raises(InvalidArgument, match="permutation: got"):
            PackedWeight.from_tensors(
                packed.spec, packed.shape, packed.dtype, packed.tensors() | {"permutation": wrong}
            )


def test_layer(packed: PackedWeight) -> None:
    bias = torch.randn(12)
    layer = QuantLinear.from_packed(packed, bias)
    x = torch.randn(5, 75)
    assert torch.equal(layer(x), lowbit_rs.linear(x, packed, bias))
    assert "weight_permutation" in layer.state_dict()
    assert "permuted" in repr(layer)
    half = copy.deepcopy(layer).half()
    assert half.weight_permutation is not None
    assert half.weight_permutation.dtype == torch.int32
    fresh = QuantLinear(75, 12, format="int4", block_size=16, permuted=True)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert torch.equal(layer.to_linear().weight, packed.dequantize())
    with pytest.raises(RuntimeError, match="weight_permutation"):
        QuantLinear(75, 12, format="int4", block_size=16).load_state_dict(layer.state_dict())


def test_layer_packs_a_float_weight_in_its_own_order(packed: PackedWeight, permutation: Tensor) -> None:
    layer = QuantLinear.from_packed(packed)
    weight = torch.randn(12, 75)
    layer.load_state_dict({"weight": weight})
    assert layer.packed == permuted(weight, permutation) == layer.pack_like(weight)
    layer.reset_parameters()
    assert not layer.dequantize().any()
    assert torch.equal(layer.weight_permutation, permutation)  # type: ignore[arg-type]


def test_layer_compiles(packed: PackedWeight) -> None:
    layer = QuantLinear.from_packed(packed)
    x = torch.randn(2, 75)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))


def test_files(packed: PackedWeight, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_packed({"0.weight": packed, "0.bias": torch.ones(12)}, path)
    assert load_packed(path)["0.weight"] == packed
    model = nn.Sequential(nn.Linear(75, 12))
    load_model(model, path)
    x = torch.randn(2, 75)
    assert torch.equal(model(x), lowbit_rs.linear(x, packed, torch.ones(12)))


def test_file_with_a_permutation_that_is_not_one(packed: PackedWeight, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_packed({"0.weight": packed}, path)
    data = path.read_bytes()
    text = json.dumps('"permuted":true')[1:-1].encode()
    assert data.count(text) == 1
    path.write_bytes(data.replace(text, json.dumps('"permuted":1234')[1:-1].encode()))
    with pytest.raises(InvalidArgument, match="permuted: got 1234, expected true or false"):
        load_packed(path)
