// linear_batch for more tokens at once, where wgmma leaves the registers for them: compute capability 9.0 alone. The launch
// is that of linear_batch.cu, but from 128 tokens on it has 512 threads and steps of 64 in-features.
#include "lowbit/batch_kernel.cuh"

extern "C" __device__ float lowbit_dynamic_map[256] = {};

LOWBIT_BATCH(bfloat16, 96, 2)
LOWBIT_BATCH(bfloat16, 128, 1)
LOWBIT_BATCH(bfloat16, 192, 1)
LOWBIT_BATCH(bfloat16, 256, 1)
LOWBIT_BATCH(float16, 96, 2)
LOWBIT_BATCH(float16, 128, 1)
LOWBIT_BATCH(float16, 192, 1)
LOWBIT_BATCH(float16, 256, 1)
