"""Layers on a GPU: moving, saving, casting; streams, CUDA graphs and torch.compile; the operators."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit_rs
from lowbit_rs import QuantEmbedding, QuantLinear
from test_compile import Block

OPS = torch.ops.lowbit_rs

# opcheck itself reads .grad of tensors that are no leaves; flat weights warn that they are slow.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:a weight in block_order=.flat.:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def layer(options: dict[str, Any]) -> QuantLinear:
    return QuantLinear.from_linear(nn.Linear(75, 24), **options)


def test_moving_and_copying(layer: QuantLinear) -> None:
    packed, x = layer.packed, torch.randn(3, 75)
    y = layer(x)
    moved = copy.deepcopy(layer).to("cuda")
    assert all(parameter.is_cuda for parameter in moved.parameters())
    torch.testing.assert_close(moved(x.cuda()).cpu(), y)
    for same in (copy.deepcopy(moved), pickle.loads(pickle.dumps(moved))):
        assert same.packed == moved.packed
        assert torch.equal(same(x.cuda()), moved(x.cuda()))
    assert moved.cpu().packed == packed
    assert layer.half().cuda()(x.half().cuda()).dtype == torch.float16


def test_saving(layer: QuantLinear, options: dict[str, Any]) -> None:
    layer.cuda()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    empty = QuantLinear(75, 24, device="cuda", **options)
    empty.load_state_dict(torch.load(file))
    assert empty.packed == layer.packed
    float_layer = nn.Linear(75, 24, device="cuda")
    empty.load_state_dict(float_layer.state_dict())
    assert empty.packed == lowbit_rs.quantize(float_layer.weight, **options)


def test_a_model_is_packed_where_it_lies() -> None:
    torch.manual_seed(0)
    on_cpu, on_gpu = Block(), Block()
    on_gpu.load_state_dict(on_cpu.state_dict())
    on_gpu.cuda()
    for model in (on_cpu, on_gpu):
        report = lowbit_rs.quantize_model(model, embeddings=True, progress=False)
        assert len(report.rows) == 5
    assert isinstance(on_gpu.embed, QuantEmbedding)
    assert on_gpu.embed.packed.to("cpu") == on_cpu.embed.packed
    tokens = torch.randint(100, (2, 5))
    torch.testing.assert_close(on_gpu(tokens.cuda()).cpu(), on_cpu(tokens), rtol=1e-4, atol=1e-4)
    lowbit_rs.dequantize_model(on_gpu)
    torch.testing.assert_close(on_gpu(tokens.cuda()).cpu(), on_cpu(tokens), rtol=1e-4, atol=1e-4)


def test_a_model_is_packed_layer_by_layer_on_its_way_to_the_gpu() -> None:
    model = Block()
    sizes = [module.weight.nbytes for module in model.modules() if isinstance(module, nn.Linear)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lowbit_rs.quantize_model(model, progress=False, device="cuda")
    assert model.qkv.weight.is_cuda
    assert not model.embed.weight.is_cuda
    packed = torch.cuda.memory_allocated() - before
    # Beside what stays: one float layer, its decoded copy for the report in fp32, twice, and blocks of 512 bytes.
    assert torch.cuda.max_memory_allocated() - before <= packed + 5 * max(sizes) + (64 << 10)
    tokens = torch.randint(100, (2, 5), device="cuda")
    assert model.cuda()(tokens).is_cuda


def test_autocast() -> None:
    layer, x = QuantLinear.from_linear(nn.Linear(64, 8)).cuda(), torch.randn(3, 64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.bfloat16()))


def test_training_goes_through_the_layer() -> None:
    layer = QuantLinear.from_linear(nn.Linear(64, 8)).cuda()
    for tokens in (3, 40):
        x = torch.randn(tokens, 64, device="cuda", requires_grad=True)
        layer(x).square().sum().backward()
        wanted = x.detach().requires_grad_()
        torch.nn.functional.linear(wanted, layer.dequantize(), layer.bias).square().sum().backward()
        torch.testing.assert_close(x.grad, wanted.grad)


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_graph(layer: QuantLinear, tokens: int, dtype: torch.dtype) -> None:
    layer.cuda()
    x = torch.randn(tokens, 75, device="cuda", dtype=dtype)
    indices = torch.randint(24, (tokens,), device="cuda")

    def step() -> tuple[Tensor, Tensor, Tensor]:
        rows = OPS.embedding.default(indices, layer._tensors(), [24, 75], *layer.packed.scheme, dtype)
        return layer(x), rows, layer.dequantize(dtype)

    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        for _ in range(3):
            x.normal_()
            indices.random_(24)
            graph.replay()
            for mine, wanted in zip(results, step(), strict=True):
                assert torch.equal(mine, wanted)


def test_streams() -> None:
    """Work is queued behind what its stream holds, and nowhere else."""
    layer = QuantLinear.from_linear(nn.Linear(4096, 512)).cuda()
    stream = torch.cuda.Stream()
    x = torch.zeros(4, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(50_000_000)
        x.fill_(1.0)
        y = layer(x)
    stream.synchronize()
    assert torch.equal(y, layer(torch.ones(4, 4096, device="cuda")))


def test_nothing_waits() -> None:
    """Neither a synchronization nor a copy to the host, in a forward, an embedding or a backward."""
    layer = QuantLinear.from_linear(nn.Linear(64, 8)).cuda()
    embedding = QuantEmbedding.from_embedding(nn.Embedding(8, 64)).cuda()
    indices = torch.randint(8, (5,), device="cuda")
    layer(embedding(indices).requires_grad_()).sum().backward()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
        for tokens in (5, 40):
            x = embedding(indices.repeat(tokens // 5)).requires_grad_()
            layer(x).sum().backward()
            layer.dequantize()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_torchs() -> None:
    """Products with many tokens keep nothing but counters, which the first one makes."""
    packed = lowbit_rs.quantize(torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16))
    x = torch.randn(64, 8192, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    torch.mm(x, x.T)  # the library's own workspace
    lowbit_rs.linear(x, packed)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = lowbit_rs.linear(x, packed)
    assert torch.cuda.memory_allocated() - before == y.nbytes
    assert torch.cuda.max_memory_allocated() - before <= y.nbytes + (32 << 20)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # one of torch's own, to warm up
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_in_one_graph(mode: str) -> None:
    torch.manual_seed(0)
    block = Block().cuda()
    lowbit_rs.quantize_model(block, embeddings=True, progress=False)
    compiled = torch.compile(block, fullgraph=True, mode=mode)
    with torch.no_grad():
        for count in (5, 5, 5, 9):
            tokens = torch.randint(100, (2, count), device="cuda")
            torch.testing.assert_close(compiled(tokens).clone(), block(tokens), rtol=1e-4, atol=1e-4)


def test_operators(options: dict[str, Any]) -> None:
    source = torch.randn(24, 75, device="cuda")
    packed = lowbit_rs.quantize(source, **options)
    weight = [list(packed.tensors().values()), list(packed.shape), *packed.scheme]
    spec = packed.spec
    quantize = [source, packed.codebook, *packed.scheme, spec.scale_dtype, spec.signed_absmax, "error"]
    x = torch.randn(3, 75, device="cuda", requires_grad=True)
    for op, arguments in (
        (OPS.quantize.default, quantize),
        (OPS.dequantize.default, [*weight, torch.float16]),
        (OPS.embedding.default, [torch.tensor([3, 0], device="cuda"), *weight, torch.float16]),
        (OPS.linear.default, [x, torch.randn(24, device="cuda"), *weight, "none", 0.0]),
        (OPS.linear_grad_input.default, [torch.randn(3, 24, device="cuda", requires_grad=True), *weight]),
    ):
        torch.library.opcheck(op, tuple(arguments))
