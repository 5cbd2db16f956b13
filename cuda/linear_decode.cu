// y = x W^T + bias for up to 16 tokens (8 in float32) on tensor cores, at the speed of memory: sm_80 and newer. Sums are fp32, in an order that depends on the shapes and the launch alone; one rounding at the end.
// decode_plan.cuh says who does what, decode_feeder.cuh how weights arrive, decode_math.cuh how they meet the tokens.
//
// Launch of linear_decode_{float16,bfloat16}_{int4,int4_block32}[_shift]_{scale32,scale16,double}_{8,16} and of
// linear_decode_{float16,bfloat16}_int8[_shift]_{scale32,scale16}_{8,16}, and of linear_decode_float32_{int4_{scale32,scale16,
// double},int4_block32_scale32,int8_scale32}_{4,8}; the last number is the most tokens, which are columns of operand B,
// two each in float32:
//   grid     one CTA an SM, or fewer; at most one a row
//   block    32 * warps threads: up to 512 for 8 columns, up to 384 for 16, where 8 warps do better with few in-features
//   shared   dynamic, in bytes: tables + warps * stage + sums
//            tables  65536 for 4-bit codes, with room for the first 32768 of sums but in float32; 0 for int8; 1024 more
//                    for double
//            stage   2048 + 64 * groups, with shifts 2048 + 128 * groups; groups = 8 for block32, else 4
//            sums    64 * warps * columns for every tile of 16 rows of a CTA that has room at a time, one at least;
//                    columns = those of the tokens, rounded up to 2, 4, 8 or 16
//   plan     the int32 fields of DecodeOperands; a unit is 256 columns of 4-bit codes or 128 of int8, the last may be
//            short
//   memory   no workspace
// They take cols a multiple of 64, rows of codes and of x 16-byte aligned, and blocks that start with the row, of a
// power of two or of a whole row: of at least 64 (int4), 32 (int4_block32, int8). With c = max(1, unit / block_size)
// numbers a unit, of b bytes each, blocks_per_row * b must be a multiple of min(4, c * b), for scales and for shifts;
// for double, blocks_per_row a multiple of c too.
#include "lowbit/decode_kernel.cuh"

extern "C" __device__ float lowbit_dynamic_map[256] = {};

namespace lowbit {

template <Scales kScales>
using Int4 = DecodeShape<4, 64, kScales, false>;
template <Scales kScales>
using Int4Shift = DecodeShape<4, 64, kScales, true>;
template <Scales kScales>
using Int4Block32 = DecodeShape<4, 32, kScales, false>;
template <Scales kScales>
using Int4Block32Shift = DecodeShape<4, 32, kScales, true>;
template <Scales kScales>
using Int8 = DecodeShape<8, 32, kScales, false>;
template <Scales kScales>
using Int8Shift = DecodeShape<8, 32, kScales, true>;

template <typename T, typename Shape, int kTokenTiles>
__device__ __forceinline__ void linear_decode(const Weight& w, const DecodeOperands& operands) {
  extern __shared__ __align__(1024) uint8_t memory[];
  Decoder<T, Shape, kTokenTiles>(w, operands, memory).run();
}

}  // namespace lowbit

#define LOWBIT_DECODE(type, T, weight, Shape, scales, kScales, tokens, tiles, threads)                            \
  extern "C" __global__ void __launch_bounds__(threads, 1) linear_decode_##type##_##weight##_##scales##_##tokens( \
      const __grid_constant__ lowbit::Weight w, const __grid_constant__ lowbit::DecodeOperands operands) {        \
    lowbit::linear_decode<T, lowbit::Shape<lowbit::Scales::kScales>, tiles>(w, operands);                         \
  }
#define LOWBIT_DECODE_TOKENS(type, weight, Shape, scales, kScales) \
  LOWBIT_DECODE(type, lowbit::type, weight, Shape, scales, kScales, 8, 1, 512) \
  LOWBIT_DECODE(type, lowbit::type, weight, Shape, scales, kScales, 16, 2, 384)
#define LOWBIT_DECODE_PLAIN(type, weight, Shape)          \
  LOWBIT_DECODE_TOKENS(type, weight, Shape, scale32, k32) \
  LOWBIT_DECODE_TOKENS(type, weight, Shape, scale16, k16)
#define LOWBIT_DECODE_SCALES(type, weight, Shape) \
  LOWBIT_DECODE_PLAIN(type, weight, Shape)        \
  LOWBIT_DECODE_TOKENS(type, weight, Shape, double, kDouble)
#define LOWBIT_DECODE_WEIGHTS(type)                                \
  LOWBIT_DECODE_SCALES(type, int4, Int4)                           \
  LOWBIT_DECODE_SCALES(type, int4_shift, Int4Shift)                \
  LOWBIT_DECODE_SCALES(type, int4_block32, Int4Block32)            \
  LOWBIT_DECODE_SCALES(type, int4_block32_shift, Int4Block32Shift) \
  LOWBIT_DECODE_PLAIN(type, int8, Int8)                            \
  LOWBIT_DECODE_PLAIN(type, int8_shift, Int8Shift)
LOWBIT_DECODE_WEIGHTS(bfloat16)
LOWBIT_DECODE_WEIGHTS(float16)

#define LOWBIT_DECODE_FLOAT32(weight, Shape, scales, kScales)                  \
  LOWBIT_DECODE(float32, float, weight, Shape, scales, kScales, 4, 1, 512)     \
  LOWBIT_DECODE(float32, float, weight, Shape, scales, kScales, 8, 2, 384)
LOWBIT_DECODE_FLOAT32(int4, Int4, scale32, k32)
LOWBIT_DECODE_FLOAT32(int4, Int4, scale16, k16)
LOWBIT_DECODE_FLOAT32(int4, Int4, double, kDouble)
LOWBIT_DECODE_FLOAT32(int4_block32, Int4Block32, scale32, k32)
LOWBIT_DECODE_FLOAT32(int8, Int8, scale32, k32)
