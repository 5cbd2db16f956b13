"""llama.cpp's matrix product as a layer, through the ggml library that the package llama-cpp-python carries."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitsandbytes_layers import MissingError

#: ggml's numbers for types of tensors.
_TYPES = {"f32": 0, "q4_0": 2, "q8_0": 8, "iq4_nl": 20}
#: Room in a context beside the data of tensors: their descriptions and a graph.
_ROOM = 2 << 20


class _InitParameters(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Plan(ctypes.Structure):
    _fields_ = (
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        ("rest", ctypes.c_void_p * 12),  # a thread pool and a callback, none here, and what later versions add
    )


@lru_cache(maxsize=1)
def _ggml() -> tuple[Any, Any]:
    """The libraries of ggml: base and CPU. Raises MissingError where llama-cpp-python is not installed."""
    package = importlib.util.find_spec("llama_cpp")
    if package is None or package.origin is None:
        raise MissingError("llama-cpp-python is not installed: pip install llama-cpp-python builds it")
    folder = Path(package.origin).parent / "lib"
    base, cpu = (ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL) for name in ("libggml-base.so", "libggml-cpu.so"))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    for library, name, result, arguments in (
        (base, "ggml_init", pointer, [_InitParameters]),
        (base, "ggml_free", None, [pointer]),
        (base, "ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, size, size]),
        (base, "ggml_mul_mat", pointer, [pointer, pointer, pointer]),
        (base, "ggml_get_data", pointer, [pointer]),
        (base, "ggml_nbytes", ctypes.c_size_t, [pointer]),
        (base, "ggml_new_graph", pointer, [pointer]),
        (base, "ggml_build_forward_expand", None, [pointer, pointer]),
        (base, "ggml_quantize_chunk", ctypes.c_size_t, [ctypes.c_int, pointer, pointer, size, size, size, pointer]),
        (cpu, "ggml_cpu_init", None, []),
        (cpu, "ggml_graph_plan", _Plan, [pointer, ctypes.c_int, pointer]),
        (cpu, "ggml_graph_compute", ctypes.c_int, [pointer, ctypes.POINTER(_Plan)]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    cpu.ggml_cpu_init()
    return base, cpu


class LlamaLinear(nn.Module):
    """``x @ W.T`` with W in a type of llama.cpp. x is float32; the result is a copy of ggml's."""

    def __init__(self, weight: Tensor, type_name: str) -> None:
        super().__init__()
        if weight.shape[1] % 32:
            raise MissingError(f"llama.cpp's {type_name} takes columns in blocks of 32")
        self.type_name = type_name
        self.codes = self._quantize(weight.float().contiguous())
        self.shape = tuple(weight.shape)
        self.products: dict[int, tuple[Any, ...]] = {}

    def _quantize(self, weight: Tensor) -> Tensor:
        base, _ = _ggml()
        rows, cols = weight.shape
        codes = torch.empty(rows * cols * 2, dtype=torch.uint8)
        kind = _TYPES[self.type_name]
        count = base.ggml_quantize_chunk(kind, weight.data_ptr(), codes.data_ptr(), 0, rows, cols, None)
        return codes[:count].clone()

    def _product(self, tokens: int) -> tuple[Any, ...]:
        """A context with the weight in it, its input and output, the graph between, its plan and that one's memory."""
        base, _ = _ggml()
        rows, cols = self.shape
        room = self.codes.numel() + 4 * tokens * (rows + 3 * cols) + _ROOM
        context = base.ggml_init(_InitParameters(room, None, False))
        weight = base.ggml_new_tensor_2d(context, _TYPES[self.type_name], cols, rows)
        x = base.ggml_new_tensor_2d(context, _TYPES["f32"], cols, tokens)
        ctypes.memmove(base.ggml_get_data(weight), self.codes.data_ptr(), self.codes.numel())
        y = base.ggml_mul_mat(context, weight, x)
        graph = base.ggml_new_graph(context)
        base.ggml_build_forward_expand(graph, y)
        plan = _ggml()[1].ggml_graph_plan(graph, torch.get_num_threads(), None)
        work = torch.empty(plan.work_size, dtype=torch.uint8)
        plan.work_data = work.data_ptr()
        return context, base.ggml_get_data(x), y, graph, plan, work

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, K] in float32. The first call for a number of tokens sets up the product."""
        base, cpu = _ggml()
        tokens = x.shape[0]
        if tokens not in self.products:
            self.release()
            self.products[tokens] = self._product(tokens)
        _, data, y, graph, plan, _ = self.products[tokens]
        ctypes.memmove(data, x.data_ptr(), x.nbytes)
        cpu.ggml_graph_compute(graph, ctypes.byref(plan))
        out = torch.empty(tokens, self.shape[0])
        ctypes.memmove(out.data_ptr(), base.ggml_get_data(y), out.nbytes)
        return out

    def release(self) -> None:
        """Gives the memory of all products back."""
        for context, *_ in self.products.values():
            _ggml()[0].ggml_free(context)
        self.products.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> LlamaLinear:
        copy = LlamaLinear.__new__(LlamaLinear)
        nn.Module.__init__(copy)
        copy.type_name, copy.codes, copy.shape, copy.products = self.type_name, self.codes.clone(), self.shape, {}
        return copy

    def __del__(self) -> None:
        self.release()
