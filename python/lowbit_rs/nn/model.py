"""Packing the layers of a model in place, and unpacking them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from lowbit_rs._backends import backend_of
from lowbit_rs._ops import THRESHOLD, check_activation, check_threshold
from lowbit_rs.errors import InvalidArgument, invalid
from lowbit_rs.functional import CodebookLike, as_codebook, make_scheme, resolve_format
from lowbit_rs.nn._base import PackedModule
from lowbit_rs.nn.embedding import QuantEmbedding
from lowbit_rs.nn.experts import QuantExperts, matrices, stack_names
from lowbit_rs.nn.fused_norms import fused, is_norm
from lowbit_rs.nn.fusion import fuse_model
from lowbit_rs.nn.linear import QuantLinear
from lowbit_rs.nn.report import Report, ReportRow, relative_error
from lowbit_rs.packed import DTYPES, BlockSize, describe, dtype_name, make_spec

#: Modules of torch that read the weights of linear layers inside them without calling those.
_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)

#: Modules that hold packed weights.
PACKED_MODULES = (PackedModule, QuantExperts)

#: Names of the layer that chooses experts, where it lies beside them.
_ROUTERS = ("gate", "router")

#: What torch keeps of the hooks on a module: they go with its place in the model, not with its weight.
_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def quantize_model(
    model: nn.Module,
    format: str = "nf4",
    block_size: BlockSize = 64,
    double_quant: bool = False,
    codebook: CodebookLike | None = None,
    *,
    skip: Iterable[str] = ("lm_head",),
    embeddings: bool = False,
    compute_dtype: torch.dtype | None = None,
    activation: str = "none",
    threshold: float | None = THRESHOLD,
    progress: bool = True,
    nonfinite: str = "error",
    scale_dtype: torch.dtype | None = None,
    block_order: str = "row",
    signed_absmax: bool = False,
    device: torch.device | str | int | None = None,
    fuse: bool = False,
    fuse_norms: bool = False,
) -> Report:
    """Replaces the nn.Linear layers of ``model`` by QuantLinear, in place and one by one.

    Experts of a mixture, 3-D parameters in transformers, become QuantExperts. Options: those of :func:`quantize`, and
    - ``skip``: names of layers to leave alone: a dotted name that is equal to the layer's, or its beginning or end in
      whole components ("lm_head" skips "model.lm_head"), or a pattern with ``*``, ``?`` or ``[...]`` for all of it;
    - ``embeddings``: also replaces nn.Embedding by QuantEmbedding; ``progress``: shows a progress bar;
    - ``compute_dtype``, ``activation``, ``threshold``: see QuantLinear; ``fuse``: see :func:`fuse_model`;
    - ``device``: where each layer is moved before it is packed, so that a model too large for a GPU in floats can be
      packed there. What is not packed stays where it is: ``model.to(device)`` moves it afterwards;
    - ``fuse_norms``: also replaces norms by RMSNorm and LayerNorm of lowbit_rs.nn, where those compute the same.

    Layers whose weight is shared with another module, subclasses with a forward of their own, layers whose weight torch
    reads without calling them, and routers are left alone too; the report says which and why. Raises InvalidArgument,
    before anything is replaced, for bad options and weights without values (meta device), and Unsupported for weights
    on a device without kernels; for a weight with NaN when its turn comes: the layers before it are packed then.
    """
    options = {
        "format": resolve_format(format, codebook),
        "block_size": block_size,
        "double_quant": double_quant,
        "codebook": None if codebook is None else as_codebook(codebook),
        "nonfinite": nonfinite,
        "scale_dtype": scale_dtype,
        "block_order": block_order,
        "signed_absmax": signed_absmax,
    }
    of_products = {"compute_dtype": compute_dtype, "activation": activation, "threshold": threshold}
    report = Report(scheme=_check_options(options, of_products))
    if isinstance(model, nn.Linear | nn.Embedding):
        raise invalid("model", type(model).__name__, "a module that contains layers; pack one by from_linear")
    names = choose(model, skip := _patterns(skip), embeddings, report)
    _check_values(model, names, device)
    for name in _progress(names, progress):
        _replace_one(model, name, device, options, of_products, report)
    report.fusion = fuse_model(model) if fuse else None
    report.fused_norms += swap_norms(model, skip, report) if fuse_norms else []
    if not report.rows and not report.fused_norms:
        warnings.warn("quantize_model replaced no layer" + _why_nothing(report), stacklevel=2)
    return report


def _patterns(skip: Iterable[str]) -> tuple[str, ...]:
    return (skip,) if isinstance(skip, str) else tuple(skip)


def swap_norms(model: nn.Module, skip: Sequence[str], report: Report) -> list[str]:
    """Replaces the norms that match no pattern of ``skip`` by fused ones with their parameters; gives their names."""
    names = []
    for name, module in [(name, module) for name, module in model.named_modules() if name and is_norm(module)]:
        matched = next((pattern for pattern in skip if matches(name, pattern)), None)
        new = fused(module) if matched is None else f"matches skip={matched!r}"
        if isinstance(new, str):
            report.skipped[name] = new
        else:
            replace_module(model, module, new)
            names.append(name)
    return names


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replaces every packed layer of ``model`` by the float module that it stands for, with the dequantized weight.

    In place and one by one, in ``dtype`` or in that of each layer.
    """
    if isinstance(model, PackedModule):
        raise invalid("model", type(model).__name__, "a module that contains layers; unpack one by to_linear")
    for name in [name for name, module in model.named_modules() if isinstance(module, PACKED_MODULES)]:
        packed = model.get_submodule(name)
        replace_module(model, packed, to_float(packed, dtype))


