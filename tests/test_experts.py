"""QuantExperts and stacks of packed matrices: transformers' fused experts in 4 and 8 bits."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.integrations.moe import use_experts_implementation
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import lowbit_rs
from lowbit_rs import InvalidArgument, Unsupported
from lowbit_rs.functional import packed_linear_grouped
from lowbit_rs.nn import QuantExperts
from lowbit_rs.nn.experts import stack_names

EXPERTS, HIDDEN, CHOICES = 4, 48, 2

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"format": "uint4", "block_size": 32, "double_quant": True, "scale_dtype": torch.bfloat16},
    {"format": "int8", "block_size": "row"},
    {"codebook": (-1.0, -0.25, 0.0, 0.5, 1.0)},
)


@use_experts_implementation(has_gate=False)
class PlainExperts(nn.Module):
    """Experts without a gate and with an odd number of inputs."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.num_experts = config.num_local_experts
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, 40, HIDDEN))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, HIDDEN, 40))
        self.act_fn = nn.ReLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        raise NotImplementedError


def make_experts(kind: type[nn.Module]) -> nn.Module:
    """Experts with weights, run by transformers' own batched implementation."""
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "num_experts_per_tok": CHOICES, "num_local_experts": EXPERTS}
    config: Any
    if kind is Qwen3MoeExperts:
        config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=40, num_experts=EXPERTS)
    elif kind is GptOssExperts:
        config = GptOssConfig(intermediate_size=40, **sizes)
    else:
        config = MixtralConfig(intermediate_size=40, **sizes)
    config._experts_implementation = "batched_mm"
    experts = kind(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts.eval()


@pytest.fixture(params=[MixtralExperts, Qwen3MoeExperts, GptOssExperts, PlainExperts], ids=lambda kind: kind.__name__)
def experts(request: pytest.FixtureRequest) -> nn.Module:
    return make_experts(request.param)


def routed(tokens: int = 9, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, chosen experts (never number 2), weights."""
    scores = torch.randn(tokens, EXPERTS)
    scores[:, 2] = -torch.inf
    weights, index = scores.softmax(-1).topk(CHOICES)
    return torch.randn(tokens, HIDDEN, dtype=dtype), index, weights


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
def test_result_is_that_of_the_dequantized_experts(experts: nn.Module, options: dict[str, Any]) -> None:
    packed = QuantExperts.from_experts(experts, **options)
    x = routed()
    torch.testing.assert_close(packed(*x), packed.to_experts()(*x), rtol=1e-5, atol=1e-5)
    assert packed(*x).equal(packed(*x))
    assert not packed(*x).equal(experts(*x))


def test_low_precision_activations(experts: nn.Module) -> None:
    packed = QuantExperts.from_experts(experts.bfloat16())
    x = routed(dtype=torch.bfloat16)
    assert packed(*x).dtype == torch.bfloat16
    got, expected = packed(*x).float(), packed.to_experts()(*x).float()
    # A handful of roundings to bfloat16 on either side, each of 2^-9 of a value at most.
    assert (got - expected).norm() <= 2**-6 * expected.norm()


def test_activations_may_be_rounded(experts: nn.Module) -> None:
    packed = QuantExperts.from_experts(experts, "int8", "row", activation="int8")
    plain, x = QuantExperts.from_experts(experts, "int8", "row"), routed()
    assert "activation=int8" in repr(packed)
    got = packed(*x)
    assert not got.equal(plain(*x))
    assert copy.deepcopy(packed)(*x).equal(got)
    with pytest.raises(InvalidArgument, match="activation: got 'int4'"):
        QuantExperts.from_experts(experts, activation="int4")
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})})
    lowbit_rs.quantize_model(model, "int8", "row", activation="int8", progress=False)
    assert model.get_submodule("mlp.experts")(*x).equal(got)


def test_experts_come_back_as_they_were_but_for_rounding(experts: nn.Module) -> None:
    packed = QuantExperts.from_experts(experts, "int8", block_size=16)
    back = packed.to_experts()
    assert type(back) is type(experts)
    assert {name: tensor.shape for name, tensor in back.state_dict().items()} == {
        name: tensor.shape for name, tensor in experts.state_dict().items()
    }
    for name, tensor in experts.state_dict().items():
        # Half a step of the block's scale, which is at most the largest weight over 127.
        torch.testing.assert_close(back.state_dict()[name], tensor, rtol=0, atol=float(tensor.abs().max()) / 127)
    assert vars(back).keys() == vars(experts).keys()


def test_tokens_of_other_ranks_add_nothing(experts: nn.Module) -> None:
    packed = QuantExperts.from_experts(experts)
    x, index, weights = routed()
    elsewhere = index.clone()
    elsewhere[3:] = EXPERTS
    weights[3:] = 0.0
    assert packed(x, elsewhere, weights)[:3].equal(packed(x[:3], index[:3], weights[:3]))
    assert not packed(x, elsewhere, weights)[3:].any()


def test_gradient_reaches_tokens_and_routing(experts: nn.Module) -> None:
    packed = QuantExperts.from_experts(experts)
    gradients = []
    for module in (packed, packed.to_experts()):
        torch.manual_seed(1)
        x, index, weights = routed()
        x.requires_grad_()
        weights = weights.detach().requires_grad_()
        module(x, index, weights).square().sum().backward()
        gradients.append((x.grad, weights.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)
    assert all(parameter.grad is None for name, parameter in packed.named_parameters() if "bias" not in name)


def test_state_dict_copies_and_casts(experts: nn.Module) -> None:
    packed = QuantExperts.from_experts(experts, double_quant=True)
    first = stack_names(experts)[0]
    assert {first, f"{first}_scale", f"{first}_scale_2", f"{first}_scale_offset"} <= packed.state_dict().keys()
    x = routed()
    expected = packed(*x)
    other = QuantExperts.from_experts(make_experts(type(experts)), double_quant=True)
    other.load_state_dict(packed.state_dict())
    file = io.BytesIO()
    if type(experts) is not PlainExperts:  # a class of this file, which pytest imports under no name
        torch.save(packed, file)
        file.seek(0)
        assert torch.load(file, weights_only=False)(*x).equal(expected)
    assert other(*x).equal(expected)
    assert copy.deepcopy(packed)(*x).equal(expected)
    halved = packed.half()
    assert halved.stacks["down_proj"].scale.dtype == torch.uint8
    assert halved.stacks["down_proj"].scale_2 is not None
    assert halved.stacks["down_proj"].scale_2.dtype == torch.float32
    assert halved.to_experts().get_parameter("down_proj").dtype == torch.float16


def test_another_format_is_refused() -> None:
    experts = make_experts(MixtralExperts)
    nf4, int8 = QuantExperts.from_experts(experts), QuantExperts.from_experts(experts, "int8")
    with pytest.raises(RuntimeError, match=r"gate_up_proj: got torch.float32 in gate_up_proj, expected torch.int8"):
        int8.load_state_dict({**int8.state_dict(), "gate_up_proj": experts.get_parameter("gate_up_proj").detach()})
    with pytest.raises(RuntimeError, match=r"got torch\.int8"):
        nf4.load_state_dict(int8.state_dict())
    with pytest.raises(InvalidArgument, match="experts: got Linear, expected a module of stacked experts"):
        QuantExperts.from_experts(nn.Linear(2, 2))
    with pytest.raises(Unsupported, match="experts whose blocks run on"):
        QuantExperts.from_experts(experts, block_order="flat")
    with pytest.raises(InvalidArgument, match=r"packed: got \['down_proj'\]"):
        QuantExperts.from_packed(experts, {"down_proj": nf4.stacks["down_proj"]})


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
def test_matrix_of_a_stack(options: dict[str, Any]) -> None:
    for shape in ((3, 5, 70), (3, 16, 1024)):  # the scales of a matrix fill groups of 256, or not
        packed = lowbit_rs.quantize(torch.randn(shape), **options)
        for index in (0, 2, -1):
            assert packed[index].dequantize().equal(packed.dequantize()[index])
    assert packed[1].data.data_ptr() == packed.data[1].data_ptr()
    assert packed[1].spec == packed.spec


def test_no_matrix_of_a_stack() -> None:
    packed = lowbit_rs.quantize(torch.randn(3, 5, 70))
    for index in (3, -4, 1.0, None):
        with pytest.raises(InvalidArgument, match=f"index: got {index}, expected a matrix of 3"):
            packed[index]  # type: ignore[index]
    with pytest.raises(InvalidArgument, match=r"index: got 0 of a weight \[5, 70\], expected a stack"):
        packed[0][0]
    with pytest.raises(Unsupported, match="blocks run on"):
        lowbit_rs.quantize(torch.randn(3, 5, 70), block_order="flat")[0]


# opcheck itself reads .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
def test_grouped_products_in_torch(options: dict[str, Any]) -> None:
    packed = lowbit_rs.quantize(torch.randn(3, 5, 70), **options)
    weight: list[Any] = [list(packed.tensors().values()), list(packed.shape), *packed.scheme]
    counts = torch.tensor([2, 0, 1])
    ops = torch.ops.lowbit_rs
    for activation in ("none", "int8"):
        torch.library.opcheck(
            ops.linear_grouped.default, (torch.randn(4, 70, requires_grad=True), counts, *weight, activation)
        )
    torch.library.opcheck(
        ops.linear_grouped_grad_input.default, (torch.randn(4, 5, requires_grad=True), counts, *weight)
    )
    x = torch.randn(4, 70)
    y = packed_linear_grouped(x, counts, weight[0], weight[1], packed.scheme)
    rounded = packed_linear_grouped(x, counts, weight[0], weight[1], packed.scheme, activation="int8")
    for own, index in ((slice(0, 2), 0), (slice(2, 3), 2)):
        assert y[own].equal(lowbit_rs.linear(x[own], packed[index]))
        assert rounded[own].equal(lowbit_rs.linear(x[own], packed[index], activation="int8"))
    assert not y[3].any()
    for arguments, message in (
        ((x[None], counts), r"x: got shape \[1, 4, 70\]"),
        ((x[:, 1:], counts), r"x: got shape \[4, 69\]"),
        ((x, counts[1:]), r"counts: got torch.int64 \[2\], expected torch.int64 \[3\]"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            packed_linear_grouped(*arguments, weight[0], weight[1], packed.scheme)


def test_experts_in_one_graph() -> None:
    torch._dynamo.reset()
    packed = QuantExperts.from_experts(make_experts(MixtralExperts))
    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 8):
        x = routed(tokens)
        torch.testing.assert_close(compiled(*x), packed(*x), rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


class Mixture(nn.Module):
    """A layer as transformers writes them: a router beside its experts."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.experts = experts
        self.shared = nn.Linear(HIDDEN, HIDDEN)


class Strangers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 8, 8))


