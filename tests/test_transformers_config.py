"""LowbitConfig: its options, its way to JSON and back, what it refuses; and registration whatever is imported first."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit_rs
from lowbit_rs import InvalidArgument, LowbitConfig
from tiny_models import make_model

CONFIGS: tuple[dict[str, Any], ...] = (
    {},
    {"format": "int8", "block_size": "row", "compute_dtype": torch.bfloat16, "activation": "int8"},
    {"double_quant": True, "skip_modules": ["lm_head", "*.0.*"], "embeddings": True},
    {"codebook": torch.tensor([-1.0, -0.1, 0.0, 0.3]), "scale_dtype": "float16", "signed_absmax": True},
    {"codebook": "fit", "block_size": 32},
    {"overrides": {"*.down_proj": {"block_size": 32, "scale_dtype": torch.bfloat16}, "head": {"codebook": (0.0, 1.0)}}},
    {"block_order": "flat", "nonfinite": "propagate", "fuse": True, "fuse_norms": True},
)


@pytest.mark.parametrize("options", CONFIGS, ids=lambda options: "-".join(options) or "default")
def test_round_trips(options: dict[str, Any], tmp_path: Path) -> None:
    config = LowbitConfig(**options)
    content = config.to_dict()
    assert content["quant_method"] == "lowbit"
    assert LowbitConfig.from_dict(json.loads(json.dumps(content))) == config
    assert LowbitConfig.from_dict(config.to_diff_dict()) == config
    assert json.loads(config.to_json_string()) == config.to_diff_dict()
    config.to_json_file(tmp_path / "config.json")
    assert LowbitConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == config
    assert copy.deepcopy(config) == config
    assert LowbitConfig(**content) == config
    assert config.to_diff_dict().keys() >= {"format", "quant_method", "format_version"}
    assert LowbitConfig().to_diff_dict() == {"format": "nf4", "format_version": 1, "quant_method": "lowbit"}


def test_tables_keep_their_bits() -> None:
    table = lowbit_rs.codebooks.nf4()
    config = LowbitConfig.from_dict(json.loads(LowbitConfig(codebook=table).to_json_string()))
    recipe = config.recipe("any")
    assert recipe.table is not None
    assert torch.equal(recipe.table, torch.from_numpy(table))


def test_overrides_are_merged_in_order() -> None:
    config = LowbitConfig(
        double_quant=True,
        overrides={
            "layers.*": {"block_size": 32},
            "o_proj": {"format": "int8", "compute_dtype": torch.float16, "activation": "int8"},
            "layers.1": {"codebook": [0.0, 1.0]},
        },
    )
    assert (config.recipe("q_proj").spec.format, config.recipe("q_proj").spec.block_size) == ("nf4", 64)
    assert config.recipe("layers.0.q_proj").spec.block_size == 32
    spec = config.recipe("layers.0.o_proj").spec
    assert (spec.format, spec.block_size, spec.double_quant) == ("int8", 32, True)
    assert config.recipe("layers.1.o_proj").spec.format == "custom"
    assert config.compute_dtype_of("layers.0.o_proj") == torch.float16
    assert config.compute_dtype_of("q_proj") is None
    assert (config.activation_of("layers.0.o_proj"), config.activation_of("q_proj")) == ("int8", "none")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"format": "nf5"}, "nf5"),
    "block size": ({"block_size": 48}, "block_size: got 48"),
    "flag": ({"double_quant": "yes"}, "double_quant: got 'yes', expected True or False"),
    "embeddings": ({"embeddings": 1}, "embeddings: got 1, expected True or False"),
    "dtype": ({"compute_dtype": torch.int8}, "compute_dtype: got torch.int8, expected torch.float32"),
    "name of a dtype": ({"scale_dtype": "float64"}, "scale_dtype: got 'float64', expected torch.float32"),
    "codebook": ({"codebook": [1.0]}, "codebook: got shape"),
    "name of a codebook": ({"codebook": "best"}, "codebook: got 'best', expected \"block-optimal\""),
    "codebook with a format": ({"format": "int8", "codebook": [0.0, 1.0]}, "format: got 'int8' with a codebook"),
    "activation": ({"activation": "int4"}, 'activation: got \'int4\', expected "none" or "int8"'),
    "skips": ({"skip_modules": [1]}, r"skip_modules: got \[1\], expected names"),
    "override": ({"overrides": {"a": {"skip": True}}}, r"overrides\['a'\]: got {'skip': True}, expected a mapping of"),
    "value of an override": ({"overrides": {"a": {"block_size": 5}}}, r"overrides\['a'\]: block_size: got 5"),
    "typing error": ({"blocksize": 32}, "LowbitConfig: got the option 'blocksize', expected block_size"),
    "unknown": ({"zzz": 1}, "LowbitConfig: got the option 'zzz', expected one of format, block_size"),
    "newer": ({"format_version": 2}, "format_version: got 2, expected 1 at most"),
    "version": ({"format_version": "1"}, "format_version: got '1'"),
    "method": ({"quant_method": "gptq"}, "quant_method: got 'gptq', expected \"lowbit\""),
    "both of load_in": ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit: got True, an option of bitsandb"),
    "load_in_8bit": ({"load_in_8bit": True}, 'load_in_8bit: .*, expected format="int8"'),
    "bitsandbytes": ({"bnb_4bit_quant_type": "nf4"}, 'bnb_4bit_quant_type: got .*, expected format="nf4" or "fp4"'),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        LowbitConfig(**options)
    assert isinstance(error.value, InvalidArgument)


def test_keys_of_others_in_a_saved_config_are_a_warning() -> None:
    with pytest.warns(UserWarning, match="ignored the unknown keys modules_to_not_convert"):
        config = LowbitConfig.from_dict({"quant_method": "lowbit", "format": "nf4", "modules_to_not_convert": []})
    assert config == LowbitConfig()


LOAD = """
model = AutoModelForCausalLM.from_pretrained({path!r})
print(type(model.model.layers[0].mlp.up_proj).__name__, model.hf_quantizer.quantization_config.format)
"""

ORDERS = {
    "first": "import lowbit_rs, peft\nfrom transformers import AutoModelForCausalLM",
    "last": "from transformers import AutoModelForCausalLM\nimport lowbit_rs, peft",
    "config first": "from lowbit_rs import LowbitConfig\nfrom transformers import AutoModelForCausalLM",
}


@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS)
def test_saved_models_load_whatever_is_imported_first(imports: str, tmp_path: Path) -> None:
    from tiny_models import load

    make_model("llama").save_pretrained(tmp_path / "float")
    load(tmp_path / "float", quantization_config=LowbitConfig(format="fp4")).save_pretrained(tmp_path / "packed")
    code = imports + LOAD.format(path=str(tmp_path / "packed"))
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "QuantLinear fp4\n"


HOOK = """
import sys
import lowbit_rs
from lowbit_rs._post_import import import_after
assert not any(name.startswith("transformers") for name in sys.modules)
import_after("colorsys", "no_such_module")
import_after("wave", "antigravity_of_lowbit")
before = list(sys.meta_path)
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import colorsys
assert [str(warning.message) for warning in caught] == ["no_such_module is off: No module named 'no_such_module'"]
assert len(sys.meta_path) == len(before) - 1
assert type(colorsys.__loader__).__name__ == type(colorsys.__spec__.loader).__name__ == "SourceFileLoader"
assert colorsys.rgb_to_hls(0, 0, 0) == (0.0, 0.0, 0.0)
"""


def test_note_in_the_import_system_goes_without_a_trace() -> None:
    run = subprocess.run([sys.executable, "-c", HOOK], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


OLD = """
import importlib.metadata, warnings
real = importlib.metadata.version
importlib.metadata.version = lambda name: "4.57.0" if name == "transformers" else real(name)
import lowbit_rs
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import transformers.quantizers.auto as auto
print([str(warning.message) for warning in caught if "lowbit" in str(warning.message)])
print("lowbit" in auto.AUTO_QUANTIZER_MAPPING)
"""


def test_transformers_that_is_too_old_is_named() -> None:
    run = subprocess.run([sys.executable, "-c", OLD], capture_output=True, text=True, check=False)
    assert "transformers: got version 4.57.0, expected 5.17 or newer" in run.stdout, run.stderr
    assert run.stdout.endswith("False\n")
