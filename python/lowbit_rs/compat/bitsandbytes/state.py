"""QuantState: what bitsandbytes keeps beside packed codes, and as a PackedWeight."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lowbit_rs import PackedWeight, codebooks
from lowbit_rs.errors import invalid
from lowbit_rs.packed import DTYPES, Scheme, dtype_name, make_spec

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("fp4", "nf4")

_NESTED_BLOCK = 256
_PACKED_KEY = "quant_state.bitsandbytes__"


class QuantState:
    """Scales and description of a quantized tensor, with the attributes of bitsandbytes' class.

    ``absmax`` is float32 with an entry a block, or with ``state2`` uint8 codes for scales, of which ``offset`` was
    taken. ``code`` is the table, ``shape`` and ``dtype`` are those of the tensor before.
    """

    valid_quant_types = QUANT_TYPES
    valid_qs_type_keys = tuple(f"bitsandbytes__{name}" for name in QUANT_TYPES)

    def __init__(
        self,
        absmax: Tensor,
        shape: Sequence[int] | None = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.dtype = dtype
        self.offset = offset
        self.state2 = state2
        self.nested = state2 is not None
        #: Whether nested scales can stay as they are: with the dynamic map, in blocks of 256.
        self.is_native_nested = (
            state2 is not None
            and state2.blocksize == _NESTED_BLOCK
            and state2.code is not None
            and not state2.code.is_meta
            and torch.equal(state2.code, table("dynamic", state2.code.device))
        )

    def __getitem__(self, index: int) -> Any:
        """Entry of the list that old versions of bitsandbytes had in place of this class."""
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    @classmethod
    def from_dict(cls, qs_dict: dict[str, Any], device: torch.device | str) -> QuantState:
        """A state of the entries that :meth:`as_dict` gives, packed or not; names may have prefixes."""
        entries: dict[str, Any] = {}
        for key, value in qs_dict.items():
            if isinstance(value, Tensor) and "quant_state" in key:
                entries |= _unpack(key, value)
            else:
                entries[key.rpartition(".")[2]] = value
        if "quant_type" not in entries:
            raise invalid(
                "qs_dict", sorted(qs_dict), f"an entry quant_type, or one that ends in {_PACKED_KEY}nf4 or fp4"
            )
        offset = state2 = None
        if "nested_absmax" in entries:
            offset = torch.tensor(float(entries["nested_offset"])).to(device)
            state2 = cls(
                absmax=entries["nested_absmax"].to(device),
                blocksize=entries["nested_blocksize"],
                code=entries["nested_quant_map"].to(device),
                dtype=DTYPES[entries["nested_dtype"]],
            )
        return cls(
            absmax=entries["absmax"].to(device),
            shape=None if entries["shape"] is None else torch.Size(entries["shape"]),
            code=entries["quant_map"].to(device),
            blocksize=entries["blocksize"],
            quant_type=entries["quant_type"],
            dtype=DTYPES[entries["dtype"]],
            offset=offset,
            state2=state2,
        )

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The state by the names of a checkpoint; ``packed`` puts all that is no tensor into one, as JSON."""
        entries: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": None if self.dtype is None else dtype_name(self.dtype),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.state2 is not None:
            assert self.offset is not None
            assert self.state2.code is not None
            entries |= {
                "nested_absmax": self.state2.absmax,
                "nested_blocksize": self.state2.blocksize,
                "nested_quant_map": self.state2.code.clone(),  # shared tensors cannot be saved
                "nested_dtype": dtype_name(self.state2.dtype or torch.float32),
                "nested_offset": self.offset.item(),
            }
        if not packed or self.quant_type is None:
            return entries
        tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
        rest = {key: value for key, value in entries.items() if not isinstance(value, Tensor)}
        encoded = torch.frombuffer(bytearray(json.dumps(rest).encode()), dtype=torch.uint8)
        return {**tensors, f"{_PACKED_KEY}{self.quant_type}": encoded}

    def to(self, device: torch.device | str | None) -> None:
        """Moves the tensors of this state."""
        if device is None:
            return
        self.absmax = self.absmax.to(device)
        self.code = None if self.code is None else self.code.to(device)
        self.offset = None if self.offset is None else self.offset.to(device)
        if self.state2 is not None:
            self.state2.to(device)

    def __eq__(self, other: object) -> bool:
        """Whether both describe the same tensor; scales may differ by 1e-6, as bitsandbytes has it."""
        if not isinstance(other, QuantState):
            return False
        tensors = ((self.absmax, other.absmax), (self.code, other.code), (self.offset, other.offset))
        plain = ("shape", "dtype", "blocksize", "quant_type")
        return (
            all(getattr(self, name) == getattr(other, name) for name in plain)
            and all(_close(mine, theirs) for mine, theirs in tensors)
            and self.state2 == other.state2
        )

    __hash__ = None  # type: ignore[assignment]  # equality is by content, and tensors can change


