"""The command line: what it prints, how it exits, and what it leaves when it is stopped."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowbit_rs
from lowbit_rs.cli import main
from lowbit_rs.files import load_packed

PYTHON_PATH = {**os.environ, "PYTHONPATH": str(Path(lowbit_rs.__file__).parents[1])}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def process(*arguments: object, code: str | None = None, **keywords: Any) -> subprocess.Popen[str]:
    """The real command, or `code` that ends in it."""
    start = ["-m", "lowbit_rs"] if code is None else ["-c", code]
    command = [sys.executable, *start, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=PYTHON_PATH, **keywords
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def assert_one_line(stderr: str, pattern: str = "") -> None:
    assert re.fullmatch(rf"error: .*{pattern}.*\n", stderr), stderr


def tensors() -> dict[str, Tensor]:
    return {
        "model.layers.0.up_proj.weight": torch.randn(40, 96).bfloat16(),
        "model.layers.1.up_proj.weight": torch.randn(40, 96).bfloat16(),
        "model.embed_tokens.weight": torch.randn(10, 96).bfloat16(),
        "lm_head.weight": torch.randn(10, 96).bfloat16(),
        **{f"model.layers.{index}.input_layernorm.weight": torch.ones(96) for index in range(5)},
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path)
    return path


def test_help_and_version() -> None:
    for arguments in ([], ["--help"], ["-h"]):
        result = run(*arguments)
        assert result.exit_code == 0
        assert [name for name in main.commands if re.search(rf"^  {name} ", result.stdout, re.MULTILINE)] == [
            "quantize",
            "dequantize",
            "convert",
            "inspect",
            "generate",
            "serve",
            "demo",
        ]
    assert "--double-quant" in run("quantize", "--help").stdout
    assert run("--version").stdout == f"lowbit {lowbit_rs.__version__}\n"


def test_quantize_inspect_dequantize(source: Path, tmp_path: Path) -> None:
    packed, unpacked = tmp_path / "packed.safetensors", tmp_path / "unpacked.safetensors"
    result = run("quantize", source, packed, "--format", "uint4", "--block-size", "32", "--double-quant")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "quantized 2 tensors: 21.1 kB -> 10.8 kB",
        "  kept 5 as they are (1-D): model.layers.0.input_layernorm.weight, model.layers.1.input_layernorm.weight, "
        "model.layers.2.input_layernorm.weight, ...",
        "  kept 1 as it is (matches skip='lm_head'): lm_head.weight",
        "  kept 1 as it is (embedding): model.embed_tokens.weight",
    ]
    name = "model.layers.1.up_proj.weight"
    expected = lowbit_rs.quantize(load_file(source)[name], "uint4", 32, double_quant=True)
    assert load_packed(packed)[name] == expected

    listing = json.loads(run("inspect", packed, "--json").stdout)
    weight = next(tensor for tensor in listing["tensors"] if tensor["name"] == name)
    assert weight == {
        "name": name,
        "file": "packed.safetensors",
        "shape": [40, 96],
        "dtype": "bfloat16",
        "format": "uint4, block_size=32, double_quant, shift=float32",
        "weights": 3840,
        "bits_per_weight": expected.bits_per_weight,
        "bytes": expected.nbytes,
    }
    assert listing["bytes"] == sum(tensor["bytes"] for tensor in listing["tensors"])
    table = run("inspect", packed).stdout
    assert re.search(rf"{name} +40 x 96 +uint4, block_size=32, .* +{expected.bits_per_weight:.3f} ", table)
    assert "9 tensors, 1 file" in table

    result = run("dequantize", packed, unpacked, "--dtype", "float32")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("dequantized 2 tensors: 10.8 kB -> 36.5 kB\n")
    assert torch.equal(load_file(unpacked)[name], expected.dequantize(torch.float32))


def test_options_reach_the_weights(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    out, name = tmp_path / "out.safetensors", "model.layers.0.up_proj.weight"
    for options, keywords in {
        "--format int8 --block-size row --threads 1": {"format": "int8", "block_size": "row"},
        "--scale-dtype float16": {"scale_dtype": torch.float16},
        "--codebook block-optimal --block-size 16": {
            "block_size": 16,
            "codebook": lowbit_rs.codebooks.block_optimal(16),
        },
        "--codebook block-optimal --signed-absmax": {
            "codebook": lowbit_rs.codebooks.block_optimal(64, signed=True),
            "signed_absmax": True,
        },
        "--codebook fit": {"codebook": lowbit_rs.codebooks.fit(load_file(source)[name], block_size=64)},
    }.items():
        assert run("quantize", source, out, "--force", *options.split()).exit_code == 0
        assert load_packed(out)[name] == lowbit_rs.quantize(load_file(source)[name], **keywords)  # type: ignore[arg-type]
    assert threads == [1]

    assert (
        run("quantize", source, out, "--force", "--skip", "*.1.*", "--skip", "lm_head", "--embeddings").exit_code == 0
    )
    packed = {key for key, value in load_packed(out).items() if isinstance(value, lowbit_rs.PackedWeight)}
    assert packed == {name, "model.embed_tokens.weight"}


def test_directory(source: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    source.rename(directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    result = run("quantize", directory, tmp_path / "out")
    assert result.exit_code == 0
    assert result.stdout.endswith("  copied 1 other file\n")
    assert "quantized by gptq, as quantization_config" not in run("inspect", directory).stdout
    (directory / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert "quantized by gptq, as quantization_config in config.json says" in run("inspect", directory).stdout


def test_names_of_strangers_are_printed_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "names.safetensors"
    save_file({"[red]a[/red] :smile: \x1b[2J\n.weight": torch.zeros(2, 2)}, path)
    assert r"[red]a[/red] :smile: \x1b[2J\n.weight" in run("inspect", path).stdout
    result = run("quantize", path, tmp_path / "out.safetensors", "--skip", "*")
    assert result.exit_code == 1
    path.write_bytes(path.read_bytes()[:-1] + b"xyz")
    assert "\x1b" not in run("inspect", path).stderr


def test_leftovers_are_told(source: Path, tmp_path: Path) -> None:
    stale = tmp_path / ".out.0123abcd.lowbit-partial"
    stale.touch()
    result = run("quantize", source, tmp_path / "out")
    assert f"  note: {stale} is of another run; if that was killed, it can be deleted\n" in result.stdout


ERRORS = {
    "no source": (
        ["quantize", "none", "out"],
        "none: got nothing at this path, expected a safetensors file or a model",
    ),
    "nothing to inspect": (["inspect", "none"], "none: got nothing at this path"),
    "no safetensors": (["quantize", "text", "out"], "text: got a header of .* bytes .* no safetensors file"),
    "truncated": (["quantize", "truncated", "out"], "truncated: got .* bytes of data: the file is truncated, expected"),
    "quantized": (["quantize", "packed", "out"], "source: got packed, quantized by lowbit_rs, as its header says"),
    "not quantized": (
        ["dequantize", "model.safetensors", "out"],
        "which is not quantized, expected what lowbit quantize",
    ),
    "block size": (
        ["quantize", "model.safetensors", "out", "--block-size", "48"],
        "block_size: got 48, expected a power",
    ),
    "exists": (
        ["quantize", "model.safetensors", "packed"],
        "destination: got packed, which exists, expected a new path",
    ),
    "itself": (["quantize", "model.safetensors", "./model.safetensors", "--force"], "expected a path apart from the"),
    "no directory": (["quantize", "model.safetensors", "none/out"], "expected a path in a directory that exists"),
    "empty directory": (["inspect", "empty"], "empty: got no safetensors file, expected model.safetensors"),
    "not finite": (["quantize", "nan", "out"], r"nan: tensor 'a.weight': .*\[1, 0\]"),
}


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("no safetensors file\n" * 3)
    Path("truncated").write_bytes(source.read_bytes()[:-1])
    Path("empty").mkdir()
    save_file({"a.weight": torch.tensor([[1.0], [torch.nan]])}, "nan")
    run("quantize", source, "packed")
    before = names(tmp_path)
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert_one_line(result.stderr, message)
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantise"], r"No such command 'quantise'.* \(see lowbit --help\)"),
        (["quantize", "in"], r"Missing argument 'OUT'.* \(see lowbit quantize --help\)"),
        (["quantize", "in", "out", "--format", "nf5"], r"Invalid value for '--format': 'nf5' is not one of 'nf4'"),
        (
            ["quantize", "in", "out", "--block-size", "many"],
            r"got 'many', expected a power of two from 16 to 4096, or row",
        ),
        (["quantize", "in", "out", "--threads", "0"], r"Invalid value for '--threads'"),
        (["inspect", "--jsn", "in"], r"No such option"),
    ],
)
def test_usage_errors_are_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, arguments, prog_name="lowbit")
    assert (result.exit_code, result.stdout) == (2, "")
    assert_one_line(result.stderr, message)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out"), 1, "out: No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (MemoryError(), 1, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.Abort(), 130, "interrupted"),
        (RuntimeError("two\nlines"), 1, r"RuntimeError: two lines \(set LOWBIT_TRACEBACK=1 to see where\)"),
    ],
)
def test_every_exception_is_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("lowbit_rs.files.quantize_file", fail)
    result = run("quantize", source, tmp_path / "out")
    assert (result.exit_code, result.stdout) == (code, "")
    assert_one_line(result.stderr, message)
    if type(error) is RuntimeError:
        monkeypatch.setenv("LOWBIT_TRACEBACK", "1")
        assert run("quantize", source, tmp_path / "out").exception is error


def test_demo_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def demo(arguments: Any) -> int:
        calls.append(list(arguments))
        if "missing" in arguments:
            raise lowbit_rs.Unsupported("lowbit demo: gguf not installed: pip install 'lowbit-rs[demo]'")
        return 3

    monkeypatch.setattr("lowbit_rs.demo.main", demo)
    assert run("demo", "--quick", "--output", "x", "--help").exit_code == 3
    assert calls == [["--quick", "--output", "x", "--help"]]
    result = run("demo", "missing")
    assert result.exit_code == 1
    assert_one_line(result.stderr, r"gguf not installed: pip install 'lowbit-rs\[demo\]'")


def test_real_command(source: Path, tmp_path: Path) -> None:
    with process("quantize", source, tmp_path / "out.safetensors", "--format", "int8") as command:
        stdout, stderr = command.communicate(timeout=120)
    assert (command.returncode, stderr) == (0, "")
    assert stdout.startswith("quantized 2 tensors: ")
    with process("inspect", tmp_path / "none") as command:
        stdout, stderr = command.communicate(timeout=120)
    assert (command.returncode, stdout) == (1, "")
    assert_one_line(stderr, "none: got nothing at this path")


def test_reader_of_the_output_may_leave(source: Path) -> None:
    with process("inspect", source) as command:
        assert command.stdout is not None
        assert command.stderr is not None
        command.stdout.close()
        assert command.stderr.read() == ""
        assert command.wait(timeout=120) == 1


FILE_LIMIT = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
from lowbit_rs.cli import main
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no limits on file sizes")
def test_system_that_refuses_to_write(source: Path, tmp_path: Path) -> None:
    with process("quantize", source, tmp_path / "out.safetensors", code=FILE_LIMIT) as command:
        stdout, stderr = command.communicate(timeout=120)
    assert (command.returncode, stdout) == (1, "")
    assert_one_line(stderr, "File too large")
    assert names(tmp_path) == [source.name]


#: The command, but stopping for long in the middle of the second tensor.
SLOW = """
import signal
import time
from lowbit_rs.files.safetensors_stream import SafetensorsWriter
write, calls = SafetensorsWriter._write_at, []

