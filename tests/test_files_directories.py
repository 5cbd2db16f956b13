"""Model directories; and outputs that are complete or absent, whatever happens."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowbit_rs
from lowbit_rs import InvalidArgument, PackedWeight
from lowbit_rs.files import dequantize_file, inspect, load_packed, quantize_file
from lowbit_rs.files.safetensors_stream import SafetensorsWriter

SHARDS = {
    "model-00001-of-00002.safetensors": ("model.embed_tokens.weight", "model.layers.0.up_proj.weight"),
    "model-00002-of-00002.safetensors": ("model.layers.1.up_proj.weight", "model.norm.weight", "lm_head.weight"),
}
INDEX = "model.safetensors.index.json"


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (20, 48),
        "model.layers.0.up_proj.weight": (80, 48),
        "model.layers.1.up_proj.weight": (80, 48),
        "model.norm.weight": (48,),
        "lm_head.weight": (20, 48),
    }
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def write_index(directory: Path, weight_map: dict[str, Any]) -> None:
    total = sum(tensor.nbytes for tensor in tensors().values())
    index = {"metadata": {"total_size": total, "total_parameters": 7}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory as Hugging Face writes it: two shards, an index, other files, one of them a link."""
    directory = tmp_path / "model"
    (directory / "onnx").mkdir(parents=True)
    for shard, names in SHARDS.items():
        save_file({name: tensors()[name] for name in names}, directory / shard, {"format": "pt"})
    write_index(directory, {name: shard for shard, names in SHARDS.items() for name in names})
    (directory / "config.json").write_text('{ "model_type": "llama",\n"tie_word_embeddings": false}')
    (directory / "tokenizer.model").write_bytes(bytes(range(256)) * 40_000)
    (directory / "onnx" / "model.onnx").write_bytes(b"\0\1")
    (tmp_path / "blob").write_text("from a cache")
    (directory / "README.md").symlink_to(tmp_path / "blob")
    return directory


#: But for config.json, in which a quantized directory names the method.
OTHERS = ("README.md", "onnx/model.onnx", "tokenizer.model")


def files_of(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}


