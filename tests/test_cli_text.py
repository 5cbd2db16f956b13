"""lowbit generate and lowbit serve: text from packed models on the command line and over HTTP."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import lowbit_rs
from lowbit_rs import InvalidArgument, LowbitConfig
from lowbit_rs.cli import main
from lowbit_rs.integrations.transformers.text import generate_text
from tiny_models import load, make_model, make_tokenizer

CHAT_TEMPLATE = "{% for message in messages %}w2 {{ message['content'] }} w3 {% endfor %}"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A packed model with a tokenizer without a chat template."""
    make_model("llama").save_pretrained(tmp_path / "float")
    load(tmp_path / "float", quantization_config=LowbitConfig()).save_pretrained(tmp_path / "packed")
    make_tokenizer().save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture
def chat_directory(directory: Path) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def continuation(directory: Path, prompt: list[int], count: int) -> list[str]:
    model = load(directory)
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)[0, len(prompt) :]
    return [f"w{index}" for index in tokens.tolist() if index > 1]  # 0 and 1 are special and not shown


def words(text: str) -> list[str]:
    return re.findall(r"w\d+", text)


def test_generate_continues_a_text(directory: Path) -> None:
    result = run("generate", directory, "--prompt", "w5 w6", "--max-new-tokens", 7)
    assert (result.exit_code, result.stderr) == (0, "")
    assert words(result.stdout) == continuation(directory, [5, 6], 7)
    assert result.stdout.endswith("\n")


def test_generate_takes_what_quantize_wrote(tmp_path: Path) -> None:
    model: Any = make_model("llama")
    model.save_pretrained(tmp_path / "float")
    make_tokenizer().save_pretrained(tmp_path / "float")
    assert run("quantize", tmp_path / "float", tmp_path / "packed", "--format", "uint4").exit_code == 0
    result = run("generate", tmp_path / "packed", "--prompt", "w5 w6", "--max-new-tokens", 7)
    assert result.exit_code == 0
    lowbit_rs.quantize_model(model, "uint4", progress=False)
    tokens = model.generate(torch.tensor([[5, 6]]), max_new_tokens=7, do_sample=False)[0, 2:]
    assert words(result.stdout) == [f"w{index}" for index in tokens.tolist() if index > 1]


def test_generate_answers_in_the_template_of_chats(chat_directory: Path) -> None:
    result = run("generate", chat_directory, "--prompt", "w5 w6", "--max-new-tokens", 7, "--dtype", "float32")
    assert words(result.stdout) == continuation(chat_directory, [2, 5, 6, 3], 7)
    raw = run("generate", chat_directory, "--prompt", "w5 w6", "--max-new-tokens", 7, "--raw")
    assert words(raw.stdout) == continuation(chat_directory, [5, 6], 7)


def test_text_comes_piece_by_piece(directory: Path) -> None:
    pieces: list[str] = []
    count = generate_text(str(directory), "w5 w6", pieces.append, max_new_tokens=6)
    assert count == 6
    assert len([piece for piece in pieces if piece.strip()]) > 2
    torch.manual_seed(1)
    drawn: list[str] = []
    generate_text(str(directory), "w5 w6", drawn.append, max_new_tokens=6, temperature=5.0)
    assert drawn != pieces


def test_wrong_arguments_are_one_line(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="chat: got a model whose tokenizer has no chat template"):
        generate_text(str(directory), "w5", print, chat=True)
    result = run("generate", directory, "--prompt", "")
    assert (result.exit_code, result.stderr) == (1, "error: prompt: got '', expected text of at least one token\n")
    result = run("generate", tmp_path / "none", "--prompt", "w5")
    assert result.exit_code == 1
    assert re.fullmatch("error: .*none.*\n", result.stderr)
    result = run("serve", tmp_path)
    assert result.exit_code == 1
    assert re.fullmatch("error: .* got a directory without config.json, expected a model directory\n", result.stderr)


def test_missing_packages_are_named(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit_rs.integrations.transformers.text._SERVER_PACKAGES", ("no_such_package",))
    result = run("serve", directory)
    assert result.exit_code == 1
    assert "lowbit serve without no_such_package" in result.stderr
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # noqa: ARG005
    result = run("generate", directory, "--prompt", "w5")
    assert result.stderr == (
        'error: lowbit generate: transformers not installed: pip install "lowbit-rs[transformers]"\n'
    )


@contextmanager
def served(directory: Path) -> Iterator[str]:
    """The address of the real command at work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(Path(lowbit_rs.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lowbit_rs", "serve", directory, "--host", "127.0.0.1", "--port", port]
    server = subprocess.Popen(
        [str(part) for part in command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            if server.poll() is not None:
                assert server.stdout is not None
                pytest.fail(server.stdout.read())
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.communicate(timeout=60)


def post(address: str, content: Any) -> Any:
    request = urllib.request.Request(
        address, json.dumps(content).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.loads(response.read())


def _keep_tokenizer(_: str, names: list[str]) -> list[str]:
    return [name for name in names if "token" not in name and "template" not in name]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("fastapi") is None, reason="needs the packages of transformers' server: the extra serve")
@pytest.mark.parametrize("wrote", ["save_pretrained", "lowbit quantize"])
def test_served_over_http(wrote: str, chat_directory: Path, tmp_path: Path) -> None:
    if wrote == "lowbit quantize":
        shutil.copytree(tmp_path / "float", tmp_path / "chat")
        shutil.copytree(chat_directory, tmp_path / "chat", ignore=_keep_tokenizer, dirs_exist_ok=True)
        chat_directory = tmp_path / "quantized"
        assert run("quantize", tmp_path / "chat", chat_directory, "--format", "uint4").exit_code == 0
    with served(chat_directory) as address:
        answer = post(
            f"{address}/v1/chat/completions",
            {
                "model": str(chat_directory),
                "messages": [{"role": "user", "content": "w5 w6"}],
                "max_tokens": 6,
                "temperature": 0,
            },
        )
    message = answer["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert words(message["content"]) == continuation(chat_directory, [2, 5, 6, 3], 6)
