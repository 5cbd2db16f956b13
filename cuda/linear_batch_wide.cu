// linear_batch for more tokens at once: compute capability 9.0 alone. The launch is that of linear_batch.cu, but steps have 64
// in-features.
#include "lowbit/batch_kernel.cuh"

extern "C" __device__ float lowbit_dynamic_map[256] = {};

LOWBIT_BATCH(linear_batch_wide, bfloat16, 128, 1)
LOWBIT_BATCH(linear_batch_wide, bfloat16, 192, 1)
LOWBIT_BATCH(linear_batch_wide, bfloat16, 256, 1, false, 2)
LOWBIT_BATCH(linear_batch_wide, float16, 128, 1)
LOWBIT_BATCH(linear_batch_wide, float16, 192, 1)
LOWBIT_BATCH(linear_batch_wide, float16, 256, 1, false, 2)