def test_sharded_directory(model: Path, tmp_path: Path) -> None:
    packed, unpacked = tmp_path / "packed", tmp_path / "unpacked"
    summary = quantize_file(model, packed)
    assert summary.converted == ("model.layers.0.up_proj.weight", "model.layers.1.up_proj.weight")
    assert {str(path) for path in summary.copied_files} == set(OTHERS)
    assert files_of(packed) == files_of(model)
    for name in OTHERS:
        assert (packed / name).read_bytes() == (model / name).read_bytes()
    config = json.loads((packed / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "lowbit", "format_version": 1}
    assert config == json.loads((model / "config.json").read_text())
    assert inspect(packed).foreign_scheme is None

    stored = {shard: load_file(packed / shard) for shard in SHARDS}
    index = json.loads((packed / INDEX).read_text())
    assert index["weight_map"] == {name: shard for shard, content in stored.items() for name in content}
    assert index["weight_map"]["model.layers.1.up_proj.weight_scale"] == "model-00002-of-00002.safetensors"
    sizes = [tensor.nbytes for content in stored.values() for tensor in content.values()]
    assert index["metadata"] == {"total_size": sum(sizes), "total_parameters": 7}
    assert summary.bytes_after == sum(sizes)

    loaded = load_packed(packed)
    expected: dict[str, PackedWeight | Tensor] = dict(tensors())
    for name in summary.converted:
        expected[name] = lowbit_rs.quantize(tensors()[name])
    assert loaded.keys() == expected.keys()
    for name, other in expected.items():
        value = loaded[name]
        if isinstance(value, PackedWeight) or isinstance(other, PackedWeight):
            assert value == other
        else:
            assert torch.equal(value, other)

    dequantize_file(packed, unpacked)
    assert files_of(unpacked) == files_of(model)
    assert json.loads((unpacked / "config.json").read_text()) == json.loads((model / "config.json").read_text())
    again = json.loads((unpacked / INDEX).read_text())
    before = json.loads((model / INDEX).read_text())
    assert again["weight_map"] == before["weight_map"]
    assert again["metadata"] == before["metadata"]


def test_directory_with_one_file(tmp_path: Path) -> None:
    for name in ("model.safetensors", "diffusion_pytorch_model.safetensors"):
        directory = tmp_path / name.partition(".")[0]
        directory.mkdir()
        save_file(tensors(), directory / name)
        quantize_file(directory, tmp_path / f"{name}-packed")
        assert files_of(tmp_path / f"{name}-packed") == {name}


def test_second_weights_beside_the_model_are_copied(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    save_file(tensors(), source / "model.safetensors")
    save_file(tensors(), source / "consolidated.safetensors")
    quantize_file(source, tmp_path / "packed")
    copied = (tmp_path / "packed" / "consolidated.safetensors").read_bytes()
    assert copied == (source / "consolidated.safetensors").read_bytes()
    assert len(inspect(tmp_path / "packed").tensors) == len(tensors())


def test_links_in_a_circle_are_followed_once(model: Path, tmp_path: Path) -> None:
    (model / "loop").symlink_to(model)
    quantize_file(model, tmp_path / "packed")
    assert files_of(tmp_path / "packed") == files_of(model) - {"loop"}


BROKEN_DIRECTORIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (
        lambda path: [file.rename(file.with_suffix(".bin")) for file in path.glob("*safetensors*")],
        r"model: got no safetensors file, expected model.safetensors, or shards with model.safetensors.index.json",
    ),
    "no index": (lambda path: (path / INDEX).unlink(), r"got 2 safetensors files and no index"),
    "two sets": (
        lambda path: save_file(tensors(), path / "model.safetensors"),
        r"got several sets of weights \(model.safetensors.index.json\), expected one index, or model.safetensors alone",
    ),
    "shard missing": (
        lambda path: (path / "model-00001-of-00002.safetensors").unlink(),
        r"got 'model-00001-of-00002.safetensors', which does not exist, expected a file beside it",
    ),
    "shard outside": (
        lambda path: write_index(path, {"a": "../model.safetensors"}),
        r"'a': got '../model.safetensors', expected the name of a safetensors file beside the index",
    ),
    "shard no string": (
        lambda path: write_index(path, {"a": 3}),
        r"'a': got 3, expected the name of a safetensors file",
    ),
    "map": (lambda path: (path / INDEX).write_text('{"weight_map": 3}'), r"weight_map: got 3, expected an object"),
    "index": (lambda path: (path / INDEX).write_text("{"), r"index.json: got Expecting .*, expected a JSON object"),
    "metadata": (
        lambda path: (path / INDEX).write_text(
            json.dumps(
                {
                    "metadata": 3,
                    "weight_map": dict.fromkeys(SHARDS["model-00001-of-00002.safetensors"], "x.safetensors"),
                }
            )
        ),
        r"got 'x.safetensors', which does not exist",
    ),
    "tensor missing": (
        lambda path: write_index(path, {"a": "model-00001-of-00002.safetensors"}),
        r"model-00001-of-00002.safetensors: got no tensor 'a', expected the tensors that the index lists",
    ),
    "tensor twice": (
        lambda path: save_file(tensors(), path / "model-00002-of-00002.safetensors"),
        r"model-00002-of-00002.safetensors: got the tensor '.*', also in model-00001.*, expected distinct names",
    ),
    "config": (lambda path: (path / "config.json").write_text("[]"), r"config.json: got \[\], expected a JSON object"),
    "pipe": (lambda path: os.mkfifo(path / "pipe"), r"pipe: got a special file or a broken link, expected a file that"),
    "broken link": (lambda path: (path / "link").symlink_to("none"), r"link: got a special file or a broken link"),
    "truncated shard": (
        lambda path: os.truncate(path / "model-00002-of-00002.safetensors", 3000),
        r"model-00002-of-00002.safetensors: got \d+ bytes of data: the file is truncated, expected \d+",
    ),
}


def test_config_may_hold_what_json_does_not(model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text('{"model_type": "mamba2", "time_step_limit": [0.0, Infinity]}')
    quantize_file(model, tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["time_step_limit"] == [0.0, float("inf")]


@pytest.mark.parametrize("text", ["{}", '{"sample_rate": 16000}'])
def test_config_of_something_else_stays_as_it_is(text: str, model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text(text)
    quantize_file(model, tmp_path / "packed")
    assert (tmp_path / "packed" / "config.json").read_text() == text


@pytest.mark.parametrize(("damage", "message"), BROKEN_DIRECTORIES.values(), ids=BROKEN_DIRECTORIES)
def test_broken_directory_is_refused(
    model: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(model)
    with pytest.raises(InvalidArgument, match=message):
        quantize_file(model, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


QUANTIZED = {
    "model.layers.0.up_proj.weight.absmax": r"quantized by bitsandbytes, as the tensor '.*absmax' shows",
    "model.layers.0.up_proj.weight.quant_state.bitsandbytes__nf4": r"bitsandbytes, as the tensor",
    "model.layers.0.up_proj.SCB": r"quantized by bitsandbytes",
    "model.layers.0.up_proj.qweight": r"quantized by GPTQ or AWQ, as the tensor 'model.layers.0.up_proj.qweight' shows",
    "model.layers.0.up_proj.weight_packed": r"quantized by compressed-tensors",
    "model.layers.0.experts.gate_up_proj_blocks": r"quantized by MXFP4",
    "model.layers.0.up_proj.weight_scale_inv": r"quantized by an 8-bit float or integer scheme",
}


@pytest.mark.parametrize(("name", "message"), QUANTIZED.items())
def test_foreign_quantized_file_is_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors() | {name: torch.zeros(4, dtype=torch.uint8)}, path)
    with pytest.raises(InvalidArgument, match=message):
        quantize_file(path, tmp_path / "out.safetensors")
    with pytest.raises(InvalidArgument, match=message + r".*, expected what lowbit quantize wrote"):
        dequantize_file(path, tmp_path / "out.safetensors")
    assert inspect(path).foreign_scheme is not None


def test_quantized_sources_are_refused(model: Path, tmp_path: Path) -> None:
    quantize_file(model, tmp_path / "packed")
    with pytest.raises(
        InvalidArgument, match=r"packed, quantized by lowbit_rs, as its header says, expected a checkpoint"
    ):
        quantize_file(tmp_path / "packed", tmp_path / "again")
    with pytest.raises(InvalidArgument, match=r"model, which is not quantized, expected what lowbit quantize wrote"):
        dequantize_file(model, tmp_path / "again")
    (model / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    with pytest.raises(InvalidArgument, match=r"quantized by awq, as quantization_config in config.json says"):
        quantize_file(model, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_source_without_linear_weights_is_refused(tmp_path: Path) -> None:
    save_file({"norm.weight": torch.ones(3), "ids": torch.zeros(2, 2, dtype=torch.int64)}, tmp_path / "a.safetensors")
    with pytest.raises(
        InvalidArgument, match=r"with no tensor to quantize \(1 dtype I64, 1 1-D\), expected linear weights"
    ):
        quantize_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_destinations_that_are_refused(model: Path, tmp_path: Path) -> None:
    source = model / next(iter(SHARDS))
    linked = tmp_path / "linked.safetensors"
    linked.hardlink_to(source)
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("text")
    for destination, message in {
        tmp_path / "none" / "out": r"none/out, expected a path in a directory that exists",
        source: r"expected a path apart from the source",
        linked: r"expected a path apart from the source",
        tmp_path / "blob": r"blob, which exists, expected a new path, or force",
        other: r"other, which exists",
    }.items():
        with pytest.raises(InvalidArgument, match=message):
            quantize_file(source, destination)
    for place in (model, model / "inside", tmp_path):
        with pytest.raises(InvalidArgument, match=r"expected a path apart from the source"):
            quantize_file(model, place, force=True)
    with pytest.raises(InvalidArgument, match=r"other, which is no file, expected a file to replace"):
        quantize_file(source, other, force=True)
    with pytest.raises(InvalidArgument, match=r"blob, which is no directory, expected a directory to replace"):
        quantize_file(model, tmp_path / "blob", force=True)
    with pytest.raises(InvalidArgument, match=r"other, which holds no safetensors file, expected a model directory"):
        quantize_file(model, other, force=True)
    assert (other / "precious").read_text() == "text"
    assert (tmp_path / "blob").read_text() == "from a cache"
    assert load_file(source)


def test_force_replaces(model: Path, tmp_path: Path) -> None:
    source, file, directory = model / next(iter(SHARDS)), tmp_path / "out.safetensors", tmp_path / "out"
    for format in ("nf4", "int8"):
        quantize_file(source, file, format, force=True)
        quantize_file(model, directory, format, force=True)
        for path in (file, directory):
            formats = {tensor.format for tensor in inspect(path).tensors if tensor.format}
            assert len(formats) == 1
            assert formats.pop().startswith(format)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "blob", "out.safetensors", "out"}


def listing(directory: Path) -> set[str]:
    return {str(path) for path in directory.rglob("*")}


@pytest.fixture(params=["file", "directory"])
def source(request: pytest.FixtureRequest, model: Path) -> Path:
    return model if request.param == "directory" else model / "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
def test_failure_at_any_write_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, existing: bool
) -> None:
    out = tmp_path / "out"
    if existing:
        quantize_file(source, out, "int8")
    before, content = listing(tmp_path), out.read_bytes() if out.is_file() else b""
    write, writes = SafetensorsWriter._write_at, 0

    def failing(self: SafetensorsWriter, position: int, data: memoryview) -> None:
        nonlocal writes
        writes += 1
        if writes == allowed + 1:
            write(self, position, data[: len(data) // 2])
            raise error
        write(self, position, data)

    monkeypatch.setattr(SafetensorsWriter, "_write_at", failing)
    for allowed in range(20):
        writes = 0
        try:
            quantize_file(source, out, force=existing)
        except type(error):
            assert listing(tmp_path) == before
            assert not out.is_file() or out.read_bytes() == content
        else:
            assert writes == allowed
            break
    assert allowed >= 5
    assert any(tensor.format and tensor.format.startswith("nf4") for tensor in inspect(out).tensors)


def test_failure_of_a_copied_file_or_rename_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    file = model / next(iter(SHARDS))
    for function, source in {
        "lowbit_rs.files.pipeline.copy_file": model,
        "lowbit_rs.files.pipeline.write_bytes": model,
        "lowbit_rs.files.pipeline.sync_tree": model,
        "pathlib.Path.rename": model,
        "pathlib.Path.replace": file,
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(function, fail)
            with pytest.raises(OSError, match="Input/output error"):
                quantize_file(source, tmp_path / "out")
        assert listing(tmp_path) == before


def test_directory_is_put_back_if_the_new_one_cannot_take_its_place(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    quantize_file(model, out, "int8")
    before, rename = listing(tmp_path), Path.rename
    failures: list[Path] = []

    def fail_once(self: Path, target: Path) -> Path:
        if target == out and not failures:
            failures.append(self)
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OSError, match="Input/output error"):
        quantize_file(model, out, "nf4", force=True)
    assert failures
    assert listing(tmp_path) == before
    assert {tensor.format[:4] for tensor in inspect(out).tensors if tensor.format} == {"int8"}


def test_destination_made_meanwhile_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def someone_else(*_: object) -> None:
        out.write_text("theirs")

    with pytest.raises(InvalidArgument, match="out, which another program made meanwhile"):
        quantize_file(source, out, progress=someone_else)
    assert out.read_text() == "theirs"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "blob", "out"}


def test_leftovers_of_killed_runs_are_told_and_do_no_harm(source: Path, tmp_path: Path) -> None:
    stale = tmp_path / ".out.0123abcd.lowbit-partial"
    stale.mkdir()
    (tmp_path / ".other.0123abcd.lowbit-partial").write_text("of another output")
    summary = quantize_file(source, tmp_path / "out")
    assert summary.leftovers == (stale,)
    assert stale.is_dir()


def test_nonfinite_weights_name_file_tensor_and_index(tmp_path: Path) -> None:
    source, out, name = tmp_path / "a.safetensors", tmp_path / "b.safetensors", "model.layers.1.up_proj.weight"
    content = tensors()
    content[name][3, 5] = torch.inf
    save_file(content, source)
    with pytest.raises(InvalidArgument, match=rf"a.safetensors: tensor '{name}': .*\[3, 5\]"):
        quantize_file(source, out)
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors"}
    for codebook in (None, "fit"):
        quantize_file(source, out, nonfinite="propagate", codebook=codebook, force=True)
        packed = load_packed(out)[name]
        assert isinstance(packed, PackedWeight)
        assert packed.dequantize().isnan().nonzero().tolist() == [[3, column] for column in range(48)]


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"format": "nf5"}, r'format: got "nf5", expected "nf4", "fp4"'),
    "block size": ({"block_size": 48}, r"block_size: got 48, expected a power of two from 16 to 4096"),
    "codebook": ({"codebook": "best"}, r"""codebook: got 'best', expected "block-optimal", "fit" or 2 to 16 values"""),
    "codebook row": ({"codebook": "block-optimal", "block_size": "row"}, r'got "block-optimal" with block_size="row"'),
    "codebook and format": ({"codebook": "fit", "format": "int8"}, r"format: got 'int8' with a codebook"),
    "values": ({"codebook": [1.0]}, r"codebook: got shape \[1\], expected 2 to 16 values"),
    "signed": ({"signed_absmax": True}, r"signed_absmax: got true with format"),
    "nonfinite": ({"nonfinite": "ignore"}, r"""nonfinite: got 'ignore', expected "error" or "propagate\""""),
    "scale dtype": ({"scale_dtype": torch.int8}, r"scale_dtype: got torch.int8, expected torch.float32"),
}


@pytest.mark.parametrize(("keywords", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_are_refused_before_anything_is_read(
    tmp_path: Path, keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        quantize_file(tmp_path / "none", tmp_path / "out", **keywords)
    with pytest.raises(InvalidArgument, match="none: got nothing at this path"):
        quantize_file(tmp_path / "none", tmp_path / "out")


def test_progress_goes_from_nothing_to_nearly_all(model: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    quantize_file(model, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert {name for name, _, _ in calls} == tensors().keys()
    total = sum(tensor.nbytes for tensor in tensors().values())
    assert {call[2] for call in calls} == {total}
    done = [call[1] for call in calls]
    assert done[0] == 0
    assert done == sorted(set(done))
    assert done[-1] + tensors()[calls[-1][0]].nbytes == total
