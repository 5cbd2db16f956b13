"""Packed models at work: device maps and offload, compiled generation, pipelines."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights
from torch import nn
from transformers import CompileConfig, LlamaForCausalLM, TextStreamer, pipeline
from transformers.integrations.accelerate import compute_module_sizes

import lowbit_rs
from lowbit_rs import LowbitConfig, QuantLinear, Unsupported
from lowbit_rs.nn import QuantExperts
from lowbit_rs.packed import state_key
from tiny_models import LAYERS, inputs_of, load, logits_of, make_model, make_tokenizer

#: accelerate's note that saving brings offloaded weights into memory.
offloaded = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")


@pytest.fixture(params=["llama", "mixtral"])
def architecture(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def float_path(architecture: str, tmp_path: Path) -> Path:
    make_model(architecture).save_pretrained(tmp_path / "float", max_shard_size="100kB")
    return tmp_path / "float"


@pytest.fixture
def packed(float_path: Path) -> Any:
    return load(float_path, quantization_config=LowbitConfig(double_quant=True))


@pytest.fixture
def packed_path(packed: Any, tmp_path: Path) -> Path:
    packed.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def layers_on(*devices: str) -> dict[str, str]:
    """A device map with the layers of a model on ``devices`` and everything else on the first one."""
    layers = {f"model.layers.{index}": device for index, device in enumerate(devices)}
    return {
        "model.embed_tokens": devices[0],
        "model.norm": devices[0],
        "model.rotary_emb": devices[0],
        "lm_head": devices[0],
        **layers,
    }


def test_device_map_of_one_device(float_path: Path, packed: Any) -> None:
    for device_map in ("cpu", "auto", {"": "cpu"}):
        model = load(float_path, quantization_config=LowbitConfig(double_quant=True), device_map=device_map)
        assert logits_of(model).equal(logits_of(packed))


@offloaded
def test_disk_offload_of_a_packed_model(packed: Any, packed_path: Path, tmp_path: Path) -> None:
    """Its tensors are read from the checkpoint itself, one layer at a time."""
    model = load(packed_path, device_map=layers_on("cpu", "disk"), offload_folder=tmp_path / "offload")
    layer = model.model.layers[1].self_attn.q_proj
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    assert model.model.layers[0].self_attn.q_proj.weight.device.type == "cpu"
    assert logits_of(model).equal(logits_of(packed))
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    assert model.num_parameters() == packed.num_parameters()
    prompt = inputs_of(model)["input_ids"]
    assert model.generate(prompt, max_new_tokens=5, do_sample=False).equal(
        packed.generate(prompt, max_new_tokens=5, do_sample=False)
    )
    model.save_pretrained(tmp_path / "again")
    assert logits_of(load(tmp_path / "again")).equal(logits_of(packed))


def test_disk_offload_while_packing_is_refused(float_path: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"modules on disk: not supported: .*Save the packed model first"):
        load(
            float_path,
            quantization_config=LowbitConfig(),
            device_map=layers_on("cpu", "disk"),
            offload_folder=tmp_path / "offload",
        )
    with pytest.raises(Unsupported, match="modules on disk"):
        load(
            float_path,
            quantization_config=LowbitConfig(),
            device_map="auto",
            max_memory={"cpu": 60_000},
            offload_folder=tmp_path / "offload",
        )


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_hooks_of_accelerate(packed: Any, tmp_path: Path, where: str) -> None:
    """Weights wait elsewhere and come to the executing device for their layer's call, as CPU offload of a GPU does."""
    expected = logits_of(packed)
    if where == "cpu":
        cpu_offload(packed, execution_device=torch.device("cpu"))
    else:
        disk_offload(packed, str(tmp_path / "offload"), execution_device=torch.device("cpu"))
    layer = packed.model.layers[1].self_attn.q_proj
    assert layer.weight.is_meta
    assert layer.weight_scale_2.is_meta
    assert logits_of(packed).equal(expected)
    assert layer.weight.is_meta


