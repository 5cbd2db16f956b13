"""lowbit_rs.compat.bitsandbytes against what bitsandbytes returned on CUDA, and against the one that is installed.

The recorded outputs are always there (tests/data/golden.npz); the comparisons with the package on the CPU are skipped
where it is not installed, and leave out what is wrong in it (tests/data/README.md names its version).
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowbit_rs
import lowbit_rs.compat.bitsandbytes as bnb
from lowbit_rs import InvalidArgument, Unsupported, codebooks

GOLDEN = np.load(Path(__file__).parent / "data" / "golden.npz")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
F = bnb.functional


@pytest.fixture
def original() -> Any:
    return pytest.importorskip("bitsandbytes", reason="compares with the installed bitsandbytes")


def weight(dtype: torch.dtype = torch.float32, rows: int = 24, cols: int = 128) -> Tensor:
    return (torch.randn(rows, cols) * 0.1).to(dtype)


class TestGolden:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", ["even", "ragged", "tiny", "heavy"])
    def test_quantize_and_dequantize_nf4(self, case: str, dtype: torch.dtype) -> None:
        x = torch.from_numpy(GOLDEN[f"{case}|x"]).to(dtype)
        row = DTYPES.index(dtype)
        for index, block_size in enumerate(BLOCK_SIZES):
            codes, state = F.quantize_nf4(x, blocksize=block_size)
            assert torch.equal(codes.flatten(), torch.from_numpy(GOLDEN[f"{case}|nf4|codes"][row, index]))
            assert codes.shape == ((x.numel() + 1) // 2, 1)
            assert torch.equal(state.absmax, torch.from_numpy(GOLDEN[f"{case}|{block_size}|absmax"][row]))
            packed = lowbit_rs.quantize(x[None], "nf4", block_size)
            assert torch.equal(F.dequantize_4bit(codes, state), packed.dequantize()[0])

    @pytest.mark.parametrize("case", ["even", "ragged", "heavy"])
    def test_nested_scales_are_restored(self, case: str) -> None:
        """From bitsandbytes' own second level; as in test_golden.py."""
        absmax, offset, scale_2 = (
            torch.from_numpy(np.array(GOLDEN[f"{case}|64|dq_{part}"][0]).reshape(-1))
            for part in ("absmax", "offset", "absmax2")
        )
        state2 = F.QuantState(scale_2, blocksize=256, code=F.create_dynamic_map(), dtype=torch.float32)
        count = GOLDEN[f"{case}|x"].size
        state = F.QuantState(
            absmax, torch.Size([count]), F.get_4bit_type("nf4", "cpu"), 64, "nf4", torch.float32, offset[0], state2
        )
        restored = F.dequantize_blockwise(absmax, state2) + offset
        codes = torch.from_numpy(GOLDEN[f"{case}|nf4|codes"][0, 1])[:, None]
        plain = F.QuantState(restored, state.shape, state.code, 64, "nf4", torch.float32)
        assert torch.equal(F.dequantize_4bit(codes, state), F.dequantize_4bit(codes, plain))

    @pytest.mark.parametrize("case", ["even", "ragged", "heavy"])
    def test_codes_of_scales(self, case: str) -> None:
        """quantize_blockwise on what bitsandbytes quantized: scales without their recorded mean."""
        for row in range(3):
            scale = torch.from_numpy(GOLDEN[f"{case}|64|absmax"][row])
            expected, offset, scale_2 = (
                torch.from_numpy(np.array(GOLDEN[f"{case}|64|dq_{part}"][row]).reshape(-1))
                for part in ("absmax", "offset", "absmax2")
            )
            codes, state = F.quantize_blockwise(scale - offset, blocksize=256)
            assert torch.equal(state.absmax, scale_2)
            assert torch.equal(codes, expected)

    @pytest.mark.parametrize("shape", ["5x48x96", "33x64x256"])
    def test_int8_rows(self, shape: str) -> None:
        """But for one value a weight that is 63.5 before rounding: see test_golden.py."""
        W = torch.from_numpy(GOLDEN[f"int8|{shape}|W"]).view(torch.float16)
        codes, absmax, columns = F.int8_vectorwise_quant(W)
        assert torch.equal(absmax, torch.from_numpy(GOLDEN[f"int8|{shape}|SCB"]))
        assert int((codes != torch.from_numpy(GOLDEN[f"int8|{shape}|CB"])).sum()) <= 1
        assert columns is None


