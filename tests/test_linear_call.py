"""The quick way of a layer's product: the results of the ordinary one, no stale view, left where somebody watches.

What it must notice may happen on any device: `devices` are those of this machine.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import lowbit_rs
from lowbit_rs import InvalidArgument, QuantLinear, _native
from lowbit_rs.functional import packed_linear

pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch has no table of C functions"
)

DEVICES = ["cpu"]
if _native.has_cuda_kernels() and torch.cuda.is_available():
    DEVICES.append("cuda")

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "double_quant": {"double_quant": True},
    "uint4": {"format": "uint4", "scale_dtype": torch.float16},
    "int8": {"format": "int8"},
    "custom": {"codebook": (1.0, -1.0, 0.5, 0.0)},
}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(device: str, bias: bool = True, **options: Any) -> QuantLinear:
    return QuantLinear.from_linear(nn.Linear(128, 24, bias=bias, device=device), **options)


def quick(layer: QuantLinear, x: Tensor) -> Tensor | None:
    """What the quick way says."""
    return layer._call.run(layer, vars(layer), x)


def ordinary(layer: QuantLinear, x: Tensor) -> Tensor:
    """What the other way says."""
    return packed_linear(x, layer._tensors(), layer._shape, layer._scheme, layer.bias, rounding=(layer.activation, 0.0))


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_same_results(device: str, options: dict[str, Any], bias: bool, dtype: torch.dtype) -> None:
    layer = make(device, bias, **options)
    for shape in ((128,), (1, 128), (3, 128), (2, 1, 4, 128), (0, 128)):
        x = torch.randn(shape, device=device).to(dtype)
        y = quick(layer, x)
        assert y is not None
        assert (y.shape, y.dtype, y.device) == ((*shape[:-1], 24), dtype, x.device)
        assert torch.equal(y, ordinary(layer, x))
        assert torch.equal(layer(x), y)


def test_what_is_left_to_the_ordinary_way(device: str) -> None:
    layer = make(device)
    x = torch.randn(3, 128, device=device)
    strided = torch.randn(3, 256, device=device)[:, ::2]
    for other in (x[:, :64], x.double(), x.to("meta"), strided, torch.tensor(1.0, device=device)):
        assert quick(layer, other) is None
    assert torch.equal(layer(strided), layer(strided.contiguous()))
    with pytest.raises(InvalidArgument, match=r"x: got shape \[3, 64\]"):
        layer(x[:, :64])
    with pytest.raises(InvalidArgument, match=r"x: got torch\.float64"):
        layer(x.double())


def replace_parameter(layer: QuantLinear, other: QuantLinear) -> None:
    layer.weight, layer.weight_scale = other.weight, other.weight_scale


def replace_data(layer: QuantLinear, other: QuantLinear) -> None:
    layer.weight.data, layer.weight_scale.data = other.weight.data, other.weight_scale.data


def write_in_place(layer: QuantLinear, other: QuantLinear) -> None:
    layer.weight.data.copy_(other.weight)
    layer.weight_scale.data.copy_(other.weight_scale)


def load(layer: QuantLinear, other: QuantLinear) -> None:
    layer.load_state_dict(other.state_dict())


def assign(layer: QuantLinear, other: QuantLinear) -> None:
    layer.load_state_dict(other.state_dict(), assign=True)


def set_storage(layer: QuantLinear, other: QuantLinear) -> None:
    for mine, theirs in ((layer.weight, other.weight), (layer.weight_scale, other.weight_scale)):
        mine.set_(theirs.untyped_storage(), 0, theirs.shape, theirs.stride())


@pytest.mark.parametrize(
    "change", [replace_parameter, replace_data, write_in_place, load, assign, set_storage], ids=lambda f: f.__name__
)
def test_another_weight_is_noticed(device: str, change: Callable[[QuantLinear, QuantLinear], None]) -> None:
    layer, other = make(device, bias=False), make(device, bias=False)
    x = torch.randn(2, 128, device=device)
    before, wanted = layer(x), other(x)
    assert not torch.equal(before, wanted)
    change(layer, other)
    assert torch.equal(layer(x), wanted)


def test_a_scale_of_another_dtype_is_noticed(device: str) -> None:
    layer, x = make(device), torch.randn(2, 128, device=device)
    before = layer(x)
    layer.weight_scale.data = layer.weight_scale.data.half()
    y = layer(x)
    assert torch.equal(y, ordinary(layer, x))
    assert not torch.equal(y, before)


def test_other_shapes_are_refused(device: str) -> None:
    layer, x = make(device), torch.randn(2, 128, device=device)
    layer(x)
    weight = layer.weight.data
    for misfit in (weight[:12], weight.view(torch.int8), weight.T, weight[:0]):
        layer.weight.data = misfit
        with pytest.raises(InvalidArgument):
            layer(x)
    layer.weight.data = weight
    layer.weight_scale.data = layer.weight_scale.data[:12]
    with pytest.raises(InvalidArgument):
        layer(x)


def test_a_freed_weight_is_refused(device: str) -> None:
    layer, x = make(device), torch.randn(2, 128, device=device)
    layer(x)
    layer.weight.data.untyped_storage().resize_(0)
    with pytest.raises(InvalidArgument, match="data: got a tensor whose memory was freed"):
        layer(x)


def test_a_moved_layer(device: str) -> None:
    layer = make("cpu")
    x = torch.randn(2, 128)
    y = layer(x)
    assert torch.equal(layer.to(device)(x.to(device)), ordinary(layer, x.to(device)))
    assert torch.equal(layer.cpu()(x), y)
    layer.to("meta")
    with pytest.raises(InvalidArgument, match="x: got a tensor on cpu"):
        layer(x)


def test_bias_is_read_anew(device: str) -> None:
    layer, x = make(device), torch.randn(2, 128, device=device)
    y = layer(x)
    assert layer.bias is not None
    layer.bias.data = layer.bias.data + 1
    torch.testing.assert_close(layer(x), y + 1)
    layer.bias = nn.Parameter(torch.ones(24, device=device, dtype=torch.bfloat16), requires_grad=False)
    assert torch.equal(layer(x), ordinary(layer, x))
    layer.register_parameter("bias", None)
    assert torch.equal(layer(x), ordinary(layer, x))


def test_copies_are_apart(device: str) -> None:
    layer, x = make(device), torch.randn(2, 128, device=device)
    y = layer(x)
    for same in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(x), y)
    twin = copy.deepcopy(layer)
    twin.weight.data.zero_()
    assert torch.equal(layer(x), y)


def test_options_of_a_layer(device: str) -> None:
    layer, x = make(device), torch.randn(2, 128, device=device)
    y = layer(x)
    layer.compute_dtype = torch.bfloat16
    assert torch.equal(layer(x), ordinary(layer, x.bfloat16()).float())
    layer.compute_dtype = None
    layer.activation = "int8"
    if device == "cpu":
        assert torch.equal(layer(x), ordinary(layer, x))
    else:
        with pytest.raises(lowbit_rs.Unsupported, match='activation="int8" on CUDA'):
            layer(x)
    layer.activation = "none"
    assert torch.equal(layer(x), y)


def test_whoever_watches_sees_the_operator(device: str) -> None:
    layer, x = make(device), torch.randn(2, 128, device=device)
    assert quick(layer, x) is not None
    wanted = x.clone().requires_grad_()
    y = layer(wanted)
    assert y.grad_fn is not None
    y.sum().backward()
    torch.testing.assert_close(wanted.grad, layer.dequantize().sum(0).expand(2, 128))
    with torch.no_grad():
        assert quick(layer, wanted) is not None
    with torch.autocast(device, torch.bfloat16):
        assert quick(layer, x) is None
        assert layer(x).dtype == torch.bfloat16
    negated = torch._neg_view(x)
    assert quick(layer, negated) is None
    assert torch.equal(layer(negated), layer(-x))
    graph = make_fx(layer)(x)
    assert "lowbit_rs.linear.default" in graph.code
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = layer(mode.from_tensor(x))
    assert isinstance(fake, torch._subclasses.FakeTensor)
    assert fake.shape == (2, 24)
    assert layer.bias is not None
    layer.bias.requires_grad_()
    assert layer(x).grad_fn is not None


def test_threads_share_a_layer(device: str) -> None:
    layer = make(device)
    inputs = [torch.randn(2, 128, device=device) for _ in range(8)]
    wanted = [layer(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            assert all(map(torch.equal, pool.map(layer, inputs), wanted))
