"""Writing text with a model: what ``lowbit generate`` and ``lowbit serve`` do."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging

from lowbit_rs.errors import invalid, unsupported

if TYPE_CHECKING:
    from collections.abc import Callable

#: What transformers' server needs beside transformers.
_SERVER_PACKAGES = ("fastapi", "openai", "pydantic", "uvicorn")


def generate_text(
    model: str,
    prompt: str,
    write: Callable[[str], None],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    chat: bool | None = None,
    device: str = "cpu",
    dtype: str = "auto",
) -> int:
    """Continues ``prompt`` with a model and passes the text to ``write``, piece by piece as it comes.

    Args:
        model: a model directory or an id on the Hub, packed or not, with its tokenizer.
        prompt: the text, or where ``chat`` is True, or None and the tokenizer has a template for chats, a question.
        write: takes the pieces of the answer.
        max_new_tokens: tokens after which to stop.
        temperature: 0 always takes the likeliest token; above, tokens are drawn.
        chat: whether the prompt is put into the tokenizer's chat template.
        device: where the model runs.
        dtype: that of activations: the name of a torch dtype, or "auto" for the one that the model was saved in.

    Returns:
        the number of tokens of the answer.

    Raises:
        InvalidArgument: where a prompt is empty, or a chat is asked for and the tokenizer has no template.
    """
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = _tokens(tokenizer, prompt, chat)
    language_model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    language_model = language_model.to(device).eval()
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    output = language_model.generate(
        tokens.to(device),
        attention_mask=torch.ones_like(tokens).to(device),
        max_new_tokens=max_new_tokens,
        streamer=_Stream(tokenizer, write),
        **sampling,
    )
    return int(output.shape[1] - tokens.shape[1])


def _tokens(tokenizer: Any, prompt: str, chat: bool | None) -> torch.Tensor:
    """Token ids [1, T] of the prompt."""
    if chat and tokenizer.chat_template is None:
        raise invalid("chat", "a model whose tokenizer has no chat template", "a chat model, or a raw prompt")
    if chat or (chat is None and tokenizer.chat_template is not None):
        messages = [{"role": "user", "content": prompt}]
        text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise invalid("prompt", repr(prompt), "text of at least one token")
    return torch.tensor([ids])


class _Stream(TextStreamer):
    """Passes each piece of text on as soon as it cannot change any more."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(f"{text}\n" if stream_end else text)


def serve_model(model: str, *, host: str, port: int, device: str, dtype: str) -> None:
    """Serves a model over HTTP as OpenAI's API does, by transformers' own server, until the process is stopped.

    Raises Unsupported where a package that the server needs is missing, InvalidArgument for a path without a model.
    """
    missing = [name for name in _SERVER_PACKAGES if find_spec(name) is None]
    if missing:
        raise unsupported(f"lowbit serve without {', '.join(missing)}", 'install them: pip install "lowbit-rs[serve]"')
    path = Path(model)
    if path.is_dir() and not (path / "config.json").exists():
        raise invalid(model, "a directory without config.json", "a model directory")
    from transformers.cli.serve import Serve

    Serve(force_model=model, host=host, port=port, device=device, dtype=dtype)
