"""PackedWeight: a quantized matrix as plain tensors, and the shapes in which those are stored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from lowbit_rs import _native
from lowbit_rs._native import Spec
from lowbit_rs.errors import invalid, unsupported

BlockSize = int | Literal["row"]

#: Tensors of a packed weight. But for the permutation, which is for the columns of the product to undo, operators take
#: them in this order.
FIELDS = ("data", "scale", "scale_2", "scale_offset", "shift", "codebook", "permutation")

#: Those that a weight has one of, whatever its number of rows.
SHARED_FIELDS = ("scale_offset", "codebook", "permutation")

#: Floating-point dtypes of weights, activations and stored scales, by the names that the native module uses.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: Scales that share an entry of ``scale_2`` under double quantization.
_SCALES_PER_SCALE_2 = 256


def dtype_name(dtype: torch.dtype, argument: str = "dtype") -> str:
    """The native name of a floating-point dtype; raises InvalidArgument naming ``argument`` for any other dtype."""
    name = _NAMES.get(dtype)
    if name is None:
        raise invalid(argument, dtype, "torch.float32, torch.float16 or torch.bfloat16")
    return name


#: The parts of a Spec that the tensors of a weight do not show: format, block size (0 for whole rows), block order,
#: double quantization. Plain values, so that they can be arguments of an operator.
Scheme = tuple[str, int, str, bool]


@lru_cache(maxsize=1024)
def make_spec(scheme: Scheme, scale_dtype: str = "float32", signed_absmax: bool = False) -> Spec:
    """The Spec of these parts, made once: it is immutable, and every call of a layer asks for it."""
    format, block_size, block_order, double_quant = scheme
    return Spec(
        format,
        block_size or "row",
        block_order=block_order,
        scale_dtype=scale_dtype,
        double_quant=double_quant,
        signed_absmax=signed_absmax,
    )


def scheme_of(spec: Spec) -> Scheme:
    """The parts of ``spec`` that the tensors of a weight do not show."""
    block_size = 0 if spec.block_size == "row" else int(spec.block_size)
    return spec.format, block_size, spec.block_order, spec.double_quant


@lru_cache(maxsize=1024)
def field_dtypes(spec: Spec) -> dict[str, torch.dtype]:
    """The tensors that operators take of a weight under ``spec``, in the order of FIELDS, with their dtypes."""
    scale_dtype = DTYPES[spec.scale_dtype]
    dtypes = {
        "data": torch.int8 if spec.bits == 8 else torch.uint8,
        "scale": torch.uint8 if spec.double_quant else scale_dtype,
    }
    if spec.double_quant:
        dtypes |= {"scale_2": torch.float32, "scale_offset": torch.float32}
    if spec.has_shift:
        dtypes["shift"] = scale_dtype
    if spec.format == "custom":
        dtypes["codebook"] = torch.float32
    return dtypes


def storage(
    spec: Spec, shape: Sequence[int], codebook_length: int | None = None, permuted: bool = False
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor that a weight of ``shape`` ([N, K] or [experts, N, K]) has under ``spec``.

    Row-aligned codes and scales keep the leading dimensions of the weight; where blocks straddle rows they are 1-D.
    ``codebook_length`` is the number of values of a custom codebook, ``permuted`` whether columns are permuted.
    """
    *leading, cols = shape
    layout = spec.layout(math.prod(leading), cols)
    if layout.straddles_rows:
        data, scale = torch.Size([layout.code_bytes]), torch.Size([layout.block_count])
    else:
        data = torch.Size([*leading, layout.row_bytes])
        scale = torch.Size([*leading, layout.blocks_per_row])
    sizes = {
        "data": data,
        "scale": scale,
        "scale_2": torch.Size([-(-layout.block_count // _SCALES_PER_SCALE_2)]),
        "scale_offset": torch.Size([1]),
        "shift": scale,
        "codebook": torch.Size([codebook_length or 0]),
    }
    stored = {name: (sizes[name], dtype) for name, dtype in field_dtypes(spec).items()}
    return stored | {"permutation": (torch.Size([cols]), torch.int32)} if permuted else stored


def unpermuted(columns: Tensor, permutation: Tensor | None) -> Tensor:
    """The matrix whose column ``permutation[j]`` is column j of ``columns`` [..., K]; itself without a permutation."""
    if permutation is None:
        return columns
    return torch.empty_like(columns).index_copy_(-1, permutation.long(), columns)


def state_key(name: str, field_name: str) -> str:
    """The key of a field in a state_dict or file: ``data`` is ``name`` itself, ``scale`` is ``name_scale``, ..."""
    return name if field_name == "data" else f"{name}_{field_name}"


@dataclass(frozen=True, eq=False, repr=False)
class PackedWeight:
    """A matrix [N, K], or a stack of them [experts, N, K], stored in 4 or 8 bits.

    ``w[n, k] = scale[n, b] * codebook[code[n, k]] + shift[n, b]`` with ``b = k // block_size``. Tensors:

    - ``data``: the codes. uint8 [N, ceil(K / 2)] in 4 bits, the high nibble first, or int8 [N, K];
    - ``scale``: one a block, [N, ceil(K / block_size)] in ``spec.scale_dtype``, or uint8 codes of the dynamic map
      under double quantization, then with ``scale_2`` (float32, one for 256 scales) and ``scale_offset`` (float32 [1]);
    - ``shift``: like ``scale``, of uint4 and uint8 alone; ``codebook``: float32 [2..16], of custom formats alone;
    - ``permutation``: int32 [K], where columns were sorted before they were cut into blocks (GPTQ's desc_act). Column j
      of what the other tensors hold is then column ``permutation[j]`` of the weight; a product takes
      ``x[..., permutation]``.

    With ``block_order="flat"`` and K no multiple of the block size, ``data``, ``scale`` and ``shift`` are 1-D.
    ``shape`` is that of the matrix and ``dtype`` that of its source, which :meth:`dequantize` gives back. The tensors
    are shared with the caller, not copied; shapes and dtypes are checked (InvalidArgument).
    """

    spec: Spec
    shape: torch.Size
    dtype: torch.dtype
    data: Tensor
    scale: Tensor
    scale_2: Tensor | None = None
    scale_offset: Tensor | None = None
    shift: Tensor | None = None
    codebook: Tensor | None = None
    permutation: Tensor | None = None
    #: What the operators take beside the tensors; plain values, which tracing can read where it cannot read a Spec.
    scheme: Scheme = field(init=False)

    def __post_init__(self) -> None:
        if len(self.shape) not in (2, 3):
            raise invalid("shape", list(self.shape), "[N, K] or [experts, N, K]")
        dtype_name(self.dtype)
        object.__setattr__(self, "shape", torch.Size(self.shape))
        object.__setattr__(self, "scheme", scheme_of(self.spec))
        _check(self.spec, self.shape, self.tensors())

    @classmethod
    def from_tensors(
        cls, spec: Spec, shape: Sequence[int], dtype: torch.dtype, tensors: Mapping[str, Tensor]
    ) -> PackedWeight:
        """A packed weight of tensors keyed as :meth:`tensors` gives them. Raises InvalidArgument where they misfit."""
        for key in ("data", "scale"):
            if key not in tensors:
                raise invalid("tensors", sorted(tensors), f"the key {key!r} among them")
        unknown = sorted(set(tensors) - set(FIELDS))
        if unknown:
            raise invalid("tensors", unknown, f"keys among {', '.join(FIELDS)}")
        return cls(spec, torch.Size(shape), dtype, **tensors)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name."""
        parts = {name: getattr(self, name) for name in FIELDS}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def operands(self) -> list[Tensor]:
        """The tensors that operators take, in their order: all but the permutation."""
        return [tensor for name, tensor in self.tensors().items() if name != "permutation"]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix [N, K] (or [experts, N, K]) in ``dtype``, by default that of the source.

        Each value is the fp32 sum ``scale * codebook[code] + shift``, rounded once to ``dtype``.
        """
        dtype = self.dtype if dtype is None else dtype
        dtype_name(dtype)
        # Through torch's registry: the op is defined in a layer above this one, and traceable.
        dequantized: Tensor = torch.ops.lowbit_rs.dequantize.default(
            self.operands(), list(self.shape), *self.scheme, dtype
        )
        return unpermuted(dequantized, self.permutation)

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """``nbytes`` in bits over the number of weights; 0 for an empty matrix."""
        count = self.shape.numel()
        return 8 * self.nbytes / count if count else 0.0

    def __getitem__(self, index: int) -> PackedWeight:
        """Matrix ``index`` of a stack [experts, N, K], as a weight [N, K].

        It shares memory with the stack, but for double-quantized scales where those of a matrix are not a whole number
        of 256: these are restored to float32, with the same values. Raises InvalidArgument for a single matrix and for
        an index outside the stack, Unsupported where blocks run on from one matrix into the next.
        """
        if len(self.shape) != 3:
            raise invalid("index", f"{index!r} of a weight {list(self.shape)}", "a stack [experts, N, K]")
        if not isinstance(index, int) or not -self.shape[0] <= index < self.shape[0]:
            raise invalid("index", repr(index), f"a matrix of {self.shape[0]}")
        stack = self.tensors()
        operands = [stack.pop(name) for name in field_dtypes(self.spec)]
        tensors, scheme = matrix_of(operands, self.scheme, index % self.shape[0])
        scale_dtype = self.spec.scale_dtype if scheme == self.scheme else "float32"
        spec = make_spec(scheme, scale_dtype, self.spec.signed_absmax)
        parts = dict(zip(field_dtypes(spec), tensors, strict=True))
        return PackedWeight.from_tensors(spec, self.shape[1:], self.dtype, {**parts, **stack})

    def to(self, device: torch.device | str | int) -> PackedWeight:
        """This weight with its tensors on ``device``; itself where they are there already."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        if all(moved[name] is tensor for name, tensor in self.tensors().items()):
            return self
        return PackedWeight.from_tensors(self.spec, self.shape, self.dtype, moved)

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same bits under the same spec. Tensors on two devices raise, as in torch.equal."""
        if not isinstance(other, PackedWeight):
            return NotImplemented
        if (self.spec, self.shape, self.dtype) != (other.spec, other.shape, other.dtype):
            return False
        mine, theirs = self.tensors(), other.tensors()
        # As bytes: NaN equals itself and -0 differs from 0.
        return mine.keys() == theirs.keys() and all(
            mine[name].shape == theirs[name].shape and torch.equal(_bytes(mine[name]), _bytes(theirs[name]))
            for name in mine
        )

    __hash__ = None  # type: ignore[assignment]  # equality is by content, and tensors can change

    def __repr__(self) -> str:
        size = f"{self.bits_per_weight:.2f} bits/weight, {format_bytes(self.nbytes)}"
        return f"PackedWeight({describe(self.spec)}, shape={list(self.shape)}, {size}, {self.device})"


def matrix_of(tensors: Sequence[Tensor], scheme: Scheme, index: int) -> tuple[list[Tensor], Scheme]:
    """Matrix ``index`` of a stack [experts, N, K] in parts, and its scheme: see ``PackedWeight.__getitem__``."""
    fields = field_dtypes(make_spec(scheme))
    parts = dict(zip(fields, tensors, strict=True))
    if parts["data"].dim() != 3:
        raise unsupported(
            "a matrix of a stack", "blocks run on from one matrix into the next; pack with block_order row"
        )
    own = {name: part[index] if name in ("data", "scale", "shift") else part for name, part in parts.items()}
    if not scheme[3]:
        return list(own.values()), scheme
    count = own["scale"].numel()
    if count % _SCALES_PER_SCALE_2 == 0:
        groups = count // _SCALES_PER_SCALE_2
        own["scale_2"] = parts["scale_2"][index * groups : (index + 1) * groups]
        return list(own.values()), scheme
    own["scale"] = _restore_scales(own["scale"], index * count, own.pop("scale_2"), own.pop("scale_offset"))
    if "shift" in own:
        own["shift"] = own["shift"].to(torch.float32)  # scale and shift have one dtype
    return list(own.values()), (*scheme[:3], False)


def _restore_scales(codes: Tensor, start: int, scale_2: Tensor, offset: Tensor) -> Tensor:
    """float32 scales of double-quantized ``codes``, of which the first is number ``start`` of its weight."""
    table = torch.tensor(_native.dynamic_map(), dtype=torch.float32, device=codes.device)
    numbers = torch.arange(start, start + codes.numel(), device=codes.device).view(codes.shape)
    return table[codes.long()] * scale_2[numbers // _SCALES_PER_SCALE_2] + offset


def stacked_spec(spec: Spec) -> Spec:
    """How weights of ``spec`` are stored once they are one: double-quantized scales in float32, and shifts with them.

    Raises Unsupported where blocks run on from one row into the next.
    """
    if spec.block_order != "row":
        raise unsupported("stacking weights with block_order flat", "blocks run on from one row into the next")
    if not spec.double_quant:
        return spec
    return make_spec((*scheme_of(spec)[:3], False), signed_absmax=spec.signed_absmax)


def stacked(weights: Sequence[PackedWeight], shape: Sequence[int]) -> PackedWeight:
    """The rows of matrices [N, K], one matrix after the other, as one weight of ``shape``, a stack or a matrix.

    Codes are copied as they are. Double-quantized scales are restored to float32, with the same values: each matrix has
    an offset of its own. Raises InvalidArgument where the matrices do not fit together, Unsupported as stacked_spec.
    """
    first = weights[0]
    spec = stacked_spec(first.spec)
    parts = []
    for weight in weights:
        if weight.spec != first.spec or weight.dtype != first.dtype or weight.permutation is not None:
            got = describe(weight.spec) + (", permuted" if weight.permutation is not None else "")
            raise invalid("weights", got, f"{describe(first.spec)} without a permutation, as the first")
        own = weight.tensors()
        if first.codebook is not None and not torch.equal(own.pop("codebook"), first.codebook):
            raise invalid("weights", "codebooks of their own", "the same one for all")
        if weight.spec.double_quant:
            own["scale"] = _restore_scales(own["scale"], 0, own.pop("scale_2"), own.pop("scale_offset"))
        parts.append({name: part.to(field_dtypes(spec)[name]) for name, part in own.items()})
    tensors = {
        name: torch.cat([own[name] for own in parts]).view(*shape[:-1], parts[0][name].shape[-1]) for name in parts[0]
    }
    if first.codebook is not None:
        tensors["codebook"] = first.codebook
    return PackedWeight.from_tensors(spec, shape, first.dtype, tensors)


#: Where rows of a later weight may begin in a joined one: kernels move vectors of this many bytes.
_JOINT_BYTES = 16


def why_not_joined(weights: Sequence[PackedWeight]) -> str | None:
    """Why matrices [N_1, K], [N_2, K], ... are not one packed matrix once their tensors lie one behind the other.

    None where they are. Then they agree in spec and K, have rows that begin with a block, and every matrix but the last
    fills whole vectors of memory. With double quantization, ``scale_2`` holds one number for 256 scales counted from
    the first row: every matrix but the last has a whole number of those. What a weight has one of has to be equal; this
    compares values, and waits for a GPU.
    """
    first, *others = weights
    for other in others:
        if other.spec != first.spec:
            return f"they are packed as {describe(first.spec)} and as {describe(other.spec)}"
        if len(other.shape) != 2 or other.shape[1:] != first.shape[1:]:
            return f"they have shapes {list(first.shape)} and {list(other.shape)}"
        if other.device != first.device:
            return f"they lie on {first.device} and on {other.device}"
    for weight in weights:
        if weight.data.dim() != 2:
            return "their blocks run on from one row into the next"
        if not weight.data.numel():
            return "one of them is empty"
    for weight in weights[:-1]:
        if first.spec.double_quant and weight.scale.numel() % _SCALES_PER_SCALE_2:
            return f"{weight.scale.numel()} double-quantized scales are no whole number of {_SCALES_PER_SCALE_2}"
        if any(weight.tensors()[name].nbytes % _JOINT_BYTES for name in ("data", "scale")):
            return f"{weight.shape[0]} rows are no whole number of {_JOINT_BYTES} bytes"
    for name in SHARED_FIELDS:
        ours = first.tensors().get(name)
        for theirs in (other.tensors().get(name) for other in others):
            if (ours is None) != (theirs is None) or (
                ours is not None and theirs is not None and not torch.equal(ours, theirs)
            ):
                return f"their {name}s differ"
    return None


def describe(spec: Spec) -> str:
    """A spec in the words of its options, leaving out what is at its default but for the scale's storage."""
    words = [spec.format, f"block_size={spec.block_size}"]
    words.append("double_quant" if spec.double_quant else f"scale={spec.scale_dtype}")
    if spec.double_quant and spec.has_shift:
        words.append(f"shift={spec.scale_dtype}")
    if spec.block_order != "row":
        words.append(f"block_order={spec.block_order}")
    if spec.signed_absmax:
        words.append("signed_absmax")
    return ", ".join(words)


def format_bytes(count: int) -> str:
    """A number of bytes for people, in decimal units: ``9.4 MB``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _check(spec: Spec, shape: torch.Size, tensors: dict[str, Tensor]) -> None:
    codebook = tensors.get("codebook")
    expected = storage(spec, shape, None if codebook is None else codebook.numel(), "permutation" in tensors)
    for name in FIELDS:
        if (name in tensors) != (name in expected):
            got, wanted = ("a tensor", "None") if name in tensors else ("None", "a tensor")
            raise invalid(name, got, f"{wanted} for {describe(spec)}")
    if codebook is not None and not 2 <= codebook.numel() <= 16:
        raise invalid("codebook", f"{codebook.numel()} values", "2 to 16 values")
    device = tensors["data"].device
    for name, (size, dtype) in expected.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tensor.shape != size:
            got, wanted = f"{tensor.dtype} {list(tensor.shape)}", f"{dtype} {list(size)}"
            raise invalid(name, got, f"{wanted} for {describe(spec)} and shape {list(shape)}")
        if tensor.device != device:
            raise invalid(name, f"a tensor on {tensor.device}", f"one on {device}, where data lies")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)
