"""Fused layers: one product for several, under their own names, right whatever happens around them."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowbit_rs
import strategies
from counted_products import count_products
from lowbit_rs import PackedWeight, QuantLinear, dequantize_model, fuse_model, quantize, quantize_model
from lowbit_rs._backends import cpu
from lowbit_rs.files import save_packed
from lowbit_rs.nn.fusion import _MAX_UNTAKEN
from lowbit_rs.packed import SHARED_FIELDS

QKV = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """Projections of one input, and what a test does between them."""

    q_proj: Any
    k_proj: Any
    v_proj: Any

    def __init__(self, bias: bool = False, width: int = 64) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, 96, bias=bias)
        self.k_proj = nn.Linear(width, 32, bias=bias)
        self.v_proj = nn.Linear(width, 32, bias=bias)
        self.between: Callable[[Tensor], Any] = lambda _: None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q_proj(x)
        self.between(x)
        return q, self.k_proj(x), self.v_proj(x)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return count_products(monkeypatch, cpu)


def pair(bias: bool = False, **options: Any) -> tuple[Attention, Attention]:
    """The same packed layers twice: fused, and as they are."""
    torch.manual_seed(0)
    plain = Attention(bias)
    quantize_model(plain, progress=False, **options)
    fused = copy.deepcopy(plain)
    assert fuse_model(fused).groups == [QKV]
    return fused, plain


def assert_same(fused: nn.Module, plain: nn.Module, *x: Tensor) -> None:
    """Both give the same, but for the order of fp32 sums, which is at liberty to depend on the number of rows."""
    for ours, theirs in zip(fused(*x), plain(*x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def is_joined(layer: QuantLinear) -> bool:
    group = layer.fused_group
    return group is not None and group._view([m for m in group.members if m is not None]) is not None


@torch.no_grad()
def test_one_product_for_three(products: list[int]) -> None:
    fused, plain = pair()
    for shape in [(64,), (1, 64), (2, 5, 64), (0, 64)]:
        x = torch.randn(shape)
        products.clear()
        q, k, v = fused(x)
        assert products == [160]
        assert [q.shape[-1], k.shape[-1], v.shape[-1]] == [96, 32, 32]
        assert_same(fused, plain, x)


@torch.no_grad()
@pytest.mark.parametrize("dtype", strategies.DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"format": "uint4", "scale_dtype": torch.bfloat16},
        {"format": "int8", "block_size": "row"},
        {"codebook": (-1.0, 0.0, 0.25, 1.0)},
        {"block_order": "flat"},
        {"compute_dtype": torch.bfloat16},
        {"activation": "int8"},
        {"format": "int8", "block_size": "row", "activation": "int8"},
        {"format": "int8", "block_size": "row", "activation": "int8", "threshold": 2.0},
    ],
    ids=lambda options: "-".join(options),
)
def test_parts_are_those_of_the_joined_weight(options: dict[str, Any], dtype: torch.dtype) -> None:
    """To the bit: the product is that of the matrix which has the rows of all."""
    fused, _ = pair(bias=True, **options)
    layers: list[QuantLinear] = [getattr(fused, name) for name in QKV]
    tensors = [layer.packed.tensors() for layer in layers]
    joined = {
        name: tensors[0][name] if name in SHARED_FIELDS else torch.cat([each[name] for each in tensors])
        for name in tensors[0]
    }
    packed = PackedWeight.from_tensors(layers[0].spec, [160, 64], torch.float32, joined)
    bias = torch.cat([layer.bias for layer in layers])
    whole = QuantLinear.from_packed(
        packed,
        bias,
        **{name: options[name] for name in ("compute_dtype", "activation", "threshold") if name in options},
    )
    x = torch.randn(7, 64, dtype=dtype)
    assert torch.equal(torch.cat(fused(x), -1), whole(x))


@torch.no_grad()
def test_one_by_one_where_members_are_called_alone() -> None:
    fused, plain = pair()
    x, other = torch.randn(3, 64), torch.randn(3, 64)
    torch.testing.assert_close(fused.k_proj(x), plain.k_proj(x))
    torch.testing.assert_close(fused.q_proj(other), plain.q_proj(other))
    torch.testing.assert_close(fused.v_proj(x), plain.v_proj(x))
    torch.testing.assert_close(fused.q_proj(x), plain.q_proj(x))
    torch.testing.assert_close(fused.q_proj(x), plain.q_proj(x))
    assert_same(fused, plain, x)


@torch.no_grad()
def test_an_input_that_changes_between_calls_is_a_new_one() -> None:
    fused, plain = pair()
    fused.between = plain.between = lambda x: x.mul_(2)
    x = torch.randn(3, 64)
    for ours, theirs in zip(fused(x.clone()), plain(x.clone()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_inference_mode(products: list[int]) -> None:
    fused, plain = pair()
    outside = torch.randn(3, 64)
    with torch.inference_mode():
        for x in (outside, torch.randn(3, 64)):
            products.clear()
            assert fused(x)[0].is_inference()
            assert products == [160]
            assert_same(fused, plain, x)


@torch.no_grad()
def test_parts_can_be_changed_in_place() -> None:
    fused, _ = pair()
    x = torch.randn(3, 64)
    q, k, v = fused(x)
    expected = [part.clone() for part in (k, v)]
    q.zero_()
    k.add_(1)
    assert torch.equal(k, expected[0] + 1)
    assert torch.equal(v, expected[1])


@torch.no_grad()
def test_another_autocast_is_another_product() -> None:
    fused, plain = pair()
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        q = fused.q_proj(x)
    k = fused.k_proj(x)
    assert (q.dtype, k.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(k, plain.k_proj(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(fused, plain, x)


def test_gradients_are_those_of_the_layers(products: list[int]) -> None:
    fused, plain = pair(bias=True)
    for model in (fused, plain):
        model.k_proj.bias.requires_grad_()
    xs = [torch.randn(2, 3, 64).requires_grad_() for _ in range(2)]
    xs[1].data.copy_(xs[0].data)
    for model, x in zip((fused, plain), xs, strict=True):
        q, k, v = model(x)
        q += 1  # in place, as some layers do
        (q.sum() * k.sum() + (v**2).sum()).backward()
    grads: list[Any] = [x.grad for x in xs]
    assert torch.equal(*grads)
    assert torch.equal(fused.k_proj.bias.grad, plain.k_proj.bias.grad)
    assert 160 not in products
    # A product without a gradient does not serve a call that records one.
    with torch.no_grad():
        fused.q_proj(xs[0])
    assert fused.k_proj(xs[0]).requires_grad


@torch.no_grad()
def test_traced_and_watched_calls_are_those_of_the_layers() -> None:
    fused, _ = pair(bias=True)
    x = torch.randn(3, 64)
    seen: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **kwargs or {})

    with Names():  # type: ignore[no-untyped-call]
        expected = fused(x)
    assert seen.count("lowbit_rs.linear.default") == 3
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for ours, theirs in zip(compiled(x), expected, strict=True):
            assert torch.equal(ours, theirs)
    exported = torch.export.export(fused, (x,)).module()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(exported(x), expected, strict=True))
    torch._dynamo.reset()


def test_threads_do_not_take_each_others_parts() -> None:
    fused, plain = pair()
    gate = threading.Barrier(4)
    fused.between = lambda _: gate.wait()
    problems: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(20):
                x = torch.randn(2, 64, generator=generator)
                for ours, theirs in zip(fused(x), plain(x), strict=True):
                    if not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5):
                        problems.append(f"thread {seed}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


@torch.no_grad()
def test_layers_that_do_not_belong_together_part() -> None:
    fused, plain = pair()
    for _ in range(_MAX_UNTAKEN):
        fused.q_proj(torch.randn(1, 64))
    with pytest.warns(UserWarning, match="called with different inputs"):
        fused.q_proj(torch.randn(1, 64))
    assert fused.q_proj.fused_group is fused.k_proj.fused_group is None
    assert_same(fused, plain, torch.randn(2, 64))


def layers_and_biases(model: Attention) -> dict[str, PackedWeight | Tensor]:
    layers = {name: getattr(model, name) for name in QKV}
    biases = {f"{name}.bias": layer.bias for name, layer in layers.items()}
    return biases | {f"{name}.weight": layer.packed for name, layer in layers.items()}


def test_keys_storages_and_files_are_those_of_the_layers(tmp_path: Path) -> None:
    fused, plain = pair(bias=True, format="uint4")
    assert list(fused.state_dict()) == list(plain.state_dict())
    for name, tensor in fused.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name])
    storages = {tensor.untyped_storage().data_ptr() for tensor in fused.state_dict().values()}
    assert len(storages) == len(fused.state_dict())  # else savers take them for tied
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in fused.state_dict().values())
    sizes = []
    for model in (fused, plain):
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        sizes.append(file.tell())
    assert sizes[0] == sizes[1]
    for name, model in (("fused", fused), ("plain", plain)):
        save_packed(layers_and_biases(model), tmp_path / f"{name}.safetensors")
    assert (tmp_path / "fused.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


@torch.no_grad()
@pytest.mark.parametrize("change", ["deepcopy", "pickle", "torch.save", "clone", "half", "load", "assign", "float"])
def test_weights_are_joined_again(change: str, products: list[int]) -> None:
    fused, plain = pair(bias=True)
    x = torch.randn(3, 64)
    if change == "deepcopy":
        original, fused = fused, copy.deepcopy(fused)
        assert original.q_proj.fused_group is not fused.q_proj.fused_group
        plain.q_proj.weight.zero_()
        fused.q_proj.weight.zero_()
        assert original.q_proj.weight.any()
        del original
    elif change == "pickle":
        fused = pickle.loads(pickle.dumps(fused.q_proj.fused_group and [fused.q_proj, fused.k_proj, fused.v_proj]))
        fused = replaced(plain, fused)
    elif change == "torch.save":
        file = io.BytesIO()
        torch.save([fused.q_proj, fused.k_proj, fused.v_proj], file)
        file.seek(0)
        fused = replaced(plain, torch.load(file, weights_only=False))
    elif change == "clone":
        fused._apply(lambda tensor: tensor.clone())  # type: ignore[no-untyped-call]
    elif change == "half":
        fused.half()
        plain.half()
    else:
        torch.manual_seed(1)
        other = Attention(bias=True)
        if change != "float":
            quantize_model(other, progress=False)
        for model in (fused, plain):
            model.load_state_dict(other.state_dict(), assign=change == "assign")
    assert all(map(is_joined, (fused.q_proj, fused.k_proj, fused.v_proj)))
    products.clear()
    fused(x)
    assert products == [160]
    assert_same(fused, plain, x)


def replaced(model: Attention, layers: list[QuantLinear]) -> Attention:
    model = copy.deepcopy(model)
    model.q_proj, model.k_proj, model.v_proj = layers
    return model


@torch.no_grad()
def test_copies_of_one_layer_are_on_their_own(products: list[int]) -> None:
    fused, plain = pair()
    x = torch.randn(2, 64)
    for layer in (copy.deepcopy(fused.k_proj), copy.copy(fused.k_proj), pickle.loads(pickle.dumps(fused.k_proj))):
        products.clear()
        torch.testing.assert_close(layer(x), plain.k_proj(x))
        assert products[0] == 32
    assert_same(fused, plain, x)


@torch.no_grad()
def test_layers_that_are_apart_multiply_one_by_one(products: list[int]) -> None:
    fused, plain = pair()
    x = torch.randn(2, 64)
    fused.k_proj.weight.data = fused.k_proj.weight.clone()
    assert_same(fused, plain, x)
    assert 160 not in products
    assert fuse_model(fused).groups == [QKV]
    assert_same(fused, plain, x)
    assert 160 in products
    # In place, as an optimizer or a loader writes: there is no copy that could be stale.
    fused.k_proj.weight_scale.mul_(2)
    plain.k_proj.weight_scale.mul_(2)
    fused.k_proj.compute_dtype = plain.k_proj.compute_dtype = torch.bfloat16
    products.clear()
    assert_same(fused, plain, x)
    assert 160 not in products


@torch.no_grad()
def test_other_thresholds_part_layers(products: list[int]) -> None:
    fused, plain = pair(format="int8", block_size="row", activation="int8", threshold=None)
    x = 3 * torch.randn(4, 64)
    fused.k_proj.threshold = plain.k_proj.threshold = 0.0  # as None
    assert_same(fused, plain, x)
    assert 160 in products
    products.clear()
    fused.k_proj.threshold = plain.k_proj.threshold = 2.0
    assert_same(fused, plain, x)
    assert 160 not in products
    assert fuse_model(fused).skipped == {QKV: "their activations are rounded differently"}


@torch.no_grad()
def test_layers_that_are_replaced_or_unpacked_leave() -> None:
    fused, _ = pair()
    x = torch.randn(2, 64)
    weights = [getattr(fused, name).dequantize() for name in QKV]
    dequantize_model(fused)
    assert all(type(getattr(fused, name)) is nn.Linear for name in QKV)
    for ours, weight in zip(fused(x), weights, strict=True):
        assert torch.equal(ours, x @ weight.T)
    report = quantize_model(fused, progress=False, fuse=True)
    assert report.fusion is not None
    assert report.fusion.groups == [QKV]
    assert "fused q_proj, k_proj, v_proj" in str(report)
    assert ", fused)" in repr(fused)


class Gated(nn.Module):
    def __init__(self, up: int = 48) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 48), nn.Linear(64, up)


class Whole(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, module in parts.items():
            setattr(self, name, module)


def reasons(model: nn.Module, **options: Any) -> list[str]:
    fusion = quantize_model(model, progress=False, fuse=True, **options).fusion
    assert fusion is not None
    assert str(fusion).count("not fused") == len(fusion.skipped)
    return [*fusion.skipped.values()]


@pytest.mark.filterwarnings("ignore:a weight in block_order=.flat.:UserWarning")
def test_reasons_not_to_fuse() -> None:
    assert reasons(Whole(self_attn=Attention(), encoder_attn=Attention())) == ["cross-attention: their inputs differ"]
    assert reasons(Attention(width=63), block_order="flat", format="nf4", block_size=16) == [
        "their blocks run on from one row into the next"
    ]
    assert reasons(Gated(), double_quant=True) == ["48 double-quantized scales are no whole number of 256"]
    model = Gated()
    model.gate_proj = nn.Linear(64, 47)
    assert reasons(model, block_size=64) == ["47 rows are no whole number of 16 bytes"]
    model = Gated()
    model.up_proj = nn.Linear(64, 48, bias=False)
    assert reasons(model) == ["their biases differ in kind"]
    model = Gated()
    model.gate_proj = QuantLinear.from_linear(model.gate_proj, "fp4")
    assert "packed as fp4" in reasons(model)[0]
    with torch.inference_mode():
        assert "inference mode" in reasons(Gated())[0]
    model = Gated()
    quantize_model(model, progress=False)
    model.share_memory()
    assert fuse_model(model).skipped == {("gate_proj", "up_proj"): "their weights are shared with other processes"}
    assert fuse_model(nn.Sequential(nn.Linear(2, 2))) == lowbit_rs.nn.Fusion()


@torch.no_grad()
def test_custom_codebooks_and_permutations_have_to_be_equal(products: list[int]) -> None:
    fused, plain = pair(codebook=(-1.0, 0.0, 1.0))
    x = torch.randn(2, 64)
    for model in (fused, plain):
        model.v_proj.weight_codebook.mul_(2)
    assert_same(fused, plain, x)
    assert 160 not in products
    for model in (fused, plain):
        for name in QKV:
            getattr(model, name).weight_codebook.copy_(torch.tensor([-1.0, 0.5, 1.0]))
    assert_same(fused, plain, x)
    assert 160 in products
    order = torch.randperm(64).to(torch.int32)
    model = Attention()
    for name, rows in zip(QKV, (96, 32, 32), strict=True):
        packed = quantize(torch.randn(rows, 64))
        tensors = packed.tensors() | {"permutation": order.clone()}
        permuted = PackedWeight.from_tensors(packed.spec, packed.shape, packed.dtype, tensors)
        setattr(model, name, QuantLinear.from_packed(permuted))
    alone = model(x)
    products.clear()
    assert fuse_model(model).groups == [QKV]
    for ours, theirs in zip(model(x), alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert products == [160]


@torch.no_grad()
def test_errors_are_those_of_a_layer() -> None:
    fused, _ = pair()
    with pytest.raises(lowbit_rs.InvalidArgument, match=r"x: got shape \[2, 63\]"):
        fused(torch.randn(2, 63))
    with pytest.raises(lowbit_rs.InvalidArgument, match=r"x: got torch\.float64"):
        fused(torch.randn(2, 64, dtype=torch.float64))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()
