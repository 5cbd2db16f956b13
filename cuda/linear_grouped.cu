// out[r] = x[r] W[expert of r]^T for rows sorted by expert, their numbers being in device memory: sm_80 and newer, fp16 and
// bf16. A weight's code is rounded once, to the type of the activations; scales are applied to fp32 sums of 64 columns.
// Sums are fp32, in an order that depends on nothing but the number of columns; one rounding at the end.
//
// Launch of linear_grouped_{float16,bfloat16}_<kTokens>:
//   grid     any number of CTAs: each takes every grid-th tile of 128 outputs and kTokens rows of one expert
//   block    128 threads
//   shared   dynamic, in bytes: 33792 + stages * groups * (5120 + 128 * kTokens) + 8 * (experts + 1), with groups and
//            stages as below
// They take 4-bit codes without shifts, cols a multiple of 64, rows of codes and of x 16-byte aligned, and blocks that start
// with the row, of a power of two of at least 64 or of a whole row; scales begin and end with a word of 4 bytes.
#include "lowbit/grouped_kernel.cuh"

extern "C" __device__ float lowbit_dynamic_map[256] = {};

#define LOWBIT_GROUPED(type, tokens, groups, stages, ctas)                                                        \
  extern "C" __global__ void __launch_bounds__(lowbit::kGroupedThreads, ctas) linear_grouped_##type##_##tokens(   \
      const __grid_constant__ lowbit::Weight w, const __grid_constant__ lowbit::GroupedOperands operands) {       \
    extern __shared__ __align__(1024) uint8_t memory[];                                                           \
    lowbit::GroupedProduct<lowbit::type, tokens, groups, stages>(w, operands, memory).run();                      \
  }
#define LOWBIT_GROUPED_TOKENS(type) \
  LOWBIT_GROUPED(type, 8, 2, 3, 3)  \
  LOWBIT_GROUPED(type, 16, 1, 5, 3) \
  LOWBIT_GROUPED(type, 32, 1, 4, 3) \
  LOWBIT_GROUPED(type, 64, 1, 3, 3)
LOWBIT_GROUPED_TOKENS(bfloat16)
LOWBIT_GROUPED_TOKENS(float16)
