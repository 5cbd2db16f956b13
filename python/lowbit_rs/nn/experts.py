"""QuantExperts: the experts of a mixture, as transformers fuses them, with packed weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_rs._native import Spec
from lowbit_rs._ops import check_activation
from lowbit_rs.errors import LowbitError, invalid, unsupported
from lowbit_rs.functional import CodebookLike, packed_linear_grouped, quantize
from lowbit_rs.nn._base import cast_of, keeping_dtypes, misfit
from lowbit_rs.packed import FIELDS, BlockSize, PackedWeight, Scheme, describe, dtype_name, make_spec, state_key

#: How a module of experts says what it computes: the attributes that transformers' ``use_experts_implementation`` sets.
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")

#: What every module has in its ``__dict__``, and what is not taken over from the module that is replaced.
_MODULE_STATE = frozenset(vars(nn.Module()))


def stack_names(module: nn.Module) -> tuple[str, ...]:
    """The stacked matrices of a module of experts that QuantExperts can stand in for; none for any other module.

    Such a module holds all its experts in two Parameters, ``gate_up_proj`` (or ``up_proj`` where it has no gate) and
    ``down_proj``, both 3-D, and says by its flags how they are laid out.
    """
    if not all(isinstance(getattr(module, flag, None), bool) for flag in _FLAGS):
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    stacks = [module._parameters.get(name) for name in names]
    return names if all(stack is not None and stack.dim() == 3 for stack in stacks) else ()


class QuantExperts(nn.Module):
    """All experts of a mixture, with their matrices in 4 or 8 bits.

    It takes the place of a module of transformers (``MixtralExperts``, ``Qwen3MoeExperts``, ``GptOssExperts``, ...) and
    keeps everything of it but the matrices: flags, biases, activation, gate. Those are frozen Parameters under the
    names that the module had, ``gate_up_proj`` and ``down_proj``, with ``gate_up_proj_scale`` and so on beside them.
    Rows are outputs and columns inputs, [experts, outputs, inputs], also where the module has them transposed.

    ``forward(hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k])`` gives [T, H] in the dtype of
    ``hidden_states``. The tokens of an expert are multiplied with its packed matrix as they are; experts without tokens
    are not touched. Sums over the k experts of a token are fp32 where the routing weights are.
    """

    dtype: torch.dtype
    compute_dtype: torch.dtype | None
    activation: str
    has_gate: bool
    has_bias: bool
    act_fn: Callable[[Tensor], Tensor]
    #: By stack: adapters that are added to its products, a [experts, r, inputs], b [experts, outputs, r] and a factor.
    adapters: dict[str, list[tuple[Tensor, Tensor, float]]]
    post_expert_norm: Callable[[Tensor], Tensor]
    #: The class of the module that this one stands for; its gate is called as it is.
    _kind: Any
    #: Of each stack: spec, scheme, shape, fields.
    _stacks: dict[str, tuple[Spec, Scheme, list[int], tuple[str, ...]]]

    @classmethod
    def from_experts(
        cls,
        experts: nn.Module,
        format: str = "nf4",
        block_size: BlockSize = 64,
        double_quant: bool = False,
        codebook: CodebookLike | None = None,
        nonfinite: str = "error",
        *,
        compute_dtype: torch.dtype | None = None,
        activation: str = "none",
        scale_dtype: torch.dtype | None = None,
        block_order: str = "row",
        signed_absmax: bool = False,
    ) -> QuantExperts:
        """The module ``experts`` with packed matrices. Options as in lowbit_rs.quantize and QuantLinear.

        Raises InvalidArgument for a module without stacked experts, for matrices without values (meta device), and as
        quantize.
        """
        packed = {}
        for name in _require_stacks(experts):
            packed[name] = quantize(
                matrices(experts, experts.get_parameter(name)),
                format,
                block_size,
                double_quant,
                codebook,
                nonfinite,
                scale_dtype=scale_dtype,
                block_order=block_order,
                signed_absmax=signed_absmax,
            )
        return cls.from_packed(experts, packed, compute_dtype=compute_dtype, activation=activation)

    @classmethod
    def from_packed(
        cls,
        experts: nn.Module,
        packed: Mapping[str, PackedWeight],
        *,
        compute_dtype: torch.dtype | None = None,
        activation: str = "none",
    ) -> QuantExperts:
        """The module ``experts`` with the stacks ``packed`` [experts, outputs, inputs] in place of its own, by name."""
        names = _require_stacks(experts)
        if set(packed) != set(names):
            raise invalid("packed", sorted(packed), f"the stacks {', '.join(names)}")
        if compute_dtype is not None:
            dtype_name(compute_dtype, "compute_dtype")
        check_activation(activation)
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        _take_over(experts, new, without=names)
        new._kind = type(experts)
        new.compute_dtype = compute_dtype
        new.activation = activation
        new.adapters = {}
        new.dtype = packed["down_proj"].dtype
        new._stacks = {}
        for name in names:
            new._hold(name, packed[name])
        return new

    def _hold(self, name: str, packed: PackedWeight) -> None:
        if len(packed.shape) != 3:
            raise invalid(name, f"shape {list(packed.shape)}", "a stack [experts, outputs, inputs]")
        if packed.data.dim() == 1:
            raise unsupported(f"{name}: experts whose blocks run on from one into the next", 'use block_order="row"')
        tensors = packed.tensors()
        for field in FIELDS:
            tensor = tensors.get(field)
            parameter = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
            self.register_parameter(state_key(name, field), parameter)
        self._stacks[name] = (packed.spec, packed.scheme, list(packed.shape), tuple(tensors))

    @property
    def stacks(self) -> dict[str, PackedWeight]:
        """The packed matrices by name; they share memory with the parameters."""
        packed = {}
        for name, (spec, scheme, shape, fields) in self._stacks.items():
            tensors = dict(zip(fields, (tensor.detach() for tensor in self._tensors(name)), strict=True))
            # The storage of scales is what it is, whatever a cast by someone else made of it.
            source = tensors.get("shift") if spec.double_quant else tensors["scale"]
            if source is not None:
                spec = make_spec(scheme, dtype_name(source.dtype), spec.signed_absmax)
            packed[name] = PackedWeight.from_tensors(spec, shape, self.dtype, tensors)
        return packed

    def _tensors(self, name: str) -> list[Tensor]:
        fields = self._stacks[name][3]
        return [self.get_parameter(state_key(name, field)) for field in fields]

    def to_experts(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The module that this one stands for, with dequantized matrices in ``dtype`` or that of this module."""
        experts: nn.Module = self._kind.__new__(self._kind)
        nn.Module.__init__(experts)
        own = [state_key(name, field) for name in self._stacks for field in FIELDS]
        _take_over(
            self, experts, without=(*own, "_kind", "_stacks", "dtype", "compute_dtype", "activation", "adapters")
        )
        for name, packed in self.stacks.items():
            weight = matrices(self, packed.dequantize(dtype)).contiguous()
            experts.register_parameter(name, nn.Parameter(weight))
        for name, bias in list(experts.named_parameters(recurse=False)):
            if name not in self._stacks:
                copy = bias.detach().to(self.dtype if dtype is None else dtype, copy=True)
                experts.register_parameter(name, nn.Parameter(copy))
        return experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts: see the class. An index beyond the experts adds nothing."""
        tokens, choices = top_k_index.shape
        expert_ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
        experts = torch.arange(self._stacks["down_proj"][2][0], device=expert_ids.device)
        counts = (expert_ids[:, None] == experts).sum(0)
        expert_ids = expert_ids.clamp(max=len(experts) - 1)
        first = "gate_up_proj" if self.has_gate else "up_proj"
        y = self._multiply(first, hidden_states[order // choices], expert_ids, counts)
        y = self._kind._apply_gate(self, y) if self.has_gate else self.act_fn(y)
        y = self._multiply("down_proj", y, expert_ids, counts)
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        weighted = y * top_k_weights.reshape(-1)[order, None]
        # Back in the order of tokens, and summed without atomics: the same bits on every run.
        weighted = weighted[torch.argsort(order)]
        return weighted.view(tokens, choices, -1).sum(1).to(hidden_states.dtype)

    def _multiply(self, name: str, x: Tensor, expert_ids: Tensor, counts: Tensor) -> Tensor:
        """Rows x [S, inputs] times the matrix of each row's expert, plus its bias: [S, outputs]."""
        _spec, scheme, shape, _fields = self._stacks[name]
        how = self.compute_dtype, self.activation
        y = packed_linear_grouped(x, counts, self._tensors(name), shape, scheme, *how)
        for a, b, factor in self.adapters.get(name, ()):
            y = y + (factor * _low_rank(x.to(a.dtype), counts, a, b)).to(y.dtype)
        if self.has_bias:
            y = y + self.get_parameter(f"{name}_bias")[expert_ids]
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves the packed parameters where ``fn`` moves tensors, but never changes their dtype."""
        packed = [tensor for name in self._stacks for tensor in self._tensors(name)]
        cast = cast_of(fn, self.dtype, packed[0].device)
        super()._apply(keeping_dtypes(fn, packed), recurse)  # type: ignore[no-untyped-call]
        self.dtype = cast
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """As in torch, but that tensors of another format are refused and not converted."""
        error_messages = lists[-1]
        for name, stack in self.stacks.items():
            try:
                problem = misfit(stack.spec, prefix + name, state_dict)
            except LowbitError as error:
                problem = str(error)
            if problem is not None:
                error_messages.append(f"{prefix}{name}: {problem}")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def extra_repr(self) -> str:
        """The stacks and how they are packed."""
        stacks = [f"{name}={shape}" for name, (_, _, shape, _) in self._stacks.items()]
        rounded = "" if self.activation == "none" else f", activation={self.activation}"
        return f"{self._kind.__name__}, {', '.join(stacks)}, {describe(self.stacks['down_proj'].spec)}{rounded}"


def _low_rank(x: Tensor, counts: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Rows x [S, inputs], sorted by expert, times ``b[e] @ a[e]`` of their expert; rows beyond them become zero."""
    sizes = counts.tolist()
    *own, rest = x.split([*sizes, x.shape[0] - sum(sizes)])
    products = [rows @ down.T @ up.T for rows, down, up in zip(own, a, b, strict=True)]
    return torch.cat([*products, rest.new_zeros(rest.shape[0], b.shape[1])])


def matrices(experts: nn.Module, stack: Tensor) -> Tensor:
    """A stack of ``experts`` with rows as outputs, or one with rows as outputs as ``experts`` has it: a view."""
    return stack.transpose(1, 2) if experts.is_transposed else stack


def _require_stacks(experts: object) -> tuple[str, ...]:
    names = stack_names(experts) if isinstance(experts, nn.Module) else ()
    if not names:
        raise invalid("experts", type(experts).__name__, "a module of stacked experts, as transformers has them")
    return names


def _take_over(old: nn.Module, new: nn.Module, without: tuple[str, ...]) -> None:
    """Gives ``new`` the parameters, buffers, modules and attributes of ``old``."""
    for name, parameter in old._parameters.items():
        if name not in without:
            new.register_parameter(name, parameter)
    new._buffers.update(old._buffers)
    new._modules.update(old._modules)
    for name, value in vars(old).items():
        if name not in _MODULE_STATE and name not in without:
            new.__dict__[name] = value
    new.train(old.training)
