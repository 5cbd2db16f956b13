"""Putting fused norms in the place of a model's own.

Models write the same few norms under a hundred names. What a module computes is found by running its forward on random
numbers, with random parameters, and comparing the result with what each norm of ours gives: to the bit, but for the few
numbers whose sums, added in another order, fall on the other side of a rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_rs._norm_ops import NormKind
from lowbit_rs.nn.norm import RMSNorm, _Norm, from_parts
from lowbit_rs.packed import DTYPES

#: Where modules keep what they add to the mean square.
_EPS = ("variance_epsilon", "eps", "epsilon")
#: Dtypes of x and of the parameters in a trial.
_TRIALS = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)
#: Numbers of a trial, and the share of them that may come out on the other side of a rounding.
_NUMBERS = 512
_ODD_SHARE = 0.05
#: Most distance in units of the dtype's eps: a rounding of the normalized number and one of the product, each on the
#: other side.
_ODD_EPS = 2.0


def is_norm(module: nn.Module) -> bool:
    """Whether a module looks like a norm: its name, and nothing in it but a weight and perhaps a bias."""
    parameters = {name for name, value in module._parameters.items() if value is not None}
    has_more = any(True for _ in module.children()) or any(True for _ in module.buffers())
    return (
        "Norm" in type(module).__name__ and "weight" in parameters and parameters <= {"weight", "bias"} and not has_more
    )


def fused(module: nn.Module) -> _Norm | str:
    """The fused norm that computes what ``module`` does and holds its parameters, or why there is none."""
    if isinstance(module, _Norm):
        return "already fused"
    if "forward" in vars(module):
        return "its forward was replaced"
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    if weight is None or weight.dtype not in DTYPES.values():
        return f"its weight is {None if weight is None else weight.dtype}"
    kind = _kind_of_torch(module) or _kind_of_stranger(module, weight, bias)
    if kind is None:
        return f"{type(module).__name__} computes none of the norms that there are kernels for"
    is_torchs = isinstance(module, nn.LayerNorm | nn.RMSNorm)
    new = from_parts(kind, weight, bias, module.normalized_shape if is_torchs else None)
    new.casts_under_autocast = is_torchs and new.casts_under_autocast
    new.train(module.training)
    return new


def _kind_of_torch(module: nn.Module) -> NormKind | None:
    """The kind of a norm of torch's own."""
    for kind in (nn.LayerNorm, nn.RMSNorm):
        if isinstance(module, kind) and type(module).forward is kind.forward:
            eps = RMSNorm(1, module.eps, device="meta").kind.eps
            return NormKind(eps, centered=kind is nn.LayerNorm)
    return None


def _kind_of_stranger(module: nn.Module, weight: Tensor, bias: Tensor | None) -> NormKind | None:
    """The kind that gives what a module's forward does in every trial."""
    eps = next((value for value in (getattr(module, name, None) for name in _EPS) if isinstance(value, float)), None)
    if eps is None or weight.dim() != 1:
        return None
    kinds = [NormKind(eps, False, unit, cast) for cast in (True, False) for unit in (False, True)]
    kinds += [NormKind(eps, True, unit, False) for unit in (False, True)]
    if bias is not None:
        kinds = [kind for kind in kinds if kind.centered]
    for x_dtype, dtype in _TRIALS:
        kinds = _matching(module, kinds, x_dtype, dtype, weight.shape[0], bias is not None)
    return kinds[0] if kinds else None


@torch.no_grad()
def _matching(
    module: nn.Module, kinds: Sequence[NormKind], x_dtype: torch.dtype, dtype: torch.dtype, width: int, has_bias: bool
) -> list[NormKind]:
    """Those of ``kinds`` that give what the module does, for x and parameters of these dtypes."""
    generator = torch.Generator().manual_seed(width)
    # A mean that matters, and rows of lengths that eps matters beside.
    shape = (2, -(-_NUMBERS // max(width, 1)), width)
    x = torch.randn(shape, generator=generator) + 0.5
    x = (x * torch.logspace(-3, 1, shape[1])[:, None]).to(x_dtype)
    columns = {"weight": torch.randn(width, generator=generator).to(dtype)}
    if has_bias:
        columns["bias"] = torch.randn(width, generator=generator).to(dtype)
    theirs = _run(module, x, columns)
    return [kind for kind in kinds if theirs is not None and _agree(_ours(kind, x, columns), theirs)]


def _run(module: nn.Module, x: Tensor, columns: dict[str, Tensor]) -> Tensor | None:
    """What the module's class gives for x with other parameters, without hooks; None where it cannot be run so."""
    twin: Any = copy.copy(module)
    twin._parameters = {name: nn.Parameter(value, requires_grad=False) for name, value in columns.items()}
    try:
        result = type(module).forward(twin, x)
    except Exception:  # whatever a stranger's code raises: then it is no norm of ours
        return None
    return result if isinstance(result, Tensor) else None


def _ours(kind: NormKind, x: Tensor, columns: dict[str, Tensor]) -> Tensor:
    weight, bias = columns["weight"], columns.get("bias")
    parameters = [None if column is None else nn.Parameter(column, requires_grad=False) for column in (weight, bias)]
    norm = from_parts(kind, *parameters)  # type: ignore[arg-type]  # there is a weight
    result: Tensor = norm(x)
    return result


def _agree(mine: Tensor, theirs: Tensor) -> bool:
    if mine.dtype != theirs.dtype or mine.shape != theirs.shape:
        return False
    eps = torch.finfo(mine.dtype).eps
    if mine.dtype == torch.float32:
        return torch.allclose(mine, theirs, rtol=64 * eps, atol=64 * eps)
    odd = (mine != theirs).float().mean()
    return float(odd) <= _ODD_SHARE and torch.allclose(mine.float(), theirs.float(), rtol=_ODD_EPS * eps, atol=eps)