def test_memory_is_estimated_as_it_will_be(packed: Any) -> None:
    """The size of a module on the meta device is that of its codes and scales, as soon as packing is planned."""
    from lowbit_rs.integrations.transformers import LowbitQuantizer

    with init_empty_weights(include_buffers=False):
        model: Any = type(packed)(packed.config)
    quantizer = LowbitQuantizer(LowbitConfig(double_quant=True), pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    sizes, _ = compute_module_sizes(model, quantizer)
    for name, module in packed.named_modules():
        tensors = [*module.parameters(), *module.buffers()]
        assert sizes.get(name, 0) == sum(tensor.nbytes for tensor in tensors), name

    largest = max(row.bytes_before for row in quantizer.report.rows)
    limits: Any = {0: 10**9, "cpu": 10**6, "disk": 0, 1: 10}
    room: Any = quantizer.adjust_max_memory(limits)
    assert room == {0: 10**9 - largest, "cpu": 10**6 - largest, "disk": 0, 1: 0}
    done = LowbitQuantizer(LowbitConfig(), pre_quantized=True)
    assert done.adjust_max_memory(limits) == limits


@offloaded
def test_automatic_map_puts_on_a_device_what_fits(packed: Any, packed_path: Path, tmp_path: Path) -> None:
    layer = sum(parameter.nbytes for parameter in packed.model.layers[0].parameters())
    rest = packed.get_memory_footprint() - LAYERS * layer
    model = load(
        packed_path,
        device_map="auto",
        max_memory={"cpu": rest + layer + layer // 2},
        offload_folder=tmp_path / "offload",
    )
    assert "disk" in model.hf_device_map.values()
    assert logits_of(model).equal(logits_of(packed))


def test_moving_takes_every_tensor_along(packed: Any) -> None:
    moved = copy.deepcopy(packed).to("meta")
    assert {tensor.device.type for tensor in moved.state_dict().values()} == {"meta"}
    assert {name: tensor.dtype for name, tensor in moved.state_dict().items()} == {
        name: tensor.dtype for name, tensor in packed.state_dict().items()
    }


def test_copies_and_pickles(packed: Any) -> None:
    expected = logits_of(packed)
    assert logits_of(copy.deepcopy(packed)).equal(expected)
    assert copy.deepcopy(packed).num_parameters() == packed.num_parameters()
    unpickled = pickle.loads(pickle.dumps(packed))
    assert logits_of(unpickled).equal(expected)
    assert unpickled.num_parameters() == packed.num_parameters()


def test_generation_compiles_into_one_graph(packed: Any) -> None:
    """A static cache and a forward compiled with fullgraph, as generate does by itself where it finds a GPU."""
    assert packed.hf_quantizer.is_compileable
    torch._dynamo.reset()
    prompt = inputs_of(packed)["input_ids"]
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    expected = packed.generate(prompt, disable_compile=True, **settings)
    compile_config: Any = CompileConfig(fullgraph=True, backend="aot_eager")
    compile_config.mode = None  # of inductor alone
    compile_config._compile_all_devices = True
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert packed.generate(prompt, compile_config=compile_config, **settings).equal(expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


def test_pipeline(packed: Any, packed_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(packed_path)
    for model in (packed, str(packed_path)):
        generate = pipeline("text-generation", model, tokenizer=tokenizer, dtype=torch.float32, device="cpu")
        text = generate("w5 w6 w7", max_new_tokens=4, do_sample=False)[0]["generated_text"]
        prompt = tokenizer("w5 w6 w7", return_tensors="pt").input_ids
        expected = packed.generate(prompt, max_new_tokens=4, do_sample=False)[0]
        assert text.replace(" ", "") == str(tokenizer.decode(expected)).replace(" ", "")


def test_pipeline_packs_what_it_loads(float_path: Path) -> None:
    make_tokenizer().save_pretrained(float_path)
    generate = pipeline(
        "text-generation",
        str(float_path),
        model_kwargs={"quantization_config": LowbitConfig(), "dtype": torch.float32},
        device="cpu",
    )
    assert any(isinstance(module, QuantLinear | QuantExperts) for module in generate.model.modules())
    assert generate("w5", max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("architecture", ["llama"], indirect=True)
def test_streaming_gives_the_tokens_of_generate(packed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer()
    prompt = tokenizer("w5 w6", return_tensors="pt").input_ids
    packed.generate(prompt, max_new_tokens=5, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True))
    expected = packed.generate(prompt, max_new_tokens=5, do_sample=False)[0, 2:]
    assert "".join(capsys.readouterr().out.split()) == "".join(str(tokenizer.decode(expected)).split())


@pytest.mark.parametrize("architecture", ["llama"], indirect=True)
def test_loaded_and_packed_in_memory_are_the_same_model(packed: Any) -> None:
    model: Any = make_model("llama")
    lowbit_rs.quantize_model(model, double_quant=True, progress=False)
    assert logits_of(model).equal(logits_of(packed))
    prompt = inputs_of(model)["input_ids"]
    assert model.generate(prompt, max_new_tokens=8, do_sample=False).equal(
        packed.generate(prompt, max_new_tokens=8, do_sample=False)
    )


@pytest.mark.parametrize("architecture", ["llama"], indirect=True)
def test_load_state_dict_takes_packed_and_float_weights(packed: Any) -> None:
    other = LlamaForCausalLM(packed.config).eval()
    lowbit_rs.quantize_model(other, double_quant=True, progress=False)
    other.load_state_dict(packed.state_dict())
    assert logits_of(other).equal(logits_of(packed))
    other.load_state_dict(make_model("llama").state_dict(), strict=False)
    assert logits_of(other).equal(logits_of(packed))


def test_every_packed_tensor_is_a_frozen_parameter_under_its_own_name(packed: Any) -> None:
    parameters = dict(packed.named_parameters())
    layer = packed.model.layers[0].self_attn.q_proj
    for field in layer.packed.tensors():
        name = "model.layers.0.self_attn.q_proj." + state_key("weight", field)
        assert type(parameters[name]) is nn.Parameter
        assert not parameters[name].requires_grad
        assert name in packed.state_dict()
