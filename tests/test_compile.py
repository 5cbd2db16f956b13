"""The operators in torch's registry: schemas, fakes and gradients by opcheck, and torch.compile."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit_rs
from lowbit_rs import QuantEmbedding, QuantLinear

OPS = torch.ops.lowbit_rs

# opcheck itself reads .grad of tensors that are no leaves.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

#: One of each list of tensors that an operator can get.
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"format": "uint4", "double_quant": True, "scale_dtype": torch.bfloat16},
    {"codebook": (-1.0, 0.0, 1.0)},
    {"format": "int8", "block_size": "row"},
    {"block_order": "flat"},
)


@pytest.fixture(params=OPTIONS, ids=lambda options: "-".join(options) or "default")
def weight(request: pytest.FixtureRequest) -> list[Any]:
    packed = lowbit_rs.quantize(torch.randn(24, 75), **request.param)
    return [list(packed.tensors().values()), list(packed.shape), *packed.scheme]


def check(op: Any, *arguments: Any) -> None:
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
def test_quantize(options: dict[str, Any]) -> None:
    packed = lowbit_rs.quantize(torch.randn(24, 75), **options)
    for source in (torch.randn(24, 75), torch.randn(75, 24, dtype=torch.bfloat16).T, torch.randn(2, 12, 75)):
        check(OPS.quantize.default, source, packed.codebook, *packed.scheme, packed.spec.scale_dtype, False, "error")


def test_dequantize(weight: list[Any], dtype: torch.dtype) -> None:
    check(OPS.dequantize.default, *weight, dtype)


def test_embedding(weight: list[Any]) -> None:
    check(OPS.embedding.default, torch.tensor([[3, 0], [5, 23]]), *weight, torch.float16)


@pytest.mark.parametrize("shape", [(75,), (3, 75), (2, 0, 75)])
def test_linear(weight: list[Any], shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape)
    check(OPS.linear.default, x, None, *weight, "none", 0.0)
    bias = torch.randn(24, dtype=torch.bfloat16, requires_grad=True)
    for activation in ("none", "int8", "auto"):
        check(OPS.linear.default, x.requires_grad_(), bias, *weight, activation, 6.0)


def test_operators_have_no_defaults() -> None:
    """Autograd of torch before 2.15 loses arguments that are equal to their default, and then counts wrongly."""
    for name in ("quantize", "dequantize", "embedding", "linear", "linear_grad_input", "linear_grouped"):
        schema = getattr(OPS, name).default._schema
        assert not [argument.name for argument in schema.arguments if argument.has_default_value()]


def test_linear_grad_input(weight: list[Any]) -> None:
    check(OPS.linear_grad_input.default, torch.randn(2, 3, 24), *weight)
    check(OPS.linear_grad_input.default, torch.randn(3, 24, requires_grad=True), *weight)


class Block(nn.Module):
    """A small transformer block with an embedding before it."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(100, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_block(**options: Any) -> Block:
    block = Block()
    lowbit_rs.quantize_model(block, embeddings=True, progress=False, **options)
    assert isinstance(block.embed, QuantEmbedding)
    assert isinstance(block.qkv, QuantLinear)
    return block


@pytest.mark.parametrize("options", [{}, {"format": "uint4", "double_quant": True, "compute_dtype": torch.bfloat16}])
def test_block_in_one_graph_gives_the_eager_result(options: dict[str, Any]) -> None:
    """Also for a number of tokens that changes."""
    block = make_block(**options)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (5, 9):
        tokens = torch.randint(100, (2, count))
        torch.testing.assert_close(compiled(tokens), block(tokens))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_block_compiled_to_machine_code_gives_the_eager_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # what it has kept may call operators of older schemas
    block = make_block(format="int8")
    compiled = torch.compile(block, fullgraph=True)
    for count in (5, 9):
        tokens = torch.randint(100, (2, count))
        torch.testing.assert_close(compiled(tokens), block(tokens))


def test_gradients_in_one_graph() -> None:
    """Through the traced forward and backward, to the parameters that train."""
    block, tokens = make_block(), torch.randint(100, (2, 5))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    gradients = []
    for module in (block, compiled):
        block.zero_grad()
        module(tokens).square().sum().backward()
        gradients.append([parameter.grad for parameter in block.parameters() if parameter.requires_grad])
    assert gradients[0]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_autocast_in_one_graph() -> None:
    block, tokens = make_block(), torch.randint(100, (2, 5))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(tokens), block(tokens))


def test_functions_in_one_graph() -> None:
    packed = lowbit_rs.quantize(torch.randn(24, 75), "uint4")

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return lowbit_rs.linear(x, packed), F.linear(x, packed.dequantize(x.dtype))

    x = torch.randn(3, 75)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(compiled(x), both(x), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_export() -> None:
    block, tokens = make_block(), torch.randint(100, (2, 5))
    program = torch.export.export(block, (tokens,))
    torch.testing.assert_close(program.module()(tokens), block(tokens))
