// y = x W^T + bias for more tokens than linear_decode takes, on tensor cores: sm_80 and newer, fp16 and bf16 activations. A
// weight is rounded to the type of the activations as batch_decode.cuh says; sums are fp32, in an order that depends on the
// shapes and the launch alone; one rounding at the end. batch_plan.cuh says who does what.
//
// Launch of linear_batch_{float16,bfloat16}_<kTokens>:
//   grid     any number of CTAs, one an SM at a time; no more than there are steps
//   block    with wgmma 384 threads, without 512
//   shared   dynamic, in bytes: 65536 + stages * (stage + 16); stages from 3 to 8
//            stage  cols * (2 * kTokens + 16 * bits) + 1024 * blocks, with shifts 2048 * blocks, rounded up to 1024; cols =
//                   128, in-features of a step, and blocks = cols / block_size, at least 1
//   maps     of x and of the codes, as BatchMaps says; without wgmma they are not read
//   memory   where a tile is shared by CTAs: 1024 * kTokens bytes of partials a CTA, a counter a tile, all 0
// They take rows of codes and of x that are 16-byte aligned, and blocks that start with the row, of a power of two of at
// least 16 or of a whole row.
#include "lowbit/batch_kernel.cuh"

extern "C" __device__ float lowbit_dynamic_map[256] = {};

LOWBIT_BATCH(linear_batch, bfloat16, 32, 2)
LOWBIT_BATCH(linear_batch, bfloat16, 64, 2)
LOWBIT_BATCH(linear_batch, float16, 32, 2)
LOWBIT_BATCH(linear_batch, float16, 64, 2)
