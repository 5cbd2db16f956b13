"""Products with packed weights on a GPU, held to fp64 by bounds that hold for every order of summation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import lowbit_rs
import oracle
from lowbit_rs import InvalidArgument, PackedWeight, _native
from lowbit_rs.packed import BlockSize

OPS = torch.ops.lowbit_rs

#: Around every change of kernel, and far above the last one.
TOKENS = (0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 100, 257)
#: The last has more tiles of rows than a GPU has multiprocessors, so that sums take more memory with more tokens.
SHAPES = [(24, 256), (17, 75), (40, 512), (33, 1000), (256, 64), (19, 4224), (4500, 512), (130, 96)]


@pytest.fixture(autouse=True)
def _exact_reductions() -> Iterator[None]:
    """cuBLAS may otherwise round partial sums to 16 bits, and to TF32, which no bound on fp32 sums covers."""
    matmul = torch.backends.cuda.matmul
    before = (
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_tf32,
    )
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_reduced_precision_reduction = False
    matmul.allow_tf32 = False
    yield
    (
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_tf32,
    ) = before


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x @ weight.T + bias`` in fp64, and the same with all magnitudes."""
    y, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is None:
        return y, size
    return y + bias.double(), size + bias.double().abs()


def assert_within(y: Tensor, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> None:
    """|y - exact| <= gamma * sum of magnitudes + one rounding.

    ``gamma`` covers n products and sums of fp32 in any order and up to three roundings of a weight, scale times
    (codebook times x) included: (n + 8) u / (1 - (n + 8) u), as Higham, Accuracy and Stability, section 3.1. Where the
    weight is rounded to the dtype of x, for tensor cores, its roundoff comes on top: once for few tokens, which have
    scales in fp32, and twice for many, with u^2 for each part of a scale or shift that has two, and what numbers too
    small for the dtype lose. A shift makes terms larger than the weight they end in, so magnitudes are those of
    scale * code and shift apart.
    """
    weight = packed.dequantize(torch.float32)
    wanted, size = exact(x, weight, bias)
    if packed.shift is not None:
        shifts = oracle.per_weight(packed.to("cpu"), packed.shift.float().cpu()).cuda().double().abs()
        size = size + 2 * x.double().abs() @ shifts.T
    n = x.shape[-1] + 8
    gamma = n * 2.0**-24 / (1 - n * 2.0**-24)
    roundoff = oracle.unit_roundoff(x.dtype)
    rounded_weight = torch.zeros(())
    if x.dtype != torch.float32:  # through tensor cores
        is_few = x.shape[0] <= _native.CUDA_MAX_TOKENS
        factor = roundoff * (1 + roundoff) if is_few else 2 * roundoff + 8 * roundoff**2
        lost = 0 if is_few else 4 * oracle.half_step(x.dtype) * x.double().abs().sum(-1, keepdim=True)
        rounded_weight = factor * size + lost
    bound = gamma * size + rounded_weight.to(size.device)
    bound = bound * (1 + roundoff) + roundoff * wanted.abs() + oracle.half_step(x.dtype)
    error = (y.double() - wanted).abs()
    assert bool((error <= bound).all()), float((error / bound).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(options: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = lowbit_rs.quantize(torch.randn(*shape, device="cuda"), **options)
    biases = (None, torch.randn(shape[0], device="cuda"), torch.randn(shape[0], device="cuda").half())
    for tokens, bias in product(TOKENS, biases):
        x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
        y = lowbit_rs.linear(x, packed, bias)
        assert (y.shape, y.dtype) == ((tokens, shape[0]), dtype)
        assert_within(y, x, packed, bias)
        assert torch.equal(lowbit_rs.linear(x, packed, bias), y)  # the same bits again


@pytest.mark.parametrize("block_size", [16, 32, 128, "row"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_eight_bits_with_a_shift(block_size: BlockSize, scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """As other libraries quantize: every code from -128 to 127, and shifts that are larger than the weights."""
    rows, cols = 136, 1024
    quantized = lowbit_rs.quantize(torch.randn(rows, cols), "uint8", block_size, scale_dtype=scale_dtype)
    scale = torch.rand(quantized.scale.shape).to(scale_dtype) * 0.01
    parts = {
        "data": torch.randint(-128, 128, (rows, cols), dtype=torch.int8),
        "scale": scale,
        "shift": scale * torch.randint(-127, 129, scale.shape),
    }
    packed = PackedWeight.from_tensors(quantized.spec, (rows, cols), dtype, parts)
    on_gpu = packed.to("cuda")
    assert torch.equal(on_gpu.dequantize(dtype).cpu(), oracle.dequantize(packed, dtype))
    for tokens in TOKENS:
        x = torch.randn(tokens, cols, device="cuda").to(dtype)
        assert_within(lowbit_rs.linear(x, on_gpu), x, on_gpu, None)


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("exponent", [-120, -60, 0, 60, 100])
def test_float32_of_every_size(tokens: int, exponent: int) -> None:
    """Rows of very different sizes, with numbers of very different sizes in each of them.

    On tensor cores a float32 is two float16, of the size of the largest number of its row and 256 columns: what is
    smaller by more than 2^16 keeps fewer bits, and loses at most 2^-39 of that largest number.
    """
    packed = lowbit_rs.quantize(torch.randn(40, 512, device="cuda"))
    sizes = torch.randint(-12, 13, (tokens, 512), device="cuda") + torch.arange(tokens, device="cuda")[:, None] - 4
    x = torch.randn(tokens, 512, device="cuda") * torch.exp2(sizes + exponent)
    y = lowbit_rs.linear(x, packed)
    wanted, size = exact(x, packed.dequantize(torch.float32), None)
    lost = x.double().abs().amax(1, keepdim=True) * packed.dequantize(torch.float32).double().abs().sum(1) * 2.0**-39
    gamma = 520 * 2.0**-24 / (1 - 520 * 2.0**-24)
    assert bool(((y.double() - wanted).abs() <= gamma * size + lost + 2.0**-126).all())


def test_what_is_not_finite_shows() -> None:
    packed = lowbit_rs.quantize(torch.randn(40, 512, device="cuda"))
    for dtype, value in product((torch.float32, torch.bfloat16), (float("inf"), float("nan"))):
        x = torch.randn(3, 512, device="cuda", dtype=dtype)
        x[1, 300] = value
        y = lowbit_rs.linear(x, packed)
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_gradient(options: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = lowbit_rs.quantize(torch.randn(*shape, device="cuda"), **options)
    for tokens in TOKENS:
        check_gradient(packed, tokens, dtype)


def check_gradient(packed: PackedWeight, tokens: int, dtype: torch.dtype) -> None:
    weight, shape = packed.dequantize(torch.float32), packed.shape
    grad = torch.randn(tokens, shape[0], device="cuda").to(dtype)
    tensors = list(packed.tensors().values())
    dx = OPS.linear_grad_input.default(grad, tensors, list(packed.shape), *packed.scheme)
    assert (dx.shape, dx.dtype) == ((tokens, shape[1]), dtype)
    wanted, size = exact(grad, weight.T, None)
    n = shape[0] + 8
    roundoff = oracle.unit_roundoff(dtype)
    rounded_weight = roundoff * (1 + roundoff) if dtype != torch.float32 else 0
    bound = (n * 2.0**-24 / (1 - n * 2.0**-24) + rounded_weight) * size * (1 + roundoff)
    bound = bound + roundoff * wanted.abs() + oracle.half_step(dtype)
    assert bool(((dx.double() - wanted).abs() <= bound).all())
    assert torch.equal(OPS.linear_grad_input.default(grad, tensors, list(packed.shape), *packed.scheme), dx)


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_weights_that_come_in_parts(tokens: int) -> None:
    """More than one part of the weight, in both directions: 128 MiB of it are unpacked at once."""
    packed = lowbit_rs.quantize(torch.randn(9000, 4352, device="cuda"))
    x = torch.randn(tokens, 4352, device="cuda", requires_grad=True)
    y = lowbit_rs.linear(x, packed)
    assert_within(y.detach(), x.detach(), packed, None)
    y.sum().backward()
    wanted = packed.dequantize(torch.float32).double().sum(0)
    size = packed.dequantize(torch.float32).double().abs().sum(0)
    assert x.grad is not None
    assert bool(((x.grad.double() - wanted).abs() <= 9008 * 2.0**-24 * 1.001 * size + 2.0**-24 * wanted.abs()).all())


@pytest.mark.parametrize("shape", [(300, 2048), (2000, 1024)], ids=str)
def test_batches_in_graphs(shape: tuple[int, int]) -> None:
    """Tiles that several blocks of threads share, in graphs and beside them: every call finds its counters at 0."""
    packed = lowbit_rs.quantize(torch.randn(*shape, device="cuda"))
    x = torch.randn(48, shape[1], device="cuda", dtype=torch.bfloat16)
    wanted = lowbit_rs.linear(x, packed)
    assert_within(wanted, x, packed, None)
    graphs, results = [], []
    for _ in range(2):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results.append([lowbit_rs.linear(x, packed) for _ in range(3)])
    for graph in graphs * 2:
        graph.replay()
        assert torch.equal(lowbit_rs.linear(x, packed), wanted)
    torch.cuda.synchronize()
    assert all(torch.equal(y, wanted) for ys in results for y in ys)


def test_batches_on_two_streams() -> None:
    packed = lowbit_rs.quantize(torch.randn(512, 4096, device="cuda"))
    x = torch.randn(64, 4096, device="cuda", dtype=torch.float16)
    wanted = lowbit_rs.linear(x, packed)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    results: list[Tensor] = []
    torch.cuda.synchronize()
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(lowbit_rs.linear(x, packed))
    torch.cuda.synchronize()
    assert all(torch.equal(y, wanted) for y in results)


def test_shapes_and_strides_of_x() -> None:
    packed = lowbit_rs.quantize(torch.randn(24, 64, device="cuda"))
    for tokens, dtype in product((3, 40), (torch.float32, torch.bfloat16)):
        x = torch.randn(tokens, 64, device="cuda", dtype=dtype)
        y = lowbit_rs.linear(x, packed)
        odd = torch.zeros(tokens * 64 + 1, device="cuda", dtype=dtype)[1:].view(tokens, 64).copy_(x)
        for same in (torch.cat([x, x], 1)[:, :64], x.T.contiguous().T, x.repeat_interleave(2, 0)[::2]):
            assert torch.equal(lowbit_rs.linear(same, packed), y)
        assert_within(lowbit_rs.linear(odd, packed), x, packed, None)  # by another kernel
        assert torch.equal(lowbit_rs.linear(x.view(1, tokens, 1, 64), packed), y.view(1, tokens, 1, 24))
    assert lowbit_rs.linear(torch.randn(64, device="cuda"), packed).shape == (24,)


@pytest.mark.parametrize(("rows", "cols"), [(0, 64), (8, 0), (0, 0)])
@pytest.mark.parametrize("tokens", [0, 3, 40])
def test_empty_weights(rows: int, cols: int, tokens: int) -> None:
    packed = lowbit_rs.quantize(torch.zeros(rows, cols, device="cuda"))
    bias = torch.randn(rows, device="cuda")
    y = lowbit_rs.linear(torch.randn(tokens, cols, device="cuda"), packed, bias)
    assert torch.equal(y, bias.expand(tokens, rows) if cols == 0 else torch.empty(tokens, 0, device="cuda"))


def test_gradients_of_gradients() -> None:
    packed = lowbit_rs.quantize(torch.randn(24, 64, device="cuda"))
    x = torch.randn(3, 64, device="cuda", requires_grad=True)
    y = lowbit_rs.linear(x, packed, torch.randn(24, device="cuda", requires_grad=True))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(grad.sum(), x)
    weight = packed.dequantize()
    torch.testing.assert_close(again, (2 * torch.ones(3, 64, device="cuda") @ weight.T) @ weight, rtol=1e-4, atol=1e-4)


def test_devices_are_named() -> None:
    packed = lowbit_rs.quantize(torch.randn(24, 64, device="cuda"))
    with pytest.raises(InvalidArgument, match="x: got a tensor on cpu, expected one on cuda:0"):
        lowbit_rs.linear(torch.randn(3, 64), packed)
    with pytest.raises(InvalidArgument, match="bias: got a tensor on cpu, expected one on cuda:0"):
        lowbit_rs.linear(torch.randn(3, 64, device="cuda"), packed, torch.randn(24))
    tensors = [packed.data, packed.scale.cpu()]
    with pytest.raises(InvalidArgument, match=r"scale: got a torch\.float32 tensor on cpu, .*torch\.float32 on cuda:0"):
        OPS.linear.default(torch.randn(3, 64, device="cuda"), None, tensors, [24, 64], *packed.scheme, "none", 0.0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_gpu_has_its_own_state() -> None:
    packed = lowbit_rs.quantize(torch.randn(24, 256))
    x = torch.randn(3, 256)
    results = [lowbit_rs.linear(x.to(device), packed.to(device)).cpu() for device in ("cuda:1", "cuda:0", "cuda:1")]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.cuda.current_device() == 0
    with pytest.raises(InvalidArgument, match="x: got a tensor on cuda:0, expected one on cuda:1"):
        lowbit_rs.linear(x.to("cuda:0"), packed.to("cuda:1"))
