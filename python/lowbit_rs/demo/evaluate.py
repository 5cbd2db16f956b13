"""What the demo measures of a causal language model: perplexity, greedy predictions, speed, size.

A model is a module that takes token ids [1, T] and returns an object with ``logits`` [1, T, vocabulary] and, called
with ``use_cache=True``, ``past_key_values``: any causal language model of transformers.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from lowbit_rs.errors import invalid

#: Tokens before the timed ones: the first calls allocate and start threads.
_WARM_UP_TOKENS = 3


@dataclass(frozen=True)
class Score:
    """How a model predicts a text: over all windows, at every position but the last one of a window."""

    #: exp of the mean negative log-likelihood of the next token.
    perplexity: float
    #: The most likely next token at each position, int64 [predictions].
    predictions: Tensor


@torch.inference_mode()
def score(model: nn.Module, tokens: Tensor, window: int) -> Score:
    """Score ``tokens`` [T] cut into windows of ``window`` tokens, each without the context of the others.

    A last window of one token predicts nothing and is left out. Raises InvalidArgument for fewer than two tokens.
    """
    if tokens.dim() != 1 or tokens.numel() < 2:
        raise invalid("tokens", f"a tensor of shape {list(tokens.shape)}", "[T] with T of 2 or more")
    if window < 2:
        raise invalid("window", window, "2 or more")
    total, predictions = 0.0, []
    for part in torch.split(tokens, window):
        if part.numel() < 2:
            continue
        logits = model(part[None]).logits[0, :-1].float()
        total += nn.functional.cross_entropy(logits, part[1:], reduction="sum").item()
        predictions.append(logits.argmax(-1))
    predicted = torch.cat(predictions)
    return Score(math.exp(total / predicted.numel()), predicted)


def agreement(score: Score, reference: Score) -> float:
    """The share of positions, 0 to 1, at which both models would greedily continue with the same token."""
    if score.predictions.shape != reference.predictions.shape:
        got, expected = len(score.predictions), len(reference.predictions)
        raise invalid("score", f"{got} predictions", f"the {expected} of the reference")
    return (score.predictions == reference.predictions).double().mean().item()


@torch.inference_mode()
def greedy(model: nn.Module, prompt: Tensor) -> Iterator[int]:
    """The tokens that continue ``prompt`` [T] greedily, without end: one forward call for each, with a KV cache."""
    output = model(prompt[None], use_cache=True, logits_to_keep=1)
    while True:
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        yield int(token)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)


def decode_rate(model: nn.Module, prompt: Tensor, tokens: int) -> float:
    """Tokens a second of greedy decoding after ``prompt`` [T]: the inverse of the median time of ``tokens`` steps."""
    steps = greedy(model, prompt)
    for _ in islice(steps, _WARM_UP_TOKENS):
        pass
    return 1 / _median_seconds(lambda: next(steps), tokens)


@torch.inference_mode()
def prefill_rate(model: nn.Module, prompt: Tensor, repeats: int) -> float:
    """Tokens a second at which ``prompt`` [T] is read, up to the logits of its last token, as generation reads it.

    The median of ``repeats`` calls; the model is taken to be warm.
    """

    def read() -> None:
        model(prompt[None], use_cache=True, logits_to_keep=1)

    return prompt.numel() / _median_seconds(read, repeats)


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; tied ones count once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _median_seconds(run: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