class TestAgainstTheInstalledOne:
    """bitsandbytes' functions on the CPU."""

    def test_tables(self, original: Any) -> None:
        theirs = original.functional
        assert torch.equal(F.create_dynamic_map(), theirs.create_dynamic_map())
        for name in ("nf4", "fp4"):
            assert torch.equal(F.get_4bit_type(name, "cpu"), theirs.get_4bit_type(name, device="cpu"))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("nested", [False, True])
    def test_quantize_4bit(self, dtype: torch.dtype, nested: bool, original: Any) -> None:
        x = weight(dtype, 32, 256)
        codes, state = F.quantize_4bit(x, blocksize=64, compress_statistics=nested, quant_type="nf4")
        their_codes, theirs = original.functional.quantize_4bit(
            x, blocksize=64, compress_statistics=nested, quant_type="nf4"
        )
        assert torch.equal(codes, their_codes)
        assert codes.shape == their_codes.shape
        if nested:
            # A mean in another order of summing; where it is equal, so are the codes of the scales.
            torch.testing.assert_close(state.offset, theirs.offset, rtol=128 * 2.0**-24, atol=0)
        else:
            assert torch.equal(state.absmax, theirs.absmax)
        assert state.shape == theirs.shape
        assert (state.blocksize, state.quant_type, state.dtype) == (64, "nf4", dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("format", ["nf4", "fp4"])
    @pytest.mark.parametrize("nested", [False, True])
    def test_their_codes_decode_to_their_values(
        self, dtype: torch.dtype, format: str, nested: bool, original: Any
    ) -> None:
        codes, theirs = original.functional.quantize_4bit(
            weight(dtype, 32, 256), blocksize=64, compress_statistics=nested, quant_type=format
        )
        state = F.QuantState.from_dict(theirs.as_dict(packed=True), "cpu")
        assert torch.equal(F.dequantize_4bit(codes, state), original.functional.dequantize_4bit(codes, theirs))

    def test_states_are_each_others(self, original: Any) -> None:
        for nested in (False, True):
            codes, state = F.quantize_4bit(weight(), compress_statistics=nested, quant_type="nf4")
            for packed in (False, True):
                theirs = original.functional.QuantState.from_dict(state.as_dict(packed=packed), torch.device("cpu"))
                assert torch.equal(original.functional.dequantize_4bit(codes, theirs), F.dequantize_4bit(codes, state))
                assert F.QuantState.from_dict(theirs.as_dict(packed=packed), "cpu") == state

    @pytest.mark.parametrize("blocksize", [64, 256, 4096])
    def test_blockwise(self, blocksize: int, original: Any) -> None:
        """Equal codes; where not, for bitsandbytes' CPU code takes short cuts, ours is the nearer value."""
        x = weight(rows=17, cols=100)
        codes, state = F.quantize_blockwise(x, blocksize=blocksize)
        their_codes, theirs = original.functional.quantize_blockwise(x, blocksize=blocksize)
        assert torch.equal(state.absmax, theirs.absmax)
        decoded, their_decoded = (F.dequantize_blockwise(c, state) for c in (codes, their_codes))
        differing = codes != their_codes
        assert float(differing.float().mean()) < 0.01
        assert bool(((decoded - x).abs() <= (their_decoded - x).abs()).all())
        assert torch.equal(decoded, original.functional.dequantize_blockwise(codes, theirs))
        assert torch.equal(decoded, F.dequantize_blockwise(codes, absmax=state.absmax, blocksize=blocksize))

    def test_matmul_4bit(self, original: Any) -> None:
        W = weight()
        x = torch.randn(3, 128)
        codes, theirs = original.functional.quantize_4bit(W, quant_type="nf4")
        state = F.QuantState.from_dict(theirs.as_dict(packed=True), "cpu")
        expected = x.double() @ original.functional.dequantize_4bit(codes, theirs).double().T
        torch.testing.assert_close(bnb.matmul_4bit(x, codes, state).double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(F.gemv_4bit(x, codes, state=state), bnb.matmul_4bit(x, codes, state))

    @pytest.mark.parametrize("threshold", [0.0, 2.0])
    def test_int8(self, threshold: float, original: Any) -> None:
        x, W = torch.randn(5, 96).half(), weight(torch.float16, 8, 96)
        theirs = original.functional
        a, b = F.int8_vectorwise_quant(x, threshold), F.int8_vectorwise_quant(W)
        their_a, their_b = theirs.int8_vectorwise_quant(x.clone(), threshold), theirs.int8_vectorwise_quant(W.clone())
        for mine, their in zip((*a, *b), (*their_a, *their_b), strict=True):
            assert (mine is None) == (their is None)
            assert mine is None or torch.equal(mine, their)
        product = F.int8_linear_matmul(a[0], b[0])
        assert torch.equal(product, theirs.int8_linear_matmul(a[0], b[0]))
        bias = torch.randn(8).half()
        for addend in (None, bias):
            mine, other = (f.int8_mm_dequant(product, a[1], b[1], bias=addend) for f in (F, theirs))
            assert torch.equal(mine, other)
        assert torch.equal(F.int8_vectorwise_dequant(*b[:2]), theirs.int8_vectorwise_dequant(*b[:2]))

    @pytest.mark.parametrize("kind", ["LinearNF4", "LinearFP4", "Linear8bitLt"])
    def test_state_dicts_are_each_others(self, kind: str, original: Any) -> None:
        options = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {}
        x = torch.randn(3, 128)
        mine, theirs = (getattr(package.nn, kind)(128, 8, **options) for package in (bnb, original))
        theirs.load_state_dict(mine.state_dict())
        theirs = theirs.to("cpu")
        state = theirs.state_dict()
        mine.load_state_dict(state)
        assert mine.state_dict().keys() == state.keys()
        for key, tensor in mine.state_dict().items():
            assert "quant_state" in key or torch.equal(tensor, state[key]), key
        plain = nn.Linear(128, 8)
        plain.load_state_dict({"weight": decoded(mine), "bias": mine.bias.data})
        # 8-bit layers round activations, by half a step of absmax / 127 at most.
        half = x.abs().amax(1, keepdim=True) / 254 * (kind == "Linear8bitLt")
        bound = half * plain.weight.abs().sum(1) + 1e-5 * (1 + plain(x).abs())
        assert bool(((mine(x) - plain(x)).abs() <= bound).all())


def decoded(layer: Any) -> Tensor:
    if isinstance(layer.weight, bnb.nn.Int8Params):
        assert layer.weight.SCB is not None
        return F.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    return F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


class TestFunctional:
    def test_normal_map(self) -> None:
        values = F.create_normal_map()
        assert values.shape == (256,)
        assert torch.equal(values.unique(), torch.from_numpy(codebooks.nf4()))
        assert torch.equal(values, values.sort().values)

    @pytest.mark.parametrize("shape", [(7,), (3, 5, 11), (5, 3)])
    @pytest.mark.parametrize("format", ["nf4", "fp4"])
    def test_any_shape(self, shape: tuple[int, ...], format: str) -> None:
        x = torch.randn(shape)
        codes, state = F.quantize_4bit(x, quant_type=format)
        assert F.dequantize_4bit(codes, state).shape == x.shape
        out = torch.empty(shape)
        assert F.dequantize_4bit(codes, absmax=state.absmax, out=out, quant_type=format) is out
        assert torch.equal(out, F.dequantize_4bit(codes, state))
        if len(shape) == 2:
            assert torch.equal(F.dequantize_4bit(codes.t(), state), out.t())

    def test_storage_dtypes(self) -> None:
        x = torch.randn(3, 5)
        plain, state = F.quantize_nf4(x)
        for storage in (torch.float32, torch.bfloat16, torch.uint8):
            codes, _ = F.quantize_nf4(x, quant_storage=storage)
            assert codes.dtype == storage
            assert torch.equal(F.dequantize_4bit(codes, state), F.dequantize_4bit(plain, state))

    def test_outputs_that_are_given(self) -> None:
        x = torch.randn(4, 64)
        codes, state = F.quantize_nf4(x)
        out, absmax = torch.empty_like(codes), torch.empty_like(state.absmax)
        got, got_state = F.quantize_nf4(x, absmax=absmax, out=out)
        assert got is out
        assert got_state.absmax is absmax
        assert torch.equal(out, codes)
        assert torch.equal(absmax, state.absmax)
        x8 = torch.empty(4, 64, dtype=torch.uint8)
        codes8, state8 = F.quantize_blockwise(x, out=x8)
        assert codes8 is x8
        y = torch.empty(4, 64)
        assert F.dequantize_blockwise(x8, state8, out=y) is y
        row = torch.empty(2, 4)
        assert bnb.matmul_4bit(torch.randn(2, 64), codes, state, row) is row

    def test_nested_blockwise(self) -> None:
        x = torch.randn(64, 64)
        codes, state = F.quantize_blockwise(x, blocksize=64, nested=True)
        plain_codes, plain = F.quantize_blockwise(x, blocksize=64)
        assert torch.equal(codes, plain_codes)
        step = float((plain.absmax - plain.absmax.mean()).abs().max()) / 64
        torch.testing.assert_close(
            F.dequantize_blockwise(codes, state), F.dequantize_blockwise(codes, plain), rtol=0, atol=step
        )

    def test_blockwise_takes_the_nearest_value(self) -> None:
        table = F.create_dynamic_map()
        x = torch.randn(3, 70)
        codes, state = F.quantize_blockwise(x, blocksize=32)
        scaled = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % 32)).reshape(-1, 32).double()
        scaled = (scaled / state.absmax.double()[:, None]).flatten()[: x.numel()]
        distance = (scaled[:, None] - table.double()).abs()
        chosen = distance.gather(1, codes.flatten().long()[:, None])[:, 0]
        assert bool((chosen <= distance.amin(1) + 2.0**-23).all())
        zeros, state = F.quantize_blockwise(torch.zeros(40), blocksize=32)
        assert not F.dequantize_blockwise(zeros, state).any()

    def test_weights_in_the_other_orientation(self) -> None:
        W = torch.randn(64, 24)  # [K, N]
        codes, state = F.quantize_nf4(W)
        x, bias = torch.randn(3, 64), torch.randn(24)
        with pytest.warns(DeprecationWarning, match="quantize it as"):
            y = bnb.matmul_4bit(x, codes.t(), state, bias=bias)
        torch.testing.assert_close(y, x @ F.dequantize_4bit(codes, state) + bias, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("cols", [64, 72, 75])
    def test_products_where_blocks_straddle_rows(self, cols: int) -> None:
        W, x = torch.randn(8, cols), torch.randn(3, cols, requires_grad=True)
        codes, state = F.quantize_nf4(W, compress_statistics=True)
        y = bnb.matmul_4bit(x, codes, state)
        dense = F.dequantize_4bit(codes, state)
        torch.testing.assert_close(y, x @ dense.T, rtol=1e-5, atol=1e-5)
        y.sum().backward()
        torch.testing.assert_close(x.grad, dense.sum(0).expand(3, -1), rtol=1e-5, atol=1e-5)

    def test_int8_products_are_exact(self) -> None:
        a = torch.full((2, 5000), -128, dtype=torch.int8)
        b = torch.full((3, 5000), 127, dtype=torch.int8)
        b[:, ::2] = -127
        expected = torch.from_numpy(a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T)
        assert torch.equal(F.int8_linear_matmul(a, b).long(), expected)
        out = torch.empty(2, 3, dtype=torch.int32)
        assert F.int8_linear_matmul(a, b, out) is out

    def test_int8_leaves_its_input_and_zero_rows_alone(self) -> None:
        x = torch.tensor([[0.0, 0.0], [9.0, 1.0]]).half()
        codes, absmax, columns = F.int8_vectorwise_quant(x, threshold=6.0)
        assert x.tolist() == [[0.0, 0.0], [9.0, 1.0]]
        assert codes.tolist() == [[0, 0], [0, 127]]
        assert absmax.tolist() == [0.0, 1.0]
        assert columns is not None
        assert columns.tolist() == [0]

    def test_matmul_of_8_bits_needs_no_outliers(self) -> None:
        """Within what the weight's rounding allows, for activations that LLM.int8 treats as outliers."""
        W, x = torch.randn(8, 64), torch.randn(3, 64)
        x[:, 5] = 1e4
        state = bnb.MatmulLtState()
        y = bnb.matmul(x, W, state=state, threshold=6.0)
        assert state.SCB is not None
        bound = x.abs().double().sum(1)[:, None] * state.SCB.double() / 254
        assert bool(((y.double() - x.double() @ W.double().T).abs() <= bound * 1.001).all())
        assert torch.equal(bnb.matmul(x, W, state=state), y)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: F.quantize_4bit(torch.ones(4, 64), blocksize=16), "blocksize: got 16, expected one of 32"),
            (lambda: F.quantize_4bit(torch.ones(4, 64), quant_type="int4"), "quant_type: got 'int4', expected 'nf4'"),
            (lambda: F.quantize_4bit(torch.ones(4, 64).double()), "dtype: got torch.float64"),
            (lambda: F.quantize_nf4(torch.full((4, 64), torch.nan)), "nan"),
            (lambda: F.dequantize_4bit(torch.zeros(8, 1, dtype=torch.uint8)), "quant_state: got None"),
            (lambda: F.dequantize_blockwise(torch.zeros(8)), "A: got torch.float32, expected torch.uint8"),
            (lambda: F.dequantize_blockwise(torch.zeros(8, dtype=torch.uint8)), "quant_state: got None"),
            (lambda: F.quantize_blockwise(torch.zeros(8), blocksize=0), "blocksize: got 0"),
            (lambda: F.gemv_4bit(torch.ones(1, 64), torch.ones(32, 1)), "state: got None"),
            (lambda: F.int8_linear_matmul(torch.ones(2, 2), torch.ones(2, 2)), "A: got torch.float32"),
            (lambda: F.int8_mm_dequant(torch.ones(2, 2), torch.ones(2), torch.ones(2)), "A: got torch.float32"),
            (lambda: F.QuantState.from_dict({"absmax": torch.ones(1)}, "cpu"), "qs_dict: got"),
        ],
    )
    def test_wrong_arguments(self, call: Any, message: str) -> None:
        with pytest.raises(InvalidArgument, match=f"(?i){message}"):
            call()

    def test_scales_that_do_not_fit(self) -> None:
        codes, state = F.quantize_nf4(torch.ones(4, 64))
        state.absmax = state.absmax[:-1]
        with pytest.raises(InvalidArgument, match=r"absmax: got 3 elements, expected 4 for shape \[4, 64\]"):
            F.dequantize_4bit(codes, state)


