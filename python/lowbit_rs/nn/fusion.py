"""Layers that see the same input, multiplied in one go: q, k and v of an attention, gate and up of a gated MLP.

Rows of packed weights are independent, so matrices that lie one behind the other in memory are one matrix with more
rows. Fusing puts the tensors of such layers side by side; every layer keeps its own parameters, and nothing is stored
twice. The first layer that is called with an input multiplies for all of them, the others take their part.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from lowbit_rs._backends import Backend, SharedRows, backend_of
from lowbit_rs._ops import check_linear
from lowbit_rs.errors import LowbitError
from lowbit_rs.functional import is_unwatched, joined_input, joined_linear
from lowbit_rs.nn.linear import QuantLinear
from lowbit_rs.nn.report import Fusion
from lowbit_rs.nn.rounded_rows import Wish, rows_of_origin, version_of
from lowbit_rs.packed import state_key, why_not_joined

#: Names of layers within one module that get the same input, in the order in which they are called.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

#: Modules whose q_proj gets another input than their k_proj and v_proj.
_CROSS_ATTENTION = ("cross_attn", "cross_attention", "crossattention", "encoder_attn", "encoder_attention")

#: Products in a row of which not all parts were taken, after which a group takes it that its layers are called with
#: different inputs.
_MAX_UNTAKEN = 16

#: Parameters of a layer that its rows are in.
_ROW_KEYS = tuple(state_key("weight", name) for name in ("data", "scale", "scale_2", "shift"))


@dataclass(slots=True)
class _Call:
    """What was made for several members, and which of them are yet to take their part."""

    x: Tensor
    version: int | None
    context: Any
    made: Tensor | SharedRows  # the product for all members, or x rounded for their products
    waiting: int  # a bit for each member
    dtype: torch.dtype

    def has(self, place: int, x: Tensor, context: Any) -> bool:
        """Whether the part at ``place`` is there, of a product with x as it is now."""
        is_same = self.x is x and self.version == version_of(x) and self.context == context
        return is_same and bool(self.waiting >> place & 1)


class FusedGroup:
    """QuantLinear layers whose weights lie one behind the other in memory.

    The first member that is called with an input multiplies for all. The others' parts are kept for the thread until
    they are taken: by a call with the very same tensor, unchanged since, on the same stream, under the same autocast.
    Where somebody watches operators (autograd, torch.compile and other tracers, tensor subclasses, dispatch modes),
    members multiply one by one, as without a group.

    A tensor that was made in inference mode does not count its changes: members then rely on the model not to write
    into it between their calls. No model that can be trained does: autograd keeps that tensor for gradients.

    Copies and pickles of layers hold groups of their own. Where weights are moved or replaced, they are put side by
    side again; where they could not be (weights on several devices, say), layers multiply one by one.
    """

    def __init__(self, size: int) -> None:
        self.members: list[QuantLinear | None] = [None] * size
        self._local = threading.local()
        self._untaken = 0
        #: What the view was made of; the view and its backend, or None where the weights do not make one.
        self._made: tuple[list[Any], tuple[Backend[Any], Any] | None] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Without its members: each one enters as it is copied or unpickled.
        return FusedGroup, (len(self.members),)

    def enter(self, place: int, member: QuantLinear) -> None:
        """Makes ``member`` the one at ``place``, unless there is one already."""
        if self.members[place] is None:
            self.members[place] = member
            self.join()

    def leave(self) -> None:
        """Makes all members layers like any other."""
        members, self.members = self.members, [None] * len(self.members)
        for member in members:
            if member is not None and member.fused_group is self:
                member.fused_group = None

    def join(self) -> str | None:
        """Puts the members' weights one behind the other. Gives the reason where that cannot be, or None."""
        members = [member for member in self.members if member is not None]
        if len(members) < len(self.members):
            return "some of the layers are missing"
        self._made = None
        why = _why_not(members)
        if why is None and self._view(members) is None:
            for key in _ROW_KEYS:
                _put_side_by_side([member._parameters.get(key) for member in members])
            self._view(members)  # now, since it cannot be made while a CUDA graph is captured
        return why

    def part(self, place: int, member: QuantLinear, x: Tensor) -> Tensor | None:
        """``member(x)`` for the member at ``place``, or None where it is to multiply by itself."""
        members = self.members
        if members[place] is not member or not _is_plain(x, members):
            return None
        is_joined = x.numel() <= backend_of(x.device).MAX_JOINED_TOKENS * member.in_features
        if not is_joined and member.activation == "none":
            return None
        context = _context(x)
        call: _Call | None = getattr(self._local, "call", None)
        if call is None or not call.has(place, x, context):
            self._local.call = None
            make = self._multiply if is_joined else self._round
            call = None if call is not None and self._gives_up() else make(members, x, context)
            if call is None or not call.waiting >> place & 1:
                return None
        call.waiting &= ~(1 << place)
        self._local.call = call if call.waiting else None
        if not call.waiting:
            self._untaken = 0
        if not isinstance(call.made, Tensor):
            return call.made.linear(member._view(), member._parameters["bias"]).to(call.dtype)
        start = sum(other.out_features for other in members[:place] if other is not None)
        return call.made.narrow(-1, start, member.out_features)

    def _gives_up(self) -> bool:
        """Counts a product of which parts were left; whether there have been too many."""
        self._untaken += 1
        if self._untaken < _MAX_UNTAKEN:
            return False
        warnings.warn("fused layers are called with different inputs: each multiplies alone from here on", stacklevel=6)
        self.leave()
        return True

    def _multiply(self, members: Sequence[Any], x: Tensor, context: Any) -> _Call | None:
        """The product for all members, or None where their weights are not one."""
        made = None if None in members else self._view(members)
        if made is None:
            return None
        first = members[0]
        bias = None
        if first._parameters["bias"] is not None:
            bias = torch.cat([member._parameters["bias"] for member in members])
        shape = [sum(member.out_features for member in members), first.in_features]
        permutation = first._parameters["weight_permutation"]
        rounding = first.activation, first.threshold or 0.0
        out = joined_linear(x, *made, first._tensors(), shape, bias, first.compute_dtype, permutation, rounding)
        return _Call(x, version_of(x), context, out, (1 << len(members)) - 1, out.dtype)

    def _round(self, members: Sequence[Any], x: Tensor, context: Any) -> _Call | None:
        """x rounded for the products of the members, or None where they do not take it so."""
        if None in members or self._view(members) is None:
            return None
        first = members[0]
        permutation = first._parameters["weight_permutation"]
        values, dtype = joined_input(x, first.in_features, first.compute_dtype, permutation)
        check_linear(values, first._parameters["bias"], first._tensors(), first._shape)
        backend, threshold = backend_of(x.device), first.threshold or 0.0
        firsts = [backend.rounded_from(member._view(), first.activation, values.dtype) for member in members]
        taken = [least for least in firsts if least is not None and least * first.in_features <= values.numel()]
        if len(taken) < 2:
            return None
        wish = Wish(threshold, max(taken))
        rows = backend.shared_rows(values, threshold, rows_of_origin(x, wish) if values is x else None)
        if rows is None:
            return None
        waiting = sum(1 << place for place, least in enumerate(firsts) if least in taken)
        return _Call(x, version_of(x), context, rows, waiting, dtype)

    def _view(self, members: Sequence[QuantLinear]) -> tuple[Backend[Any], Any] | None:
        """Backend and view of the joined weight, made anew where a layer is not what it was; None without one."""
        state: list[Any] = []
        for member in members:
            parameters = member._parameters
            bias = parameters["bias"]
            state += [*_rounding(member), None if bias is None else bias.dtype]
            for key in member._keys:
                tensor: Any = parameters[key]
                state += [tensor.data_ptr(), tensor.numel(), tensor.dtype, version_of(tensor)]
        if self._made is not None and self._made[0] == state:
            return self._made[1]
        if members[0].weight.is_meta:  # offloaded
            return None
        backend = backend_of(members[0].weight.device)
        if not backend.may_wait():
            return None
        view = _view_of(members, backend)
        made = None if view is None else (backend, view)
        self._made = state, made
        return made