def slow(self, position, data):
    write(self, position, data)
    calls.append(position)
    if len(calls) == 3:
        print("writing", flush=True)
        time.sleep(100)

SafetensorsWriter._write_at = slow
# A shell that starts the tests in the background has them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
from lowbit_rs.cli import main
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no such signals")
@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (signal.SIGINT, 130, "error: interrupted\n"),
        (signal.SIGTERM, 143, "error: terminated\n"),
        (signal.SIGKILL, -signal.SIGKILL, ""),
    ],
)
def test_stopped_run_leaves_no_output(
    source: Path, tmp_path: Path, number: int, code: int, message: str, kind: str
) -> None:
    if kind == "directory":
        (tmp_path / "model").mkdir()
        source = source.rename(tmp_path / "model" / "model.safetensors").parent
    with process("quantize", source, tmp_path / "out", code=SLOW) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == "writing\n"
        assert len(names(tmp_path)) == 2
        command.send_signal(number)
        stdout, stderr = command.communicate(timeout=60)
    assert (command.returncode, stdout, stderr) == (code, "", message)
    assert not (tmp_path / "out").exists()
    partial = [name for name in names(tmp_path) if name != source.name]
    if number == signal.SIGKILL:  # which no process can answer
        assert [re.sub("[0-9a-f]{8}", "?", name) for name in partial] == [".out.?.lowbit-partial"]
    else:
        assert partial == []

    result = run("quantize", source, tmp_path / "out")
    assert result.exit_code == 0
    assert ("is of another run" in result.stdout) == (number == signal.SIGKILL)
