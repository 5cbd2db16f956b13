"""What layers with a packed weight have in common: its parameters, and what torch does with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_rs._native import Spec
from lowbit_rs.errors import LowbitError
from lowbit_rs.functional import CodebookLike, as_codebook, make_scheme, quantize, resolve_format
from lowbit_rs.packed import (
    DTYPES,
    FIELDS,
    BlockSize,
    PackedWeight,
    Scheme,
    describe,
    dtype_name,
    field_dtypes,
    make_spec,
    state_key,
    storage,
)

#: Key under which a module's entry in the metadata of a state_dict says how its weight is packed.
_METADATA_KEY = "lowbit"

_PERMUTATION = state_key("weight", "permutation")

_STRADDLING = (
    'a weight in block_order="flat" whose rows are no whole number of blocks is multiplied several times slower; '
    "pack it again in the default block order, or with a block size that divides in_features"
)


class PackedModule(nn.Module):
    """A module with a packed matrix, held in frozen Parameters.

    They are ``weight`` (the codes), ``weight_scale``, and where the format has them ``weight_scale_2``,
    ``weight_scale_offset``, ``weight_shift``, ``weight_codebook`` and ``weight_permutation``: the fields of
    PackedWeight.

    ``dtype`` is that of :meth:`dequantize`; it follows ``.half()`` and ``.to(dtype)``, which leave the packed
    parameters as they are.
    """

    dtype: torch.dtype
    weight: Tensor
    weight_scale: Tensor
    weight_scale_2: Tensor | None
    weight_scale_offset: Tensor | None
    weight_shift: Tensor | None
    weight_codebook: Tensor | None
    weight_permutation: Tensor | None

    def _hold(self, packed: PackedWeight) -> None:
        """Makes ``packed`` the weight; parameters share its tensors."""
        self.dtype = packed.dtype
        self._shape = list(packed.shape)
        self._scheme: Scheme = packed.scheme
        self._spec = packed.spec
        tensors = packed.tensors()
        if packed.data.dim() == 1:
            warnings.warn(_STRADDLING, stacklevel=1)  # from this line, so that Python says it once
        for field in FIELDS:
            tensor = tensors.get(field)
            parameter = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
            self.register_parameter(state_key("weight", field), parameter)
        self._fields = tuple(tensors)
        self._keys = tuple(state_key("weight", field) for field in tensors)
        self._operand_keys = tuple(key for key in self._keys if key != _PERMUTATION)

    @property
    def spec(self) -> Spec:
        """How the weight is packed."""
        # The storage of scales is what it is, whatever a cast by someone else made of it.
        source = self.weight_shift if self._spec.double_quant else self.weight_scale
        if source is None:
            return self._spec
        return make_spec(self._scheme, dtype_name(source.dtype), self._spec.signed_absmax)

    @property
    def W_q(self) -> Tensor:  # noqa: N802
        """The codes, by the name at which PEFT knows a weight to be read through ``dequantize()``."""
        return self.weight

    @property
    def packed(self) -> PackedWeight:
        """The weight as a PackedWeight that shares memory with the parameters."""
        tensors = {field: getattr(self, key).detach() for field, key in zip(self._fields, self._keys, strict=True)}
        return PackedWeight.from_tensors(self.spec, self._shape, self.dtype, tensors)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in ``dtype``, by default that of the module."""
        return self.packed.dequantize(dtype)

    def reset_parameters(self) -> None:
        """Sets every weight to zero. A codebook and a permutation stay as they are."""
        for field, key in zip(self._fields, self._keys, strict=True):
            if field not in ("codebook", "permutation"):
                getattr(self, key).zero_()

    def _tensors(self) -> list[Tensor]:
        """The parameters of the weight in the order of fields: what operators take."""
        parameters = self._parameters  # not through __getattr__, which costs as much as a small product
        return [parameters[key] for key in self._operand_keys]  # type: ignore[misc]  # the keys of those that are there

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves the packed parameters where ``fn`` moves tensors, but never changes their dtype."""
        cast = cast_of(fn, self.dtype, self.weight.device)
        super()._apply(keeping_dtypes(fn, self._tensors()), recurse)  # type: ignore[no-untyped-call]
        self.dtype = cast
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Tensors alone cannot tell nf4 from fp4. torch.save keeps this beside them, without a key of its own.
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata[_METADATA_KEY] = list(self._scheme)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As in torch; and a float weight is quantized, and one that is packed in another way is refused."""
        weight = state_dict.get(prefix + "weight")
        try:
            if isinstance(weight, Tensor) and weight.is_floating_point():
                state_dict.update(self._pack_for_loading(weight, prefix, state_dict))
                if local_metadata.get("assign_to_params_buffers", False):
                    self.dtype = weight.dtype
            problem = self._misfit(state_dict, prefix, local_metadata.get(_METADATA_KEY))
        except LowbitError as error:
            problem = str(error)
        if problem is not None:
            error_msgs.append(f"{prefix}weight: {problem}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _pack_for_loading(self, weight: Tensor, prefix: str, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
        """The entries of a float weight that take its place in a state_dict."""
        beside = [prefix + key for key in self._keys[1:] if prefix + key in state_dict]
        if list(weight.shape) != self._shape or beside:
            got = f"a {weight.dtype} weight {list(weight.shape)}" + (f" beside {beside[0]}" if beside else "")
            raise LowbitError(f"got {got}, expected a float weight {self._shape} alone, or a packed one")
        packed = self.pack_like(weight)
        return {prefix + state_key("weight", field): tensor for field, tensor in packed.tensors().items()}

    def pack_like(self, weight: Tensor) -> PackedWeight:
        """A float matrix of this module's shape, packed as its weight is: the same format, and columns in its order."""
        return pack_like(weight, self.packed)

    def _misfit(self, state_dict: Mapping[str, Any], prefix: str, scheme: list[Any] | None) -> str | None:
        """Why the packed weight of a state_dict cannot be that of this module, where torch would not notice."""
        if scheme is not None and tuple(scheme) != self._scheme:
            theirs: Scheme = tuple(scheme)
            return f"got a weight packed as {describe(make_spec(theirs))}, expected {describe(self.spec)}"
        return misfit(self.spec, prefix + "weight", state_dict)


def keeping_dtypes(fn: Callable[[Tensor], Tensor], packed: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn``, what ``Module._apply`` gets, but that it leaves the tensors of ``packed`` their dtype."""
    own = {id(tensor) for tensor in packed}

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if id(tensor) in own and moved.dtype != tensor.dtype:
            return tensor.to(moved.device)
        return moved

    return move


def cast_of(fn: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What ``fn`` makes of ``dtype``, where a dequantized weight can have it."""
    cast = fn(torch.empty(0, dtype=dtype, device=device)).dtype
    return cast if cast in DTYPES.values() else dtype


def misfit(spec: Spec, name: str, state_dict: Mapping[str, Any]) -> str | None:
    """Why the parts of the weight ``name`` in a state_dict cannot be of ``spec``, where torch would convert them."""
    for field, dtype in field_dtypes(spec).items():
        key = state_key(name, field)
        tensor = state_dict.get(key)
        if not isinstance(tensor, Tensor) or tensor.dtype == dtype:
            continue
        # Copying would convert without a word. Between floats that is fine where nothing is lost.
        both_float = dtype.is_floating_point and tensor.is_floating_point()
        if not both_float or torch.promote_types(tensor.dtype, dtype) != dtype:
            return f"got {tensor.dtype} in {key}, expected {dtype} for {describe(spec)}"
    return None


def empty_packed(
    shape: list[int],
    format: str,
    block_size: BlockSize,
    double_quant: bool,
    codebook: CodebookLike | None,
    scale_dtype: torch.dtype | None,
    block_order: str,
    signed_absmax: bool,
    dtype: torch.dtype | None,
    device: torch.device | str | int | None,
    permuted: bool = False,
) -> PackedWeight:
    """A packed weight of zeros, for a module whose values are yet to be loaded."""
    scheme = make_scheme(resolve_format(format, codebook), block_size, block_order, double_quant)
    scale_name = "float32" if scale_dtype is None else dtype_name(scale_dtype, "scale_dtype")
    spec = make_spec(scheme, scale_name, signed_absmax)
    table = as_codebook(codebook) if spec.format == "custom" else None
    sizes = storage(spec, shape, None if table is None else table.numel(), permuted)
    tensors = {name: torch.zeros(size, dtype=dtype_, device=device) for name, (size, dtype_) in sizes.items()}
    if table is not None:
        tensors["codebook"] = table.to(tensors["data"].device)
    if permuted:
        tensors["permutation"] = torch.arange(shape[-1], dtype=torch.int32, device=device)
    return PackedWeight.from_tensors(spec, shape, torch.get_default_dtype() if dtype is None else dtype, tensors)


def pack_like(weight: Tensor, packed: PackedWeight) -> PackedWeight:
    """A float weight of the shape of ``packed``, in its format, and with columns in its order."""
    format, block_size, block_order, double_quant = packed.scheme
    permutation = packed.permutation
    new = quantize(
        weight if permutation is None else weight.index_select(-1, permutation),
        format,
        block_size or "row",
        double_quant,
        packed.codebook,
        scale_dtype=DTYPES[packed.spec.scale_dtype],
        block_order=block_order,
        signed_absmax=packed.spec.signed_absmax,
    )
    if permutation is None:
        return new
    return PackedWeight.from_tensors(new.spec, new.shape, new.dtype, new.tensors() | {"permutation": permutation})
