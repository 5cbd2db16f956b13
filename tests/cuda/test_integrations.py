"""What stands on the operators, on a GPU: stacks of experts, permuted columns, models of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lowbit_rs
from lowbit_rs import LowbitConfig, PackedWeight
from lowbit_rs.functional import packed_linear_grouped
from lowbit_rs.nn.model import PACKED_MODULES
from tiny_models import inputs_of, load, logits_of, make_model


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("tokens", [(2, 0, 1), (20, 3, 17)])
def test_experts_are_their_matrices(double_quant: bool, tokens: tuple[int, ...]) -> None:
    stack = lowbit_rs.quantize(torch.randn(3, 24, 64).cuda(), "nf4", double_quant=double_quant)
    counts = torch.tensor(tokens, device="cuda")
    x = torch.randn(sum(tokens), 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    y = packed_linear_grouped(x, counts, stack.operands(), stack.shape, stack.scheme)
    parts = zip(x.detach().double().split(list(tokens)), stack.dequantize(torch.float32).double(), strict=True)
    wanted, size = (torch.cat(sums) for sums in zip(*((p @ w.T, p.abs() @ w.abs().T) for p, w in parts), strict=True))
    # One rounding of weights to bfloat16, fp32 sums, one rounding of the result.
    assert bool(((y.double() - wanted).abs() <= 2.0**-8 * (size + wanted.abs())).all())
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_permuted_columns(tokens: int) -> None:
    order = torch.randperm(128)
    plain = lowbit_rs.quantize(torch.randn(24, 128)[:, order], "int4", 32).to("cuda")
    permutation = order.to(torch.int32).cuda()
    packed = PackedWeight.from_tensors(
        plain.spec, plain.shape, plain.dtype, plain.tensors() | {"permutation": permutation}
    )
    x = torch.randn(tokens, 128, dtype=torch.float16, device="cuda")
    assert torch.equal(lowbit_rs.linear(x, packed), lowbit_rs.linear(x[:, order.cuda()], plain))
    assert torch.equal(packed.dequantize()[:, order.cuda()], plain.dequantize())


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_model_packed_while_it_loads_on_the_gpu(architecture: str, tmp_path: Path) -> None:
    make_model(architecture).save_pretrained(tmp_path / "float")
    config = LowbitConfig(double_quant=True)
    model = load(tmp_path / "float", quantization_config=config, device_map="cuda:0")
    same = load(tmp_path / "float", quantization_config=config)
    assert any(isinstance(module, PACKED_MODULES) for module in model.modules())
    for name, tensor in same.state_dict().items():
        if tensor.dtype in (torch.uint8, torch.int8):
            assert torch.equal(model.state_dict()[name].cpu(), tensor), name
    inputs = {name: tensor.cuda() for name, tensor in inputs_of(model).items()}
    with torch.no_grad():
        logits, wanted = model(**inputs).logits.cpu(), logits_of(same)
    assert (logits - wanted).norm() < 1e-4 * wanted.norm()  # fp32 on both, in other orders of summation
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed", device_map="cuda:0")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits.cpu(), logits)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize("second", ["cpu", 1])
def test_model_over_two_devices(second: str | int, architecture: str, tmp_path: Path) -> None:
    """The second layer elsewhere: on another GPU, or on the CPU, from where it comes for each call."""
    if second == 1 and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    make_model(architecture).save_pretrained(tmp_path / "float")
    config = LowbitConfig(double_quant=True)
    first = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    device_map: dict[str, str | int] = {**dict.fromkeys(first, 0), "model.layers.1": second}
    one = load(tmp_path / "float", quantization_config=config, device_map="cuda:0")
    one.save_pretrained(tmp_path / "packed")
    inputs = {name: tensor.cuda() for name, tensor in inputs_of(one).items()}
    with torch.no_grad():
        wanted = one(**inputs).logits
    for path, options in ((tmp_path / "float", {"quantization_config": config}), (tmp_path / "packed", {})):
        two = load(path, device_map=device_map, **options)
        assert any(isinstance(module, PACKED_MODULES) for module in two.model.layers[1].modules())
        with torch.no_grad():
            assert torch.equal(two(**inputs).logits.to(wanted.device), wanted)
