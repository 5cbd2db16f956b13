"""The Rust extension: private, called by the modules around it. Tensors are passed as addresses and lengths."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, final

from torch import Tensor

_Buffer: TypeAlias = tuple[int, int]
"""Address and number of elements."""

_Floats: TypeAlias = tuple[int, int, str]
"""Address, number of elements and dtype: "float32", "float16" or "bfloat16"."""

__version__: str

class LowbitError(Exception): ...
class InvalidArgument(LowbitError, ValueError): ...  # noqa: N818 -- the public name
class Unsupported(LowbitError, NotImplementedError): ...  # noqa: N818
class CudaError(LowbitError, RuntimeError): ...

@final
class Spec:
    """How a weight is packed: everything but its shape."""

    def __new__(
        cls,
        format: str,
        block_size: int | str = ...,
        *,
        block_order: str = "row",
        scale_dtype: str = "float32",
        double_quant: bool = False,
        signed_absmax: bool = False,
    ) -> Spec: ...
    @property
    def format(self) -> str: ...
    @property
    def block_size(self) -> int | Literal["row"]: ...
    @property
    def block_order(self) -> str: ...
    @property
    def scale_dtype(self) -> str: ...
    @property
    def double_quant(self) -> bool: ...
    @property
    def signed_absmax(self) -> bool: ...
    @property
    def bits(self) -> int: ...
    @property
    def has_shift(self) -> bool: ...
    def layout(self, rows: int, cols: int) -> Layout: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __getnewargs_ex__(self) -> tuple[tuple[str, int | str], dict[str, str | bool]]: ...

@final
class Layout:
    """Where the codes and scales of a weight lie."""

    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def row_bytes(self) -> int: ...
    @property
    def code_bytes(self) -> int: ...
    @property
    def blocks_per_row(self) -> int: ...
    @property
    def block_count(self) -> int: ...
    @property
    def straddles_rows(self) -> bool: ...

@final
class WeightView:
    """Addresses of the tensors of a packed [rows, cols] weight, which the caller keeps alive."""

    def __new__(
        cls,
        spec: Spec,
        rows: int,
        cols: int,
        codes: _Buffer,
        scale: _Buffer,
        scale_2: _Buffer | None = None,
        scale_offset: _Buffer | None = None,
        shift: _Buffer | None = None,
        codebook: _Buffer | None = None,
    ) -> WeightView: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...

@final
class LinearCall:
    """The product of a layer whose tensors lie where they lay at the call before; None leaves it to the ordinary way.

    ``owner._view()`` is asked for a view of the weight where the last one does not fit any more. Before ``use_torch``
    was called, every call gives None.
    """

    def __new__(cls, keys: list[str], may_overlap: bool) -> LinearCall: ...
    def __reduce__(self) -> tuple[type[LinearCall], tuple[list[str], bool]]: ...
    def run(self, owner: Any, state: dict[str, Any], x: Tensor) -> Tensor | None: ...

@final
class CudaWeight:
    """Addresses of the tensors of a packed [rows, cols] weight on a CUDA device, which the caller keeps alive."""

    def __new__(
        cls,
        device: int,
        spec: Spec,
        rows: int,
        cols: int,
        codes: _Buffer,
        scale: _Buffer,
        scale_2: _Buffer | None = None,
        scale_offset: _Buffer | None = None,
        shift: _Buffer | None = None,
        codebook: _Buffer | None = None,
    ) -> CudaWeight: ...
    @property
    def device(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...

def quantize(
    source: int,
    dtype: str,
    shape: Sequence[int],
    strides: Sequence[int],
    nonfinite: str,
    out: WeightView,
    threads: int,
) -> None: ...
def dequantize(weight: WeightView, out: _Floats, threads: int) -> None: ...
def dequantize_rows(weight: WeightView, rows: _Buffer, out: _Floats, threads: int) -> None: ...
def linear(
    weight: WeightView,
    x: _Floats,
    tokens: int,
    x_row_stride: int,
    activation: str,
    threshold: float,
    bias: _Floats | None,
    out: _Floats,
    threads: int,
) -> None: ...
def rounded_from(weight: WeightView, activation: str, dtype: str) -> int | None: ...
def linear_grad_input(
    weight: WeightView, grad: _Floats, tokens: int, grad_row_stride: int, out: _Floats, threads: int
) -> None: ...

CUDA_MAX_TOKENS: int
"""The most tokens that cuda_linear takes."""

def has_cuda_kernels() -> bool: ...
def cuda_device(ordinal: int) -> tuple[int, int, int]: ...
def cuda_quantize(
    source: int,
    dtype: str,
    shape: Sequence[int],
    strides: Sequence[int],
    codebook: _Buffer | None,
    nonfinite: str,
    out: CudaWeight,
    status: _Buffer,
    scales: _Buffer | None,
    sums: _Buffer | None,
    stream: int,
) -> None: ...
def cuda_dequantize(weight: CudaWeight, window: tuple[int, int, int, int], out: _Floats, stream: int) -> None: ...
def cuda_dequantize_rows(weight: CudaWeight, rows: _Buffer, out: _Floats, stream: int) -> None: ...
def cuda_linear(
    weight: CudaWeight,
    x: _Floats,
    tokens: int,
    x_row_stride: int,
    bias: _Floats | None,
    out: _Floats,
    stream: int,
    may_overlap: bool,
) -> None: ...
def norm(
    kind: tuple[float, bool, bool, bool],
    x: tuple[_Floats, int],
    tokens: int,
    cols: int,
    residual: tuple[_Floats, int] | None,
    total: _Floats | None,
    weight: _Floats | None,
    bias: _Floats | None,
    out: _Floats,
    threads: int,
) -> None: ...
def cuda_norm(
    device: int,
    kind: tuple[float, bool, bool, bool],
    x: tuple[_Floats, int],
    tokens: int,
    cols: int,
    residual: tuple[_Floats, int] | None,
    total: _Floats | None,
    weight: _Floats | None,
    bias: _Floats | None,
    out: _Floats,
    rounded: tuple[float, tuple[_Buffer, _Buffer, _Buffer | None]] | None,
    stream: int,
) -> None: ...
def cuda_norm_sum_lines(device: int, tokens: int, cols: int) -> int: ...
def cuda_norm_backward(
    device: int,
    kind: tuple[float, bool, bool, bool],
    rows: tuple[_Floats, int],
    grad: tuple[_Floats, int],
    of_total: tuple[_Floats, int] | None,
    tokens: int,
    cols: int,
    weight: _Floats | None,
    out: _Floats | None,
    sums: _Floats | None,
    stream: int,
) -> None: ...
def use_torch(
    exchange: Any,
    plain_types: list[type],
    plain_keys: int,
    included_keys: Callable[[], Any],
    function_modes: Callable[[], int],
    is_grad_enabled: Callable[[], bool],
    is_autocast_enabled: Callable[[], bool],
    num_threads: Callable[[], int],
    allocators: list[Callable[..., Tensor] | None],
) -> None: ...
def cuda_batch_sizes(
    weight: CudaWeight, x: _Floats, tokens: int, x_row_stride: int, even_if_slower: bool = False
) -> tuple[int, int] | None: ...
def cuda_linear_batch(
    weight: CudaWeight,
    x: _Floats,
    tokens: int,
    x_row_stride: int,
    bias: _Floats | None,
    out: _Floats,
    partials: _Buffer,
    arrivals: _Buffer,
    stream: int,
) -> None: ...

CUDA_SIDE_NUMBERS: int
"""The int16 that a token, and a row of the weight, needs for columns of outliers."""

def cuda_int8_sizes(cols: int) -> tuple[int, int]: ...
def cuda_round_rows(
    device: int,
    x: _Floats,
    shape: tuple[int, int],
    x_row_stride: int,
    threshold: float,
    rows: tuple[_Buffer, _Buffer, _Buffer | None],
    stream: int,
) -> None: ...
def cuda_linear_int8(
    weight: CudaWeight,
    x: _Floats,
    tokens: int,
    x_row_stride: int,
    rows: tuple[_Buffer, _Buffer, _Buffer | None],
    side: _Buffer | None,
    bias: _Floats | None,
    out: _Floats,
    workspace: tuple[_Buffer, _Buffer] | None,
    stream: int,
) -> None: ...
def cuda_rounded_from(weight: CudaWeight, is_choosy: bool) -> int: ...
def cuda_linear_grouped(
    weight: CudaWeight,
    experts: int,
    x: _Floats,
    tokens: int,
    x_row_stride: int,
    counts: _Buffer,
    out: _Floats,
    stream: int,
) -> bool: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def force_isa(name: str | None = None) -> None: ...
def nf4() -> list[float]: ...
def fp4() -> list[float]: ...
def int4() -> list[float]: ...
def dynamic_map() -> list[float]: ...
def normal_float(bits: int) -> list[float]: ...
def quantile(samples: _Buffer, bits: int) -> list[float]: ...
def block_optimal(block_size: int, bits: int, metric: str, signed: bool) -> list[float]: ...
def fit(samples: _Buffer, bits: int, weights: _Buffer | None) -> list[float]: ...
def fit_blocks(samples: _Buffer, row_length: int, block_size: int, bits: int, signed: bool) -> list[float]: ...
