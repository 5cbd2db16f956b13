"""The run of the demo: measure the original and each setting, print, save."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor, nn

from lowbit_rs.demo import evaluate, report
from lowbit_rs.demo.machine import machine
from lowbit_rs.demo.model import NAME, chat_prompt, load_model, load_tokenizer, model_file, token_ids
from lowbit_rs.demo.plot import save_pictures
from lowbit_rs.demo.report import Row
from lowbit_rs.demo.settings import LEGEND, ORIGINALS, Setting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT = Path(__file__).with_name("python_documentation.txt")

#: Tokens that the model sees at once when it is scored.
WINDOW = 1024
#: Tokens of the prompt that is timed.
_PREFILL = 512
#: Tokens before the decoding that is timed.
_CONTEXT = 64

#: One that a model of this size can answer, in bf16.
_QUESTION = "Give me three tips for sleeping better."
_ANSWERING = ("bf16", "nf4")


@dataclass(frozen=True)
class Budget:
    """How much is measured: what the demo's time goes into."""

    windows: int
    decode_tokens: int
    prefill_repeats: int
    answer_tokens: int


FULL = Budget(windows=4, decode_tokens=32, prefill_repeats=2, answer_tokens=112)
QUICK = Budget(windows=2, decode_tokens=12, prefill_repeats=1, answer_tokens=48)


@dataclass
class Meter:
    """Measures one model after the other on the same tokens; the first one is the reference of the agreement."""

    tokens: Tensor
    budget: Budget
    rows: list[Row] = field(default_factory=list)
    reference: evaluate.Score | None = None

    def measure(self, model: nn.Module, **identity: Any) -> Row:
        """Score and time a model; ``identity`` holds the fields of Row that are not measured here."""
        score = evaluate.score(model, self.tokens, WINDOW)
        self.reference = self.reference or score
        row = Row(
            megabytes=evaluate.model_bytes(model) / 1e6,
            perplexity=score.perplexity,
            agreement=evaluate.agreement(score, self.reference),
            prefill=evaluate.prefill_rate(model, self.tokens[:_PREFILL], self.budget.prefill_repeats),
            decode=evaluate.decode_rate(model, self.tokens[:_CONTEXT], self.budget.decode_tokens),
            **identity,
        )
        self.rows.append(row)
        return row


def compare(settings: Sequence[Setting], output: Path, budget: Budget, threads: int | None = None) -> list[Row]:
    """Measure the originals and ``settings``, print table and answers, and write both and the pictures to ``output``.

    ``output`` is made where it does not exist. ``threads`` is set for torch, and by that for lowbit_rs.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    console = _console()
    start = time.perf_counter()
    console.print(f"reading {NAME}")
    tokenizer = load_tokenizer(model_file())
    original = load_model(model_file())
    meter = Meter(read_tokens(tokenizer, budget), budget)
    prompt = chat_prompt(tokenizer, _QUESTION)
    answers = {}
    for setting in (*ORIGINALS, *settings):
        row, model = measure_setting(meter, original, setting)
        console.print(_progress(row, start))
        if setting.name in _ANSWERING:
            answers[setting.label] = _answer(model, tokenizer, prompt, budget.answer_tokens)
    _show(console, meter, answers)
    paths = _save(output, meter, answers)
    console.print(f"\nwrote {', '.join(map(str, paths))} after {time.perf_counter() - start:.0f} s")
    return meter.rows


def read_tokens(tokenizer: PreTrainedTokenizerBase, budget: Budget) -> Tensor:
    """The tokens [T] of the text that comes with the demo: as many whole windows as the budget allows."""
    return token_ids(tokenizer, TEXT.read_text(encoding="utf-8"))[: budget.windows * WINDOW]


def measure_setting(meter: Meter, original: nn.Module, setting: Setting) -> tuple[Row, nn.Module]:
    """Quantize a copy of ``original`` and measure it. Returns the row and the model.

    The linear layers are quantized from the fp32 weights of ``original``, before everything else is rounded.
    """
    model = copy.deepcopy(original)
    start = time.perf_counter()
    bits = setting.quantize(model)
    seconds = time.perf_counter() - start
    model.to(dtype=setting.dtype)
    row = meter.measure(
        model,
        name=setting.name,
        label=setting.label,
        bits_per_weight=bits,
        quantize_seconds=seconds,
        original=setting.options is None,
        note=setting.note,
    )
    return row, model


def _answer(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: Tensor, limit: int) -> str:
    """The greedy answer to a prompt; one that is longer than ``limit`` tokens ends in dots."""
    answer = takewhile(lambda token: token != tokenizer.eos_token_id, evaluate.greedy(model, prompt))
    tokens = list(islice(answer, limit))
    text = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    return text if len(tokens) < limit else f"{text} ..."


def _progress(row: Row, start: float) -> str:
    quantized = "" if row.original else f", quantized in {row.quantize_seconds:.1f} s"
    return f"{time.perf_counter() - start:4.0f} s  {row.label}: perplexity {row.perplexity:.2f}{quantized}"


def _show(console: Console, meter: Meter, answers: Mapping[str, str]) -> None:
    predictions = 0 if meter.reference is None else len(meter.reference.predictions)
    console.print()
    console.print(report.table(meter.rows, NAME))
    facts = [
        f"perplexity and agreement (share of positions where the most likely token is that of fp32): {predictions} "
        f"predictions of a Python documentation text, in windows of {WINDOW} tokens",
        "bits/weight: of the quantized layers with their scales. MB: the whole model; the embedding, which is also the "
        "output layer, stays in bf16, as activations are",
        f"decode: one token at a time after {_CONTEXT}; prefill: a prompt of {_PREFILL}; medians",
        LEGEND,
        _machine_line(machine()),
    ]
    closest = report.closest(meter.rows)
    if closest is not None:
        facts.insert(0, closest)
    numbered = [f"[{number}] {note}" for number, note in enumerate(report.notes(meter.rows), 1)]
    console.print("\n".join([*numbered, *facts]), style="dim")
    console.print(f"\n> {_QUESTION}", style="bold")
    for label, answer in answers.items():
        console.print(f"\n{label}:", style="bold")
        console.print(answer)


def _machine_line(facts: Mapping[str, Any]) -> str:
    return (
        f"machine: {facts['processor']}, cores: {facts['cores']}, threads used: {facts['threads']}, {facts['isa']}, "
        f"torch {facts['torch']}"
    )


def _save(output: Path, meter: Meter, answers: Mapping[str, str]) -> list[Path]:
    table = output / "demo.json"
    context = {
        "model": NAME,
        "text": {"file": TEXT.name, "tokens": meter.tokens.numel(), "window": WINDOW},
        "machine": machine(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "question": _QUESTION,
        "answers": answers,
    }
    report.save_json(table, meter.rows, context)
    return [table, *save_pictures(output, meter.rows, f"{NAME}: quality against size")]


def _console() -> Console:
    # A file or pipe has no width of its own: as wide as the table.
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 100)
    return console
