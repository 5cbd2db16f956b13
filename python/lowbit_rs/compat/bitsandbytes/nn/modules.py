"""Linear4bit, Linear8bitLt and the embeddings, which are quantized when they are moved to a device.

State dicts are those of bitsandbytes, and unlike its own, these layers load them, too; embeddings save as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_rs.compat.bitsandbytes.functional import MatmulLtState, matmul, matmul_4bit, packed_rows
from lowbit_rs.compat.bitsandbytes.nn.parameters import Int8Params, Params4bit
from lowbit_rs.compat.bitsandbytes.state import QuantState, as_packed
from lowbit_rs.errors import invalid, unsupported
from lowbit_rs.functional import embedding

_NOT_YET = "floats that are not quantized yet"
_CALL_TO = "a layer that was moved to a device: .to(device) quantizes it"


def _state_of(weight: Tensor) -> QuantState:
    """The state of a quantized Params4bit. Raises InvalidArgument for one that is not."""
    state = getattr(weight, "quant_state", None)
    if not isinstance(state, QuantState):
        raise invalid("weight", _NOT_YET, _CALL_TO)
    return state


class _Layer4bit(nn.Module):
    """A layer with a Params4bit, in a state dict as bitsandbytes has it."""

    weight: Params4bit

    @property
    def quant_state(self) -> QuantState | None:
        """That of the weight."""
        return getattr(self.weight, "quant_state", None)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.quant_state is not None:
            for key, value in self.quant_state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

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
        """As in torch; and codes with their state take the place of a weight in any form."""
        parts = {key: value for key, value in state_dict.items() if key.startswith(f"{prefix}weight.")}
        if parts:
            for key in parts:
                del state_dict[key]
            data, device = state_dict[f"{prefix}weight"], self.weight.device
            device = data.device if device.type == "meta" else device
            loaded = Params4bit.from_prequantized(data, parts, device=device)
            shape = None if loaded.quant_state is None else loaded.quant_state.shape
            if shape is None or tuple(shape) != self._shape():
                got = None if shape is None else list(shape)
                error_msgs.append(f"{prefix}weight: got shape {got}, expected {list(self._shape())}")
                return
            self.weight = state_dict[f"{prefix}weight"] = loaded  # in both: torch copies, or assigns if it is asked to
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _shape(self) -> tuple[int, int]:
        raise NotImplementedError


class Linear4bit(_Layer4bit, nn.Linear):  # type: ignore[misc]  # a Parameter of a narrower type
    """A linear layer in FP4 or NF4: floats until ``.to(device)``, packed from then on.

    Products are those of lowbit_rs.QuantLinear. x is rounded to ``compute_dtype``, by default not at all, and the
    result comes back in the dtype of x.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        nn.Linear.__init__(self, input_features, output_features, bias, device)
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
        )
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self.quant_storage = quant_storage

    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """``x @ W.T + bias`` in the dtype of x."""
        state = _state_of(self.weight)
        cast = x if self.compute_dtype is None else x.to(self.compute_dtype)
        return matmul_4bit(cast, self.weight, state, bias=self.bias).to(x.dtype)


class LinearFP4(Linear4bit):
    """Linear4bit in FP4."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "fp4", quant_storage, device
        )


class LinearNF4(Linear4bit):
    """Linear4bit in NF4."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "nf4", quant_storage, device
        )


class _Layer8bit(nn.Module):
    """A layer with an Int8Params, in a state dict as bitsandbytes has it."""

    weight: Int8Params

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.SCB is not None:
            destination[f"{prefix}SCB"] = self.weight.SCB if keep_vars else self.weight.SCB.detach()
            destination[f"{prefix}weight_format"] = torch.tensor(0, dtype=torch.uint8)

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
        """As in torch; and codes with their maxima take the place of a weight in any form."""
        absmax = state_dict.pop(f"{prefix}SCB", None)
        order = int(state_dict.pop(f"{prefix}weight_format", 0))
        if order != 0:
            error_msgs.append(f"{prefix}weight_format: got {order}, expected 0: rows in order")
            return
        data = state_dict.get(f"{prefix}weight")
        if absmax is not None and isinstance(data, Tensor):
            device = data.device if self.weight.device.type == "meta" else self.weight.device
            codes = data.to(device)
            loaded = Int8Params(codes, requires_grad=False, SCB=absmax.to(device))
            self.weight = state_dict[f"{prefix}weight"] = loaded
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class Linear8bitLt(_Layer8bit, nn.Linear):  # type: ignore[misc]  # a Parameter of a narrower type
    """A linear layer in 8 bits by row: floats until ``.to(device)``, int8 from then on.

    x is quantized by row where that is faster, as with many tokens, but for columns that reach ``threshold``, if that
    is not 0; the result is in the dtype of x. Weights that stay float16 for training (``has_fp16_weights=True``, the
    default in bitsandbytes) are not supported.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Any = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        if has_fp16_weights:
            raise unsupported("has_fp16_weights=True", "weights are frozen here: pass has_fp16_weights=False")
        nn.Linear.__init__(self, input_features, output_features, bias, device)
        self.state = MatmulLtState(threshold=threshold, has_fp16_weights=False, use_pool=threshold > 0.0)
        self.index = index
        self.weight = Int8Params(self.weight.data, has_fp16_weights=False, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x @ W.T + bias`` in the dtype of x."""
        if not self.weight.is_packed:
            raise invalid("weight", _NOT_YET, _CALL_TO)
        self.state.is_training = self.training
        self.state.CB, self.state.SCB = self.weight.data, self.weight.SCB
        return matmul(x, self.weight, bias=self.bias, state=self.state)


class Embedding4bit(_Layer4bit, nn.Embedding):  # type: ignore[misc]  # a Parameter of a narrower type
    """A lookup table in FP4 or NF4, of which the rows asked for are decoded; it can be saved."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Params4bit(
            self.weight.data, compress_statistics=False, quant_type=quant_type, quant_storage=quant_storage
        )

    def _shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def forward(self, input: Tensor) -> Tensor:
        """The rows ``input`` of the table: [*input.shape, embedding_dim]."""
        packed = as_packed(self.weight, _state_of(self.weight), self._shape())
        return embedding(input, packed).to(self.dtype)


class EmbeddingFP4(Embedding4bit):
    """Embedding4bit in FP4."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class EmbeddingNF4(Embedding4bit):
    """Embedding4bit in NF4."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)


class Embedding8bit(_Layer8bit, nn.Embedding):  # type: ignore[misc]  # a Parameter of a narrower type
    """A lookup table in 8 bits by row, of which the rows asked for are decoded; it can be saved."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Int8Params(self.weight.data, has_fp16_weights=False, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """The rows ``input`` of the table: [*input.shape, embedding_dim]."""
        if self.weight.SCB is None:
            raise invalid("weight", _NOT_YET, _CALL_TO)
        return embedding(input, packed_rows(self.weight.data, self.weight.SCB, self.dtype))