def to_float(packed: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The float module that a packed one stands for."""
    if isinstance(packed, QuantLinear):
        return packed.to_linear(dtype)
    if isinstance(packed, QuantEmbedding):
        return packed.to_embedding(dtype)
    assert isinstance(packed, QuantExperts)
    return packed.to_experts(dtype)


def _check_options(options: dict[str, Any], of_products: dict[str, Any]) -> str:
    """Raises for options that no layer could take; gives those of packing in words."""
    if of_products["compute_dtype"] is not None:
        dtype_name(of_products["compute_dtype"], "compute_dtype")
    check_activation(of_products["activation"])
    check_threshold(of_products["threshold"])
    if options["nonfinite"] not in ("error", "propagate"):
        raise invalid("nonfinite", repr(options["nonfinite"]), '"error" or "propagate"')
    scheme = make_scheme(*(options[key] for key in ("format", "block_size", "block_order", "double_quant")))
    if scheme[0] == "custom":
        as_codebook(options["codebook"])
    scale_dtype = options["scale_dtype"]
    scale_name = "float32" if scale_dtype is None else dtype_name(scale_dtype, "scale_dtype")
    return describe(make_spec(scheme, scale_name, options["signed_absmax"]))


def choose(model: nn.Module, skip: Sequence[str], embeddings: bool, report: Report) -> list[str]:
    """Names of the modules to pack; the reasons for leaving the others go into the report."""
    owners = _owners(model)
    readers = {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, _READERS)}
    names = []
    for name, module in model.named_modules():
        if stack_names(module):
            reason = _experts_reason(name, module, skip, owners)
        elif isinstance(module, nn.Linear) or (embeddings and isinstance(module, nn.Embedding)):
            reason = _reason(name, module, skip, owners, readers)
            if reason is None and _is_router(model, name):
                reason = "router of a mixture of experts"
        else:
            report.skipped |= dict.fromkeys(_stacks_of_strangers(name, module), _NOT_SERVED)
            continue
        if reason is None:
            names.append(name)
        else:
            report.skipped[name] = reason
    return names


_NOT_SERVED = "stacked matrices, and their module does not run experts through transformers' interface"


def _stacks_of_strangers(name: str, module: nn.Module) -> list[str]:
    """Stacked matrices of experts that QuantExperts does not serve: most of such a model would stay as it is."""
    if "experts" not in name.split(".") or isinstance(module, PACKED_MODULES):
        return []
    return [f"{name}.{key}" for key, value in module._parameters.items() if value is not None and value.dim() == 3]


def _is_router(model: nn.Module, name: str) -> bool:
    parent, _, leaf = name.rpartition(".")
    return leaf in _ROUTERS and hasattr(model.get_submodule(parent), "experts")


def _experts_reason(name: str, module: nn.Module, skip: Sequence[str], owners: dict[int, list[str]]) -> str | None:
    """Why the experts of a mixture are left alone, or None."""
    if isinstance(module, QuantExperts):
        return "already packed"
    matched = next((pattern for pattern in skip if matches(name, pattern)), None)
    if matched is not None:
        return f"matches skip={matched!r}"
    for stack in map(module.get_parameter, stack_names(module)):
        others = [other for other in owners[id(stack)] if other != name]
        if others:
            return f"its weights are tied to {', '.join(others)}"
        if stack.dtype not in DTYPES.values():
            return f"its weights are {stack.dtype}"
    return None


def _reason(
    name: str, module: nn.Module, skip: Sequence[str], owners: dict[int, list[str]], readers: dict[str, str]
) -> str | None:
    """Why a layer is left alone, or None."""
    matched = next((pattern for pattern in skip if matches(name, pattern)), None)
    if isinstance(module, PackedModule):
        return "already packed"
    if matched is not None:
        return f"matches skip={matched!r}"
    kind = nn.Linear if isinstance(module, nn.Linear) else nn.Embedding
    if type(module).forward is not kind.forward or "forward" in vars(module):
        return f"{type(module).__name__} has a forward of its own"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a parameter (parametrization)"
    for prefix, reader in readers.items():
        if not prefix or name.startswith(f"{prefix}."):
            return f"{reader} reads its weight without calling it"
    others = [other for other in owners[id(weight)] if other != name]
    if others:
        return f"its weight is tied to {', '.join(others)}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm rewrites its rows"
    if weight.dtype not in DTYPES.values():
        return f"its weight is {weight.dtype}"
    return None


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` means the layer ``name``: see ``skip`` of quantize_model."""
    if any(character in pattern for character in "*?["):
        return fnmatchcase(name, pattern)
    return f"{name}.".startswith(f"{pattern}.") or f".{name}".endswith(f".{pattern}")


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold each parameter, by its identity."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def _weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices of a layer, or the stacks of experts, by name."""
    names = stack_names(module) or ("weight",)
    return {name: module.get_parameter(name) for name in names}


def _check_values(model: nn.Module, names: Sequence[str], device: torch.device | str | int | None) -> None:
    weights = {f"{name}.{key}": part for name in names for key, part in _weights(model.get_submodule(name)).items()}
    for name, weight in weights.items():
        if weight.is_meta:
            got = f"the meta tensor {name}, which has no values"
            raise invalid("model", got, "a model with loaded weights")
        backend_of(weight.device if device is None else torch.empty(0, device=device).device)


def _replace_one(
    model: nn.Module,
    name: str,
    device: torch.device | str | int | None,
    options: dict[str, Any],
    of_products: dict[str, Any],
    report: Report,
) -> None:
    module = model.get_submodule(name)
    if device is not None:
        module.to(device)
    new: QuantLinear | QuantEmbedding | QuantExperts
    with _naming(name):
        if isinstance(module, nn.Linear):
            new = QuantLinear.from_linear(module, **of_products, **options)
        elif isinstance(module, nn.Embedding):
            new = QuantEmbedding.from_embedding(module, **options)
        else:
            of_experts = {key: of_products[key] for key in ("compute_dtype", "activation")}
            new = QuantExperts.from_experts(module, **of_experts, **options)
    packed = new.stacks if isinstance(new, QuantExperts) else {"weight": new.packed}
    for key, weight in _weights(module).items():
        row_name = f"{name}.{key}" if isinstance(new, QuantExperts) else name
        source = matrices(module, weight) if isinstance(new, QuantExperts) else weight
        error = relative_error(source, packed[key])
        report.rows.append(ReportRow(row_name, tuple(source.shape), weight.nbytes, packed[key].nbytes, error))
    replace_module(model, module, new)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Adds the layer's name to the message of an InvalidArgument."""
    try:
        yield
    except InvalidArgument as error:
        raise InvalidArgument(f"{name}.weight: {error}") from error


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts ``new`` wherever ``model`` has ``old``, with its hooks."""
    if isinstance(old, QuantLinear) and old.fused_group is not None:
        old.fused_group.leave()
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    for parent in model.modules():
        for child, module in list(parent._modules.items()):
            if module is old:
                parent._modules[child] = new


def _progress(names: list[str], shown: bool) -> Iterable[str]:
    if not shown:
        return names
    from tqdm.auto import tqdm

    bar: Iterable[str] = tqdm(names, desc="quantize", unit="layer")
    return bar


def _why_nothing(report: Report) -> str:
    if not report.skipped:
        return ": the model has no nn.Linear"
    return "".join(f"\n  {name}: {reason}" for name, reason in report.skipped.items())