def test_quantize_model_packs_experts_and_reports_them(experts: nn.Module) -> None:
    model = nn.Sequential(Mixture(experts), Mixture(Strangers()))
    x = routed()
    report = lowbit_rs.quantize_model(model, "int8", progress=False)
    first, second = stack_names(experts)
    assert [row.name for row in report.rows] == [
        f"0.experts.{first}",
        f"0.experts.{second}",
        "0.shared",
        "1.shared",
    ]
    assert report.rows[1].shape == (EXPERTS, HIDDEN, 40)
    assert all(row.relative_error is not None and 0 < row.relative_error < 0.02 for row in report.rows)
    assert report.skipped["0.gate"] == report.skipped["1.gate"] == "router of a mixture of experts"
    assert "does not run experts" in report.skipped["1.experts.gate_up_proj"]
    packed = model.get_submodule("0.experts")
    assert isinstance(packed, QuantExperts)
    expected = packed.to_experts()(*x)
    lowbit_rs.dequantize_model(model)
    assert model.get_submodule("0.experts")(*x).equal(expected)
    assert not any(isinstance(module, QuantExperts) for module in model.modules())


def test_experts_can_be_skipped_and_are_packed_once() -> None:
    model = nn.Sequential(Mixture(make_experts(MixtralExperts)))
    lowbit_rs.quantize_model(model, skip=["experts"], progress=False)
    assert type(model.get_submodule("0.experts")) is MixtralExperts
    lowbit_rs.quantize_model(model, progress=False)
    with pytest.warns(UserWarning, match="0.experts: already packed"):
        lowbit_rs.quantize_model(model, progress=False)