def _view_of(members: Sequence[QuantLinear], backend: Backend[Any]) -> Any:
    """A backend's view of the members' weights as one, or None where they do not make one."""
    try:
        if _why_not(members) is not None:
            return None
        parts = [member.packed.tensors() for member in members]
        shape = [sum(member.out_features for member in members), members[0].in_features]
        return backend.joined_view(members[0].spec, shape, parts)
    except LowbitError:  # a layer whose parameters do not fit each other says so when it multiplies
        return None


def _is_plain(x: Tensor, members: Sequence[QuantLinear | None]) -> bool:
    """Whether nobody watches operators on x, and no gradient is recorded."""
    if not is_unwatched(x, None):
        return False
    if not torch.is_grad_enabled():
        return True
    biases = [None if member is None else member._parameters["bias"] for member in members]
    return not any(bias is not None and bias.requires_grad for bias in biases)


def _context(x: Tensor) -> Any:
    """What a product depends on beside x and the weights."""
    device = x.device
    cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return cast, backend_of(device).queue(device)


def _rounding(member: QuantLinear) -> tuple[Any, ...]:
    """How a layer rounds its activations."""
    return member.compute_dtype, member.activation, member.threshold or 0.0


def _why_not(members: Sequence[QuantLinear]) -> str | None:
    """Why these layers cannot be multiplied as one, wherever their weights lie; None where they can."""
    first = members[0]
    for member in members:
        if type(member).forward is not QuantLinear.forward:
            return f"{type(member).__name__} has a forward of its own"
        if _rounding(member) != _rounding(first):
            return "their activations are rounded differently"
        if (member.bias is None) != (first.bias is None) or (
            first.bias is not None and member.bias.dtype != first.bias.dtype
        ):
            return "their biases differ in kind"
        for tensor in member._tensors():
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
                return "their weights are not in memory as plain tensors"
            if tensor.is_inference():
                return "their weights were made in inference mode, which keeps no track of changes"
            if tensor.device.type == "cpu" and tensor.is_shared():
                return "their weights are shared with other processes"
    return why_not_joined([member.packed for member in members])


