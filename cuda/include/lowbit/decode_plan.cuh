// Who does what in linear_decode: rows to CTAs, in-features to warps, and where things lie in shared memory.
//
// A CTA takes an even share of the rows, cut into tiles of 16. Its warps share the in-features: these are cut into
// units of 128 bytes of codes a row, and a warp visits (unit, tile) after (unit, tile), with the activations of the
// unit in registers and a sum of its own for every tile. The units that are left when all warps have had equally many
// are shared out tile by tile, so that no warp has a whole round more than another.
#pragma once

#include "weight.cuh"

namespace lowbit {

constexpr int kLanes = 32;
constexpr uint32_t kWholeWarp = 0xffffffffu;
constexpr int kTileRows = 16;
constexpr int kUnitBytes = 128;
// Tokens in one product of the tensor cores.
constexpr int kTokenTile = 8;

// The pair table of 4-bit codes: 256 entries, one for each byte, 32 copies of each, so that a lane reads its own bank.
// Entries are 256 bytes apart, which makes an address of a byte without arithmetic; the gaps between them hold sums,
// or beside float32 activations the second parts of the pairs.
constexpr int kTableStride = 256;
constexpr int kTableBytes = 256 * kTableStride;
constexpr int kGap = kTableStride / 2;
constexpr int kGapBytes = 256 * kGap;
// The values of the 256 codes of a double-quantized scale.
constexpr int kScaleMapBytes = 256 * 4;

// How activations of T meet the tensor cores. 16-bit floats are an operand as they are. A float32 is the sum of two
// float16, after a power of two has brought the largest of its row and unit under the end of their range: 22 bits, of what
// is not far below the largest one. Each of the two has a column of its own. The values of a codebook are two float16 as
// well, and all four products are taken.
template <typename T>
struct Operand {
  using Number = T;
  static constexpr int kColumns = 1;  // of a token
};
template <>
struct Operand<float> {
  using Number = float16;
  static constexpr int kColumns = 2;
};

// Powers of two that bring numbers up to `largest` to about 2^15, and back.
struct Magnitude {
  float up, down;

  __device__ __forceinline__ explicit Magnitude(float largest) {
    // In the exponents of fp32. The smallest numbers are left below, so that `down` is no subnormal number.
    const uint32_t exponent = __float_as_uint(largest) >> 23 & 255;
    const uint32_t raised = min(127u + 14u + 127u - exponent, 253u);
    up = __uint_as_float(raised << 23);
    down = __uint_as_float((254u - raised) << 23);
  }
};

// One call, mirrored by the host, which also makes the divisions: they would keep every warp busy before its first
// load.
struct DecodeOperands {
  const void* x;     // [tokens, cols] of T, rows x_stride elements apart; 16-byte aligned, x_stride a multiple of 8
  const void* bias;  // [rows] of bias_dtype, or null
  void* out;         // [tokens, rows] of T
  uint32_t x_stride;
  int32_t tokens;
  Dtype bias_dtype;
  int32_t rows_each;     // rows / grid
  int32_t rows_rest;     // rows % grid: this many CTAs take one row more
  int32_t full_rounds;   // units / warps
  int32_t rest_units;    // units % warps
  int32_t rest_parts;    // warps / rest_units, 1 where there is no rest
  int32_t tiles_a_pass;  // tiles of a CTA whose sums share the memory at a time
  int32_t depth;         // stages of a warp: 1 or 2
  int32_t is_dependent;  // launched as a dependent kernel: it may start before the previous one has written x
};
static_assert(sizeof(DecodeOperands) == 72, "as the host lays it out");

// Where in a row's scales the entry of scale_2 lies that they share: behind at most 8 codes.
constexpr int kScale2Offset = 12;

// How scales are stored: fp32, fp16 or bf16 as scale_dtype says, 8-bit codes.
enum class Scales { k32, k16, kDouble };

// The sizes that a kind of weight implies. kGroup: in-features between two applications of a scale.
template <int kBits_, int kGroup_, Scales kScales_, bool kShift_>
struct DecodeShape {
  static constexpr int kBits = kBits_;
  static constexpr int kGroup = kGroup_;
  static constexpr Scales kScales = kScales_;
  static constexpr bool kShift = kShift_;
  static constexpr int kUnit = kUnitBytes * 8 / kBits;
  static constexpr int kLogUnit = kBits == 4 ? 8 : 7;
  static constexpr int kGroups = kUnit / kGroup;
  static constexpr int kLogGroup = kGroup == 64 ? 6 : 5;
  // A lane's codes of a group and a row: consecutive bytes, the quarter that its place in the fragment asks for.
  static constexpr int kLaneBytes = kGroup * kBits / 8 / 4;
  static constexpr int kLaneCols = kGroup / 4;
  static constexpr int kProducts = kLaneCols / 4;
  // One row's scales of a unit in a stage, as stored; kScale2Offset is among them.
  static constexpr int kScaleBytes = 4 * kGroups;
  static constexpr int kLogScaleBytes = kScales == Scales::k32 ? 2 : kScales == Scales::k16 ? 1 : 0;
  static constexpr int kScaleWords = (kGroups << kLogScaleBytes) / 4;
  static constexpr int kShiftWords = kScales == Scales::k16 ? kGroups / 2 : kGroups;
  static constexpr int kCodesBytes = kTileRows * kUnitBytes;
  static constexpr int kShiftOffset = kCodesBytes + kTileRows * kScaleBytes;
  static constexpr int kStageBytes = kShiftOffset + (kShift ? kTileRows * kScaleBytes : 0);
  // Shared memory: the pair table with sums in its gaps, the map of double-quantized scales, the stages of each warp, and
  // what is left, for sums.
  static constexpr int kScaleMap = kBits == 4 ? kTableBytes : 0;
  static constexpr int kStages = kScaleMap + (kScales == Scales::kDouble ? kScaleMapBytes : 0);
};

// The rows of a CTA.
struct RowShare {
  int first, count, tiles;

  __device__ __forceinline__ explicit RowShare(const DecodeOperands& operands) {
    const int index = blockIdx.x;
    first = index * operands.rows_each + min(index, operands.rows_rest);
    count = operands.rows_each + (index < operands.rows_rest ? 1 : 0);
    tiles = (count + kTileRows - 1) / kTileRows;
  }
};

// The units of a warp, in rounds. In every full round each warp takes one unit; in the last one rest_parts warps share
// a unit, each with its part of the tiles.
struct UnitShare {
  int warp, warps;
  int full_rounds, rounds;
  int last_unit, part, parts;

  __device__ __forceinline__ UnitShare(const DecodeOperands& operands, int warp_, int warps_)
      : warp(warp_),
        warps(warps_),
        full_rounds(operands.full_rounds),
        rounds(operands.full_rounds),
        parts(operands.rest_parts) {
    last_unit = warp;
    for (part = 0; part < parts && last_unit >= operands.rest_units; ++part) last_unit -= operands.rest_units;
    if (operands.rest_units > 0 && part < parts) ++rounds;
    last_unit += full_rounds * warps;
  }

  __device__ __forceinline__ int unit(int round) const {
    return round < full_rounds ? round * warps + warp : last_unit;
  }
  // The first and the end of this warp's tiles among [begin, end), in a round.
  __device__ __forceinline__ int first_tile(int round, int begin, int end) const {
    return round < full_rounds ? begin : begin + (end - begin) * part / parts;
  }
  __device__ __forceinline__ int end_tile(int round, int begin, int end) const {
    return round < full_rounds ? end : begin + (end - begin) * (part + 1) / parts;
  }
};

}  // namespace lowbit
