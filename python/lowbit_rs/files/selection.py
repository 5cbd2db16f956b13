"""Which tensors of a checkpoint are weights of linear layers.

A file tells names, shapes and dtypes, and nothing of the modules that will hold the tensors, so the choice is made by
these. A tensor is quantized if

- its dtype is float32, float16 or bfloat16, and
- it is a matrix [N, K] called ``*.weight``, or a stack of them [experts, N, K] below a component ``experts``, as the
  fused ``experts.gate_up_proj`` and ``experts.down_proj`` of mixtures of experts are, and
- its name matches no skip pattern; the default, as in ``lowbit_rs.quantize_model``, is the output head ``lm_head``; and
- it is no norm, router or transposed weight, and no embedding, unless embeddings are asked for.

The last component of the module's name says what a norm (``input_layernorm``, ``q_norm``, ``ln_1``) or an embedding
(``embed_tokens``, ``wte``, ``word_embeddings``) is; a router is called ``gate`` or ``router`` and lies beside
``experts``. A weight is transposed if it has a bias whose length is its second size and not its first, as in GPT-2's
Conv1D, where rows are inputs; all weights of the same last component then are, for a square one does not show it. An
embedding that is also the output head stays: config.json says ``tie_word_embeddings``, or, where it does not say, there
is no output head in the checkpoint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowbit_rs.nn.model import matches
from lowbit_rs.packed import DTYPES

from .safetensors_format import safetensors_dtype

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from .checkpoint import Checkpoint
    from .safetensors_format import TensorInfo

_FLOATS = frozenset(safetensors_dtype(dtype) for dtype in DTYPES.values())
_NORM = re.compile(r"norm|^ln(_|\d|$)", re.IGNORECASE)
_EMBEDDING = re.compile(
    r"^(\w+_)?(emb|embd|embed|embeds|embedding|embeddings)(_in|_tokens|_positions|_tokens_per_layer)?$"
    r"|^(wte|wpe|shared|relative_attention_bias)$",
    re.IGNORECASE,
)
_NOT_OF_TOKENS = re.compile(r"pos|type|wpe|relative_attention_bias|per_layer", re.IGNORECASE)
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|unembedding|proj_out)\.weight$|^output\.weight$")


@dataclass(frozen=True)
class Selection:
    """What is to be quantized.

    Attributes:
        chosen: names of the tensors.
        skipped: why each other tensor stays as it is.
    """

    chosen: frozenset[str]
    skipped: Mapping[str, str]

    def in_order(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """``chosen`` in the order of the files."""
        return tuple(tensor.name for tensor in checkpoint.tensors() if tensor.name in self.chosen)


def select(checkpoint: Checkpoint, *, skip: Iterable[str], embeddings: bool) -> Selection:
    """Chooses the tensors to quantize by the rules of this module."""
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors()}
    tied = _is_tied(checkpoint, tensors)
    transposed = {_leaf(name) for name in tensors if _is_transposed(name, tensors)}
    mixtures = {name.partition(".experts.")[0] for name in tensors if ".experts." in name}
    skipped = {}
    for name, tensor in tensors.items():
        reason = _wrong_kind(tensor) or _skip_reason(_module(name), skip) or _wrong_role(name, mixtures)
        if reason is None and _leaf(name) in transposed:
            reason = "transposed: its rows are inputs"
        if reason is None and _EMBEDDING.search(_leaf(name)):
            reason = _embedding_reason(name, embeddings=embeddings, tied=tied)
        if reason is None and tied and _HEAD.search(name):
            reason = "tied to the embedding"
        if reason is not None:
            skipped[name] = reason
    return Selection(frozenset(tensors.keys() - skipped.keys()), skipped)


def _module(name: str) -> str:
    """The name of the module that holds a weight, or of the weight itself where it has no ``.weight``."""
    return name.removesuffix(".weight")


def _leaf(name: str) -> str:
    return _module(name).rpartition(".")[2]


def _wrong_kind(tensor: TensorInfo) -> str | None:
    """Why dtype, shape and suffix rule a tensor out."""
    dimensions = len(tensor.shape)
    if tensor.dtype not in _FLOATS:
        return f"dtype {tensor.dtype}"
    if dimensions == 3 and "experts" in tensor.name.split("."):
        wrong = "bias" if tensor.name.endswith("bias") else None
    elif not tensor.name.endswith(".weight"):
        wrong = "not called *.weight"
    else:
        wrong = None if dimensions == 2 else f"{dimensions}-D"
    if wrong is None and 0 in tensor.shape:
        return "empty"
    return wrong


def _skip_reason(module: str, patterns: Sequence[str]) -> str | None:
    matched = next((pattern for pattern in patterns if matches(module, pattern)), None)
    return None if matched is None else f"matches skip={matched!r}"


def _wrong_role(name: str, mixtures: Collection[str]) -> str | None:
    parent, _, leaf = _module(name).rpartition(".")
    if _NORM.search(leaf):
        return "norm"
    if leaf in ("gate", "router") and parent in mixtures:
        return "router of a mixture of experts"
    return None


def _embedding_reason(name: str, *, embeddings: bool, tied: bool) -> str | None:
    if not embeddings:
        return "embedding"
    if tied and not _NOT_OF_TOKENS.search(_leaf(name)):
        return "embedding tied to the output head"
    return None


def _is_tied(checkpoint: Checkpoint, names: Iterable[str]) -> bool:
    """Whether the token embedding is the output head, too."""
    text_config = checkpoint.config.get("text_config")
    for config in (checkpoint.config, text_config if isinstance(text_config, dict) else {}):
        declared = config.get("tie_word_embeddings")
        if isinstance(declared, bool):
            return declared
    return not any(_HEAD.search(name) for name in names)


def _is_transposed(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the bias beside a matrix has an entry per column and not per row."""
    bias, shape = tensors.get(f"{_module(name)}.bias"), tensors[name].shape
    return name.endswith(".weight") and bias is not None and len(shape) == 2 and bias.shape == shape[1:] != shape[:1]
