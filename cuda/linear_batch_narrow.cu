// linear_batch for few tokens, whose scales are applied to fp32 sums: compute capability 9.0 alone. The launch is that of
// linear_batch.cu, but scales take 512 bytes a block in a stage. They take blocks of at least 64, and no shifts.
#include "lowbit/batch_kernel.cuh"

extern "C" __device__ float lowbit_dynamic_map[256] = {};

LOWBIT_BATCH(linear_batch_narrow, bfloat16, 32, 2, true)
LOWBIT_BATCH(linear_batch_narrow, bfloat16, 64, 2, true)
LOWBIT_BATCH(linear_batch_narrow, bfloat16, 96, 2, true)
LOWBIT_BATCH(linear_batch_narrow, float16, 32, 2, true)
LOWBIT_BATCH(linear_batch_narrow, float16, 64, 2, true)
LOWBIT_BATCH(linear_batch_narrow, float16, 96, 2, true)
