"""linear and embedding: what they take, what they refuse, what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import lowbit_rs
import oracle
from lowbit_rs import InvalidArgument, PackedWeight, _native
from lowbit_rs.functional import embedding
from strategies import FORMATS

#: Matrices and ways to pack them: single weights, short last blocks, odd widths, several panels of rows and columns.
SHAPES = ((1, 1), (3, 17), (37, 200), (64, 256), (70, 520), (9, 1030), (20, 75))
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"block_size": 16},
    {"block_size": 64, "double_quant": True},
    {"block_size": 32, "scale_dtype": torch.bfloat16},
    {"block_size": "row"},
    {"block_size": 512, "scale_dtype": torch.float16},
    {"block_size": 32, "block_order": "flat"},
)
TABLE = tuple(torch.linspace(-1, 1, 16).tolist())


def summation_bound(packed: PackedWeight, x: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """The largest |y - exact| of an fp32 sum in any order, per output, of factors rounded as docs/cpu.md says.

    A sum of n fp32 terms is off by at most gamma(n) = n u / (1 - n u) times the sum of magnitudes, u = 2^-24 (Higham,
    Accuracy and Stability, 3.1). Here n is K products and sums, the block's scale, its shift times the block's sum of
    x, and the bias. A shift cancels in the weight but not in the sums: its magnitude counts beside that of scale *
    code. The result is rounded to its dtype once more.
    """
    terms = packed.shape[1] + 16
    gamma = terms * 2.0**-24 / (1 - terms * 2.0**-24)
    magnitude = packed.dequantize(torch.float32).double().abs()
    if packed.shift is not None:
        magnitude += 2 * oracle.per_weight(packed, packed.shift.double().abs())
    total = x.double().abs() @ magnitude.T + (0 if bias is None else bias.double().abs())
    rounded = oracle.unit_roundoff(x.dtype) * y.double().abs() * 1.01 + 2 * oracle.half_step(x.dtype)
    return gamma * total + oracle.factor_rounding(packed, x) + rounded


def exact_linear(packed: PackedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ oracle.dequantize(packed, torch.float32).double().T
    return y if bias is None else y + bias.double()


@pytest.mark.usefixtures("isa")
class TestLinear:
    """Against a float64 product of the dequantized weight, within the bound of fp32 summation."""

    @pytest.mark.parametrize("format", [*FORMATS, "custom"])
    def test_against_float64(self, format: str, dtype: torch.dtype) -> None:
        """One token, a few, and many take different paths through the kernels."""
        for (rows, cols), options in zip(SHAPES, OPTIONS, strict=True):
            weight, x, bias = torch.randn(rows, cols), torch.randn(40, cols).to(dtype), torch.randn(rows)
            table = TABLE[::-1] if format == "custom" else None
            packed = lowbit_rs.quantize(weight, format, codebook=table, **options)
            exact = exact_linear(packed, x, bias)
            for tokens in (1, 2, 5, 8, 17, 40):
                y = lowbit_rs.linear(x[:tokens], packed, bias)
                assert y.dtype == dtype
                error = (y.double() - exact[:tokens]).abs()
                assert (error - summation_bound(packed, x[:tokens], bias, y)).max() <= 0

    def test_bias_of_another_dtype(self, dtype: torch.dtype) -> None:
        packed, x = lowbit_rs.quantize(torch.randn(37, 96)), torch.randn(3, 96).to(dtype)
        for bias in (torch.randn(37), torch.randn(37).half(), torch.randn(37).bfloat16()):
            y = lowbit_rs.linear(x, packed, bias)
            assert y.dtype == dtype
            error = (y.double() - exact_linear(packed, x, bias)).abs()
            assert (error - summation_bound(packed, x, bias, y)).max() <= 0

    @given(
        st.integers(1, 24),
        st.integers(1, 160),
        st.integers(1, 20),
        st.sampled_from(FORMATS),
        st.sampled_from([16, 32, 128, "row"]),
        st.integers(0, 2**32 - 1),
    )
    def test_odd_shapes(self, rows: int, cols: int, tokens: int, format: str, block_size: Any, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        weight, x = (torch.randn(size, cols, generator=generator) for size in (rows, tokens))
        packed = lowbit_rs.quantize(weight, format, block_size)
        y = lowbit_rs.linear(x, packed)
        error = (y.double() - exact_linear(packed, x, None)).abs()
        assert (error - summation_bound(packed, x, None, y)).max() <= 0

    @pytest.mark.parametrize("format", FORMATS)
    def test_gradient_to_x_against_float64(self, format: str, dtype: torch.dtype) -> None:
        """The same sum, over N terms."""
        for rows, cols, block_size in ((37, 200, 64), (1, 16, 16), (130, 333, "row")):
            packed = lowbit_rs.quantize(torch.randn(rows, cols), format, block_size)  # type: ignore[arg-type]
            for tokens in (1, 9, 33):
                x = torch.randn(tokens, cols).to(dtype).requires_grad_()
                grad = torch.randn(tokens, rows).to(dtype)
                lowbit_rs.linear(x, packed).backward(grad)
                assert x.grad is not None
                weight = oracle.dequantize(packed, torch.float32).double()
                magnitude = weight.abs()
                if packed.shift is not None:
                    magnitude += 2 * oracle.per_weight(packed, packed.shift.double().abs())
                gamma = (rows + 16) * 2.0**-24 / (1 - (rows + 16) * 2.0**-24)
                bound = grad.double().abs() @ (gamma * magnitude + oracle.weight_rounding(packed, dtype))
                bound += oracle.unit_roundoff(dtype) * x.grad.double().abs() * 1.01 + 2 * oracle.half_step(dtype)
                assert ((x.grad.double() - grad.double() @ weight).abs() - bound).max() <= 0

    @pytest.mark.parametrize("format", FORMATS)
    def test_activations_in_int8(self, format: str, dtype: torch.dtype) -> None:
        """Half a step of an activation, half a step of a code in 6 bits or more, and the roundings without int8."""
        for block_size in (32, 64, "row"):
            packed = lowbit_rs.quantize(torch.randn(40, 200), format, block_size)
            weight = oracle.dequantize(packed, torch.float32).double().abs()
            shift = 0 if packed.shift is None else oracle.per_weight(packed, packed.shift.double().abs())
            for tokens in (1, 3, 8, 17):
                x = torch.randn(tokens, 200).to(dtype)
                y = lowbit_rs.linear(x, packed, activation="int8")
                largest = x.double().abs().amax(1, keepdim=True)
                step = (largest / 126 * 0.5).expand(tokens, 200) @ (weight + shift).T
                code = 0.5 / 63 * oracle.per_weight(packed, oracle.scales(packed).double().abs())
                code = code * (0 if packed.spec.bits == 8 else oracle.codebook_of(packed.spec, None).values.abs().max())
                bound = summation_bound(packed, x, None, y) + step + 1.01 * (x.double().abs() @ code.T)
                assert ((y.double() - exact_linear(packed, x, None)).abs() - bound).max() <= 0

    def test_special_values_of_x_follow_ieee(self, dtype: torch.dtype) -> None:
        """An infinity or NaN in one token stays in that token."""
        packed = lowbit_rs.quantize(torch.randn(20, 96))
        for tokens in (2, 30):
            x = torch.randn(tokens, 96).to(dtype)
            clean = lowbit_rs.linear(x, packed)
            x[1, 5] = float("nan")
            y = lowbit_rs.linear(x, packed)
            assert y[1].isnan().all()
            others = torch.arange(tokens) != 1
            assert torch.equal(y[others], clean[others])

    def test_rows_do_not_depend_on_their_neighbours(self) -> None:
        """A run is bitwise reproducible."""
        packed = lowbit_rs.quantize(torch.randn(48, 192), "uint4")
        x = torch.randn(16, 192)
        assert torch.equal(lowbit_rs.linear(x, packed), lowbit_rs.linear(x, packed))


class TestLinearArguments:
    def test_any_leading_dimensions_and_strides(self) -> None:
        packed, bias = lowbit_rs.quantize(torch.randn(24, 96)), torch.randn(24)
        x = torch.randn(2, 3, 4, 96)
        wanted = lowbit_rs.linear(x.reshape(24, 96), packed, bias)
        assert torch.equal(lowbit_rs.linear(x, packed, bias), wanted.reshape(2, 3, 4, 24))
        rows = x.reshape(24, 96)
        wide = torch.randn(24, 200)
        wide[:, 50:146] = rows
        transposed = rows.T.contiguous().T
        every_other = torch.zeros(24, 192)
        every_other[:, ::2] = rows
        for same in (wide[:, 50:146], transposed, every_other[:, ::2], x.transpose(0, 1).contiguous().transpose(0, 1)):
            assert torch.equal(lowbit_rs.linear(same, packed, bias).reshape(24, 24), wanted)
        expanded = rows[:1].expand(5, 96)
        assert torch.equal(lowbit_rs.linear(expanded, packed), lowbit_rs.linear(expanded.contiguous(), packed))
        single = lowbit_rs.linear(rows[3], packed, bias)
        assert single.shape == (24,)
        assert torch.equal(single, lowbit_rs.linear(rows[3:4], packed, bias)[0])
        strided_bias = torch.stack([bias, bias], 1)[:, 0]
        assert torch.equal(lowbit_rs.linear(rows, packed, strided_bias), wanted)

    def test_tensors_at_odd_addresses(self) -> None:
        def misaligned(tensor: Tensor) -> Tensor:
            odd = torch.frombuffer(bytearray(4 * tensor.numel() + 1), dtype=torch.float32, offset=1)
            assert odd.data_ptr() % 4
            return odd.reshape(tensor.shape).copy_(tensor)

        weight, x, bias = torch.randn(24, 96), torch.randn(3, 96), torch.randn(24)
        packed = lowbit_rs.quantize(weight)
        assert lowbit_rs.quantize(misaligned(weight)) == packed
        wanted = lowbit_rs.linear(x, packed, bias)
        assert torch.equal(lowbit_rs.linear(misaligned(x), packed, misaligned(bias)), wanted)
        tensors = packed.tensors() | {"scale": misaligned(packed.scale)}
        moved = PackedWeight.from_tensors(packed.spec, packed.shape, packed.dtype, tensors)
        with pytest.raises(InvalidArgument, match=r"scale: got torch\.float32 at the odd address 0x.*; clone it"):
            lowbit_rs.linear(x, moved)

    @pytest.mark.parametrize("shape", [(0, 96), (3, 0, 96)])
    def test_no_tokens(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        packed = lowbit_rs.quantize(torch.randn(24, 96))
        x = torch.zeros(shape, dtype=dtype, requires_grad=True)
        y = lowbit_rs.linear(x, packed, torch.zeros(24))
        assert (y.shape, y.dtype) == ((*shape[:-1], 24), dtype)
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == shape

    def test_no_inputs_give_the_bias(self) -> None:
        bias = torch.randn(5)
        y = lowbit_rs.linear(torch.zeros(3, 0), lowbit_rs.quantize(torch.zeros(5, 0)), bias)
        assert torch.equal(y, bias.expand(3, 5))

    def test_no_outputs(self) -> None:
        x = torch.randn(3, 64, requires_grad=True)
        y = lowbit_rs.linear(x, lowbit_rs.quantize(torch.zeros(0, 64)))
        assert y.shape == (3, 0)
        y.sum().backward()
        assert x.grad is not None
        assert not x.grad.any()

    @pytest.mark.parametrize(
        ("x", "bias", "message"),
        [
            (torch.zeros(3, 95), None, r"x: got shape \[3, 95\], expected \[\.\.\., 96\]"),
            (torch.zeros(()), None, r"x: got shape \[\], expected \[\.\.\., 96\]"),
            (torch.zeros(3, 96, dtype=torch.float64), None, "x: got torch.float64, expected torch.float32"),
            (torch.zeros(3, 96, dtype=torch.int64), None, "x: got torch.int64"),
            (torch.zeros(3, 96), torch.zeros(23), r"bias: got shape \[23\], expected \[24\]"),
            (torch.zeros(3, 96), torch.zeros(1, 24), r"bias: got shape \[1, 24\]"),
            (torch.zeros(3, 96), torch.zeros(24, dtype=torch.float64), "bias: got torch.float64"),
            (torch.zeros(3, 96), torch.zeros(24, device="meta"), "bias: got a tensor on meta, expected one on cpu"),
            (torch.zeros(3, 96, device="meta"), None, "x: got a tensor on meta, expected one on cpu"),
        ],
    )
    def test_wrong_arguments(self, x: Tensor, bias: Tensor | None, message: str) -> None:
        packed = lowbit_rs.quantize(torch.randn(24, 96))
        with pytest.raises(InvalidArgument, match=message):
            lowbit_rs.linear(x, packed, bias)
        if x.is_floating_point():
            with pytest.raises(InvalidArgument, match=message):  # and the same through torch's registry
                lowbit_rs.linear(x.requires_grad_(), packed, bias)

    def test_stack_is_refused(self) -> None:
        with pytest.raises(InvalidArgument, match=r"weight: got shape \[2, 24, 96\], expected \[N, K\]"):
            lowbit_rs.linear(torch.zeros(3, 96), lowbit_rs.quantize(torch.zeros(2, 24, 96)))

    def test_gradients_are_those_of_the_dequantized_weight(self) -> None:
        packed = lowbit_rs.quantize(torch.randn(24, 96), "uint4")
        x, bias = torch.randn(2, 5, 96, requires_grad=True), torch.randn(24, requires_grad=True)
        y = lowbit_rs.linear(x, packed, bias)
        ours = torch.autograd.grad(y.square().sum(), (x, bias))
        wanted = torch.autograd.grad(F.linear(x, packed.dequantize(), bias).square().sum(), (x, bias))
        for mine, theirs in zip(ours, wanted, strict=True):
            torch.testing.assert_close(mine, theirs)

    def test_second_derivatives(self) -> None:
        packed = lowbit_rs.quantize(torch.randn(24, 96))
        x = torch.randn(5, 96, requires_grad=True)

        def curvature(y: Tensor) -> Tensor:
            (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
            return torch.autograd.grad(first.square().sum(), x)[0]

        ours, wanted = curvature(lowbit_rs.linear(x, packed)), curvature(F.linear(x, packed.dequantize()))
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))

    def test_bias_alone_can_require_a_gradient(self) -> None:
        packed, bias = (
            lowbit_rs.quantize(torch.randn(24, 96)),
            torch.zeros(24, dtype=torch.bfloat16, requires_grad=True),
        )
        lowbit_rs.linear(torch.randn(5, 96), packed, bias).sum().backward()
        assert bias.grad is not None
        assert bias.grad.dtype == torch.bfloat16
        assert torch.equal(bias.grad, torch.full((24,), 5.0, dtype=torch.bfloat16))

    def test_autocast_casts_as_torch_does(self) -> None:
        packed, weight = lowbit_rs.quantize(torch.randn(24, 96)), torch.randn(24, 96)
        for kind in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", kind):
                for x in (torch.randn(3, 96), torch.randn(3, 96, requires_grad=True), torch.randn(3, 96).half()):
                    y = lowbit_rs.linear(x, packed)
                    assert y.dtype == F.linear(x, weight).dtype == kind
                    assert torch.equal(y, lowbit_rs.linear(x.to(kind), packed))
        x = torch.randn(3, 96, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            lowbit_rs.linear(x, packed).sum().backward()
        assert x.grad is not None
        assert x.grad.dtype == torch.float32

    def test_inference_mode_and_no_grad(self) -> None:
        packed, x = lowbit_rs.quantize(torch.randn(24, 96)), torch.randn(3, 96, requires_grad=True)
        wanted = lowbit_rs.linear(x, packed)
        for context in (torch.inference_mode(), torch.no_grad()):
            with context:
                y = lowbit_rs.linear(x, packed)
            assert torch.equal(y, wanted)
            assert not y.requires_grad

    def test_transforms_and_tracers_see_the_operator(self) -> None:
        """vmap has no rule for it, which must be an error and no read of a wrapper's memory; a trace records it."""
        packed, x = lowbit_rs.quantize(torch.randn(24, 96)), torch.randn(3, 96)
        graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: lowbit_rs.linear(x, packed))(x)
        assert torch.ops.lowbit_rs.linear.default in [node.target for node in graph.graph.nodes]
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = lowbit_rs.linear(mode.from_tensor(x), packed)
        assert type(fake).__name__ == "FakeTensor"
        assert fake.shape == (3, 24)
        with pytest.raises(RuntimeError, match="Batching rule not implemented for lowbit_rs::linear"):
            torch.vmap(lambda x: lowbit_rs.linear(x, packed))(x)
        negated = torch.complex(x, x).conj().imag
        assert torch.equal(lowbit_rs.linear(negated, packed), lowbit_rs.linear(-x, packed))


