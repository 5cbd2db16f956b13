// linear_batch for more tokens at once, where wgmma leaves the registers for them: compute capability 9.0 alone. The launch
// is that of linear_batch.cu, with 256 threads for 192 and 256 tokens.
#include "lowbit/batch_kernel.cuh"

extern "C" __device__ float lowbit_dynamic_map[256] = {};

#define LOWBIT_BATCH(type, tokens, threads)                                                                  \
  extern "C" __global__ void __launch_bounds__(threads, 1) linear_batch_##type##_##tokens(                   \
      const __grid_constant__ lowbit::Weight w, const __grid_constant__ lowbit::BatchOperands operands) {    \
    extern __shared__ __align__(1024) uint8_t memory[];                                                      \
    lowbit::Batch<lowbit::type, tokens, threads>(w, operands, memory).run();                                 \
  }
LOWBIT_BATCH(bfloat16, 128, 256)
LOWBIT_BATCH(bfloat16, 192, 256)
LOWBIT_BATCH(bfloat16, 256, 256)
LOWBIT_BATCH(float16, 128, 256)
LOWBIT_BATCH(float16, 192, 256)
LOWBIT_BATCH(float16, 256, 256)