@torch.inference_mode(False)
@torch.no_grad()
def _put_side_by_side(parameters: Sequence[nn.Parameter | None]) -> None:
    """Moves the tensors [N_1, ...], [N_2, ...], ... into one piece of memory, one behind the other."""
    tensors = [parameter for parameter in parameters if parameter is not None]
    if not tensors:
        return
    whole = torch.cat([tensor.detach() for tensor in tensors])
    start = 0
    for tensor in tensors:
        rows = tensor.shape[0]
        # By way of DLPack each has a storage of its own: what saves models takes tensors of one storage for tied ones.
        tensor.data = from_dlpack(whole[start : start + rows])
        start += rows


def fuse_model(model: nn.Module) -> Fusion:
    """Fuses the packed layers of ``model`` that get the same input: q, k and v of attentions, gate and up of MLPs.

    In place; layers keep their names, parameters and files. A fused group is one product where there were two or three,
    which pays where a product is small: few tokens, or a small model. See docs/fusion.md. Layers are looked for by the
    names that Llama, Qwen, Mistral and their kin have: ``q_proj``, ``k_proj``, ``v_proj``; ``gate_proj``, ``up_proj``.
    Their weights have to be packed alike (format, block size, storage of scales, number of columns), and lie on one
    device. Calling this again takes in what has been added or changed.
    """
    fusion = Fusion()
    for names, layers in _siblings(model):
        group = layers[0].fused_group
        if group is None or group.members != layers:
            for layer in layers:
                if layer.fused_group is not None:
                    layer.fused_group.leave()
            group = FusedGroup(len(layers))
        group.members[:] = layers
        why = "cross-attention: their inputs differ" if _is_cross_attention(names[0]) else group.join()
        if why is None:
            for place, layer in enumerate(layers):
                layer.fused_group, layer.fused_place = group, place
            fusion.groups.append(names)
        else:
            group.leave()
            fusion.skipped[names] = why
    return fusion


def _siblings(model: nn.Module) -> Iterator[tuple[tuple[str, ...], list[QuantLinear]]]:
    for prefix, parent in model.named_modules():
        for names in _SIBLINGS:
            children = [_without_adapters(parent._modules.get(name)) for name in names]
            layers = [child for child in children if isinstance(child, QuantLinear)]
            if len(layers) == len(names):
                yield tuple(f"{prefix}.{name}" if prefix else name for name in names), layers


def _without_adapters(module: nn.Module | None) -> nn.Module | None:
    """The layer under the adapters of PEFT, which call it with the input that they get."""
    inner = None if module is None else getattr(module, "base_layer", None)
    return inner if isinstance(inner, nn.Module) else module


def _is_cross_attention(name: str) -> bool:
    return not set(_CROSS_ATTENTION).isdisjoint(name.split("."))
