"""Counters in a GPU's memory that are 0 before and after every kernel that counts with them.

A kernel whose parts are added up by whichever block of threads comes last counts arrivals, and sets its counters back
to 0 when it is done. So they are zeroed once. Two kernels that may run at the same time must not share them: kernels
of one stream do not, and a CUDA graph, which may be replayed beside anything else, has its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Counters that are zeroed at a time: 256 KiB.
_CHUNK = 1 << 16

#: By device and stream, for calls that are not captured.
_of_streams: dict[tuple[int, int], Tensor] = {}
#: By device: counters that no captured call has taken yet. What a call takes stays with its graph.
_for_graphs: dict[int, Tensor] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """At least ``count`` int32 zeros for a kernel on the current stream of ``device``.

    Captured calls take theirs from a supply that earlier calls made. Where it has run out they are zeroed in the graph.
    """
    if count == 0:
        return torch.empty(0, dtype=torch.int32, device=device)
    index = device.index
    if torch.cuda.is_current_stream_capturing():
        supply = _for_graphs.get(index)
        if supply is None or supply.numel() < count:
            return torch.zeros(count, dtype=torch.int32, device=device)
        _for_graphs[index] = supply[count:]
        return supply[:count]
    if index not in _for_graphs or _for_graphs[index].numel() < _CHUNK // 2:
        _for_graphs[index] = _zeros(device, _CHUNK)
    key = (index, torch._C._cuda_getCurrentRawStream(index))
    made = _of_streams.get(key)
    if made is None or made.numel() < count:
        made = _of_streams[key] = _zeros(device, max(count, _CHUNK))
    return made


def _zeros(device: torch.device, count: int) -> Tensor:
    """Zeros that every stream finds to be zeros."""
    zeros = torch.zeros(count, dtype=torch.int32, device=device)
    torch.cuda.current_stream(device).synchronize()
    return zeros