class TestLayers:
    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("format", ["nf4", "fp4"])
    def test_linear_is_ours(self, format: str, nested: bool, dtype: torch.dtype) -> None:
        plain = nn.Linear(128, 24).to(dtype)
        layer = bnb.nn.Linear4bit(128, 24, quant_type=format, compress_statistics=nested).to(dtype)
        layer.load_state_dict(plain.state_dict())
        assert layer.weight.dtype == dtype
        layer = layer.to("cpu")
        assert layer.weight.dtype == torch.uint8
        ours = lowbit_rs.QuantLinear.from_linear(plain, format, 64, nested)
        x = torch.randn(2, 3, 128).to(dtype)
        assert torch.equal(layer(x), ours(x))

    def test_a_model_is_quantized_by_its_move(self) -> None:
        model = nn.Sequential(bnb.nn.LinearNF4(64, 64), nn.ReLU(), bnb.nn.Linear8bitLt(64, 8, has_fp16_weights=False))
        x = torch.randn(2, 64)
        with pytest.raises(InvalidArgument, match="weight: got floats that are not quantized yet"):
            model(x)
        y = model.to("cpu")(x)
        assert y.shape == (2, 8)
        assert [model[i].weight.dtype for i in (0, 2)] == [torch.uint8, torch.int8]
        assert torch.equal(model.cpu()(x), y)
        half = copy.deepcopy(model).half()
        assert [half[i].weight.dtype for i in (0, 2)] == [torch.uint8, torch.int8]
        assert half(x.half()).dtype == torch.float16

    def test_compute_dtype(self) -> None:
        layer = bnb.nn.LinearNF4(64, 8, compute_dtype=torch.bfloat16).to("cpu")
        x = torch.randn(2, 64)
        y = layer(x)
        assert y.dtype == torch.float32
        assert torch.equal(y, layer(x.bfloat16().float()))

    @pytest.mark.parametrize("cols", [128, 96])
    @pytest.mark.parametrize("kind", ["LinearNF4", "LinearFP4"])
    def test_linear_compiles_in_one_graph(self, kind: str, cols: int) -> None:
        layer: nn.Module = getattr(bnb.nn, kind)(cols, 8).to("cpu")
        x = torch.randn(2, cols)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), layer(x))

    @pytest.mark.parametrize(
        "kind", ["LinearNF4", "LinearFP4", "Linear8bitLt", "EmbeddingNF4", "EmbeddingFP4", "Embedding8bit"]
    )
    def test_copies_and_saves(self, kind: str) -> None:
        def make(**options: Any) -> Any:
            if kind == "Linear8bitLt":
                options["has_fp16_weights"] = False
            return getattr(bnb.nn, kind)(64, 8, **options)

        layer = make().to("cpu")
        x = torch.tensor([[3, 5]]) if "Embedding" in kind else torch.randn(2, 64)
        y = layer(x)
        stream = io.BytesIO()
        torch.save(layer.state_dict(), stream)
        stream.seek(0)
        fresh, moved, meta = make(), make().to("cpu"), make(device="meta")
        for other in (fresh, moved, meta):
            other.load_state_dict(torch.load(stream, weights_only=True), assign=other is meta)
            stream.seek(0)
            assert torch.equal(other(x), y)
        assert torch.equal(copy.deepcopy(layer)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
        assert torch.equal(copy.copy(layer.weight).data, layer.weight.data)

    def test_parameters_made_by_hand(self) -> None:
        layer = nn.Linear(64, 8, bias=False)
        quantized = bnb.nn.Linear4bit(64, 8, bias=False)
        quantized.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", blocksize=32)
        quantized = quantized.to("cpu")
        assert quantized.quant_state is not None
        assert quantized.quant_state.blocksize == 32
        data = quantized.weight.data
        stats = quantized.quant_state.as_dict(packed=True)
        again = bnb.nn.Params4bit.from_prequantized(data, stats, device="cpu")
        assert again.bnb_quantized
        assert again.compress_statistics
        assert again.quant_state is not None
        assert torch.equal(bnb.matmul_4bit(torch.eye(64), again, again.quant_state), quantized(torch.eye(64)))

    def test_a_state_of_another_shape_is_refused(self) -> None:
        state = bnb.nn.LinearNF4(64, 8).to("cpu").state_dict()
        with pytest.raises(RuntimeError, match=r"got shape \[8, 64\], expected \[8, 128\]"):
            bnb.nn.LinearNF4(128, 8).load_state_dict(state)
        rows = bnb.nn.Linear8bitLt(64, 8, has_fp16_weights=False).to("cpu")
        with pytest.raises(RuntimeError, match="weight_format: got 2"):
            rows.load_state_dict(rows.state_dict() | {"weight_format": torch.tensor(2)})

    @pytest.mark.parametrize("cols", [128, 96])
    def test_embeddings(self, cols: int) -> None:
        rows = torch.tensor([[0, 9], [3, 3]])
        for kind in ("EmbeddingNF4", "EmbeddingFP4", "Embedding8bit"):
            layer = getattr(bnb.nn, kind)(10, cols).to("cpu")
            got = layer(rows)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, decoded(layer)[rows], rtol=2.0**-22, atol=0)

    def test_adapters_train_through_it(self) -> None:
        layer = bnb.nn.LinearNF4(64, 8).to("cpu")
        x = torch.randn(2, 64, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, decoded(layer).sum(0).expand(2, -1), rtol=1e-5, atol=1e-5)
        assert layer.weight.grad is None


