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

// By a warp, of all that its lanes did before: one lane arrives for it. compute-sanitizer's racecheck does not follow
// __syncwarp and takes what the other lanes did for unordered; to be checked by it, every lane arrives.
#if defined(LOWBIT_EVERY_LANE_ARRIVES)
constexpr int kArrivalsOfWarp = 32;
__device__ __forceinline__ void arrive_as_warp(uint32_t barrier) { arrive(barrier); }
#else
constexpr int kArrivalsOfWarp = 1;
__device__ __forceinline__ void arrive_as_warp(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) arrive(barrier);
}
#endif

// The phase does not end before so many bytes more have been copied.
__device__ __forceinline__ void expect_bytes(uint32_t barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
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

// A ring of stages that producers fill and consumers free: two barriers a stage, which come after the stages.
struct Ring {
  uint32_t stages, stage_bytes, barriers, end;  // addresses in shared memory; barriers are [stages][full, free], 8 bytes each

  __device__ __forceinline__ Ring(uint32_t stages_, int stage_bytes_, int count)
      : stages(stages_), stage_bytes(stage_bytes_), barriers(stages_ + count * stage_bytes_), end(barriers + count * 16) {}
};

// A place in a ring, and the parity of its phase.
struct RingPlace {
  uint32_t stage, barrier;
  uint32_t parity = 0;

  __device__ __forceinline__ explicit RingPlace(const Ring& ring) : stage(ring.stages), barrier(ring.barriers) {}

  __device__ __forceinline__ uint32_t full() const { return barrier; }
  __device__ __forceinline__ uint32_t free() const { return barrier + 8; }
  __device__ __forceinline__ void advance(const Ring& ring) {
    stage += ring.stage_bytes;
    barrier += 16;
    if (barrier == ring.end) stage = ring.stages, barrier = ring.barriers, parity ^= 1;
  }
};

}  // namespace lowbit
