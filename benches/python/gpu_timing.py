"""Times of work on a GPU: in CUDA graphs, eagerly, and what the memory of the machine can do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

#: Bytes that lie between two uses of a weight, so that it is gone from the L2 cache.
ROTATED = 320 << 20
_REPLAYS = 30
#: Seconds of work before anything is timed: clocks still follow what ran before, which may have been hotter.
_WARM_UP = 0.04
_EAGER_CALLS = 1000


def graph_seconds(calls: Sequence[Callable[[], object]], replays: int = _REPLAYS) -> float:
    """The median time of one of ``calls``, which run one after another in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    warm = time.perf_counter() + _WARM_UP
    while time.perf_counter() < warm:
        graph.replay()
        torch.cuda.synchronize()
    samples: list[float] = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3)
    return statistics.median(samples) / len(calls)


def eager_seconds(call: Callable[[], object], calls: int = _EAGER_CALLS) -> float:
    """The median time of a call, from many in a row that the host issues as fast as it can."""
    samples = []
    for _ in range(5):
        for _ in range(20):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls // 5):
            call()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) / (calls // 5))
    return statistics.median(samples)


def copies_for(bytes_each: int) -> int:
    """How many weights of a size are rotated."""
    return max(2, -(-ROTATED // max(bytes_each, 1)))


def read_bandwidth() -> float:
    """Bytes a second of memory that a sum over 2 GiB reads: the roof of what reads a weight once."""
    numbers = torch.ones(1 << 29, device="cuda")
    return numbers.nbytes / graph_seconds([numbers.sum, numbers.sum])


def copy_bandwidth() -> float:
    """Bytes a second that a copy of 1 GiB reads and writes together."""
    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / graph_seconds([lambda: target.copy_(source)] * 2)


def fixed_seconds() -> float:
    """The time of a kernel in a graph that reads next to nothing."""
    numbers = torch.ones(1, device="cuda")
    return graph_seconds([numbers.neg_] * 50)