class TestWhatIsNotOffered:
    def test_optimizers(self) -> None:
        for name in bnb.optim.NAMES:
            with pytest.raises(Unsupported, match=f"bnb.optim.{name}: not supported: lowbit_rs stores weights"):
                getattr(bnb.optim, name)
            assert not hasattr(bnb.optim, name)
        with pytest.raises(AttributeError, match="has no attribute 'Adam9bit'"):
            bnb.optim.Adam9bit  # noqa: B018

    def test_every_optimizer_of_the_installed_one_is_named(self, original: Any) -> None:
        theirs = {name for name, value in vars(original.optim).items() if isinstance(value, type)}
        assert theirs <= set(bnb.optim.NAMES)

    @pytest.mark.parametrize(
        ("module", "name"),
        [(F, "int8_double_quant"), (F, "igemm"), (F, "create_linear_map"), (bnb.nn, "StableEmbedding")],
    )
    def test_others(self, module: Any, name: str) -> None:
        with pytest.raises(Unsupported, match=f"{name}: not supported: "):
            getattr(module, name)

    def test_arguments(self) -> None:
        for call in (
            lambda: bnb.nn.Linear8bitLt(8, 8),
            lambda: F.create_dynamic_map(signed=False),
            lambda: F.create_normal_map(offset=0.9),
            lambda: F.get_4bit_type("af4", "cpu"),
        ):
            with pytest.raises(Unsupported):
                call()

    def test_signatures_are_those_of_the_installed_one(self, original: Any) -> None:
        """Parameters in their order, with their defaults."""
        pairs = [
            (getattr(F, name), getattr(original.functional, name))
            for name in F.__all__
            if name in vars(original.functional)
        ]
        pairs += [(getattr(bnb.nn, name), getattr(original.nn, name)) for name in bnb.nn.__all__]
        pairs += [(bnb.matmul, original.matmul), (bnb.matmul_4bit, original.matmul_4bit)]
        assert len(pairs) >= 28
        for mine, theirs in pairs:
            expected = {name: p.default for name, p in inspect.signature(theirs).parameters.items()}
            got = {name: p.default for name, p in inspect.signature(mine).parameters.items()}
            assert list(got.items()) == list(expected.items()), mine