class TestEmbedding:
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("options", [{}, {"double_quant": True}, {"block_order": "flat"}])
    def test_rows_are_those_of_the_dequantized_weight(self, format: str, options: Any, dtype: torch.dtype) -> None:
        packed = lowbit_rs.quantize(torch.randn(50, 100), format, **options)
        indices = torch.randint(50, (3, 4))
        wanted = packed.dequantize(dtype)[indices]
        for same in (indices, indices.int(), indices.T.contiguous().T):
            assert torch.equal(embedding(same, packed, dtype), wanted)
        assert torch.equal(embedding(indices[:0], packed), torch.zeros(0, 4, 100))
        assert torch.equal(embedding(torch.tensor(7), packed), packed.dequantize()[7])

    @pytest.mark.parametrize("bad", [50, -1, 2**40])
    def test_rows_outside_are_refused(self, bad: int) -> None:
        packed = lowbit_rs.quantize(torch.randn(50, 64))
        with pytest.raises(InvalidArgument, match=rf"input: got index {bad}, expected indices from 0 to 49"):
            embedding(torch.tensor([3, bad]), packed)

    def test_wrong_arguments(self) -> None:
        packed = lowbit_rs.quantize(torch.randn(50, 64))
        with pytest.raises(InvalidArgument, match=r"input: got torch\.float32, expected torch\.int64 or torch\.int32"):
            embedding(torch.tensor([3.0]), packed)
        with pytest.raises(InvalidArgument, match=r"dtype: got torch\.float64"):
            embedding(torch.tensor([3]), packed, torch.float64)
        with pytest.raises(InvalidArgument, match=r"weight: got shape \[2, 3, 64\], expected \[N, K\]"):
            embedding(torch.tensor([3]), lowbit_rs.quantize(torch.randn(2, 3, 64)))


def test_force_isa_names_what_it_takes() -> None:
    with pytest.raises(InvalidArgument, match='name: got "sse2"'):
        _native.force_isa("sse2")
