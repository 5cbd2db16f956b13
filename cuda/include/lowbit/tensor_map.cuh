// Copies of boxes of two-dimensional tensors by the copy engine of compute capability 9.0.
#pragma once

#include <cstdint>

namespace lowbit {

// CUtensorMap, which the driver makes: where a tensor lies, its shape, and that of a box.
struct alignas(64) TensorMap {
  uint8_t opaque[128];
};

#if __CUDA_ARCH__ >= 900

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Starts a copy of the box at (column, row) to shared memory, and tells `barrier` of its bytes as they arrive.
__device__ __forceinline__ void copy_box_async(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

#else

__device__ __forceinline__ void prefetch_map(const TensorMap&) {}
__device__ __forceinline__ void copy_box_async(uint32_t, const TensorMap&, int, int, uint32_t) {}

#endif

}  // namespace lowbit
