// Barriers in shared memory that some threads arrive at and others wait for (mbarrier, sm_80 and newer). A barrier goes from
// phase to phase as often as all that it expects have arrived; who waits names the parity of the phase that has to end.
#pragma once

#include <cstdint>

namespace lowbit {

// By one thread, before a barrier of the CTA.
__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ bool is_over(uint32_t barrier, uint32_t parity) {
  uint32_t result;
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
#else
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
#endif
               : "=r"(result)
               : "r"(barrier), "r"(parity)
               : "memory");
  return result != 0;
}

__device__ __forceinline__ void wait_for_phase(uint32_t barrier, uint32_t parity) {
  while (!is_over(barrier, parity)) {
  }
}

// A ring of stages that producers fill and consumers free: two barriers a stage.
struct Ring {
  uint32_t barriers;  // [stages][full, free], 8 bytes each
  int stages;

  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + stage * 16; }
  __device__ __forceinline__ uint32_t free(int stage) const { return barriers + stage * 16 + 8; }
};

// A place in a ring, and the parity of its phase.
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

}  // namespace lowbit