def _close(mine: Tensor | None, theirs: Tensor | None) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    return mine.shape == theirs.shape and torch.allclose(mine.float(), theirs.float(), atol=1e-6)


def _unpack(key: str, value: Tensor) -> dict[str, Any]:
    """The JSON of a packed state."""
    if key.rpartition(".")[2] not in QuantState.valid_qs_type_keys:
        raise invalid("qs_dict", f"the key {key!r}", f"one that ends in {' or '.join(QuantState.valid_qs_type_keys)}")
    entries: dict[str, Any] = json.loads(value.cpu().numpy().tobytes())
    return entries


@lru_cache(maxsize=32)
def table(name: str, device: torch.device) -> Tensor:
    """A table of this package on a device: "nf4", "fp4" or "dynamic"; not to be written to."""
    make = {"nf4": codebooks.nf4, "fp4": codebooks.fp4, "dynamic": codebooks.dynamic_map}[name]
    return (torch.from_numpy(make()) + 0.0).to(device)  # bitsandbytes has FP4's -0 as 0


def check(state: QuantState) -> None:
    """Raises InvalidArgument for a block size or a type that bitsandbytes does not take."""
    if state.blocksize not in BLOCK_SIZES:
        raise invalid("blocksize", state.blocksize, f"one of {', '.join(map(str, BLOCK_SIZES))}")
    if state.quant_type not in QUANT_TYPES:
        raise invalid("quant_type", repr(state.quant_type), "'nf4' or 'fp4'")
    dtype_name(state.dtype, "dtype")  # type: ignore[arg-type]  # which is what it checks


def scales(state: QuantState) -> Tensor:
    """Scales in float32, restored where they are nested: code * absmax, and then the offset, each rounded."""
    if state.state2 is None:
        return state.absmax
    assert state.offset is not None
    assert state.state2.code is not None
    assert state.state2.blocksize is not None
    codes = state.absmax.reshape(-1).int()
    scale_2 = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: codes.numel()]
    return (state.state2.code[codes] * scale_2 + state.offset).float()


def operands(data: Tensor, state: QuantState, shape: Sequence[int]) -> tuple[dict[str, Tensor], Scheme]:
    """Codes of any shape and storage dtype, with their state, as the tensors and the scheme of a weight [N, K].

    Memory is shared. Raises InvalidArgument where codes and scales are not as many as the shape asks for.
    """
    check(state)
    assert state.blocksize is not None
    (rows, cols), count = shape, math.prod(shape)
    aligned = rows == 1 or cols % state.blocksize == 0
    double_quant = state.is_native_nested
    tensors = {"data": data.detach().reshape(-1).view(torch.uint8)[: (count + 1) // 2]}
    if double_quant:
        assert state.state2 is not None
        assert state.offset is not None
        tensors["scale"] = state.absmax
        tensors |= {"scale_2": state.state2.absmax.reshape(-1), "scale_offset": state.offset.reshape(1)}
    else:
        tensors["scale"] = scales(state)
    for name, wanted in (("data", (count + 1) // 2), ("scale", -(-count // state.blocksize))):
        if tensors[name].numel() != wanted:
            expected = f"{wanted} for shape {list(state.shape or shape)} in blocks of {state.blocksize}"
            raise invalid({"data": "A", "scale": "absmax"}[name], f"{tensors[name].numel()} elements", expected)
        tensors[name] = tensors[name].reshape((rows, -1) if aligned else (-1,))
    return tensors, (str(state.quant_type), state.blocksize, "row" if aligned else "flat", double_quant)


def as_packed(data: Tensor, state: QuantState, shape: Sequence[int] | None = None) -> PackedWeight:
    """``operands`` as a PackedWeight [N, K]; by default all of the tensor is one row."""
    assert state.shape is not None
    shape = (1, math.prod(state.shape)) if shape is None else tuple(shape)
    tensors, scheme = operands(data, state, shape)
    return PackedWeight.from_tensors(make_spec(scheme), shape, state.dtype or torch.float32, tensors)


def of_packed(packed: PackedWeight, shape: Sequence[int]) -> QuantState:
    """The state of what ``lowbit_rs.quantize`` packed as one row; memory is shared."""
    device = packed.device
    offset = state2 = None
    if packed.scale_2 is not None and packed.scale_offset is not None:
        offset = packed.scale_offset.reshape(())
        dynamic = table("dynamic", device).clone()
        state2 = QuantState(packed.scale_2, blocksize=_NESTED_BLOCK, code=dynamic, dtype=torch.float32)
    return QuantState(
        absmax=packed.scale.reshape(-1),
        shape=torch.Size(shape),
        code=table(packed.spec.format, device).clone(),
        blocksize=int(packed.spec.block_size),
        quant_type=packed.spec.format,
        dtype=packed.dtype,
        offset=offset,
        state2=state2,
    )
