// The sums of linear_decode: every warp has its own for each tile of a pass, in shared memory, until all units are in.
#pragma once

#include "decode_plan.cuh"

namespace lowbit {

// Where the sums of a CTA lie: [tile of the pass][warp][row of the tile][column], 2^log_columns columns: those of the
// tokens.
template <typename T, typename Shape>
struct Sums {
  static constexpr int kColumns = Operand<T>::kColumns;
  static constexpr int kSumsInGaps = Shape::kBits == 4 && kColumns == 1 ? kGapBytes : 0;
  uint8_t* memory;
  int warps;
  int log_columns;
  uint32_t spare;

  __device__ __forceinline__ Sums(uint8_t* memory_, int warps_, int depth, int tokens)
      : memory(memory_),
        warps(warps_),
        log_columns(tokens * kColumns > 8   ? 4
                    : tokens * kColumns > 4 ? 3
                    : tokens * kColumns > 2 ? 2
                                            : 1),
        spare(Shape::kStages + warps_ * depth * Shape::kStageBytes) {}

  __device__ __forceinline__ uint32_t bytes_of_warp() const { return kTileRows * 4 << log_columns; }

  // Where byte `offset` of the sums lies: in the gaps of the pair table as long as there are any.
  __device__ __forceinline__ float2& at(uint32_t offset) const { return in_memory(place_of(offset)); }

  // The offset of row g and column 2 t.
  __device__ __forceinline__ uint32_t offset_of_lane(int tile, int warp, int lane) const {
    return (tile * warps + warp) * bytes_of_warp() + (lane / 4 << log_columns) * 4 + lane % 4 * 8;
  }

  // What a lane holds of operand D: rows g and g + 8, columns 2 t and 2 t + 1 of each tile of tokens. `offset` is that of
  // the first. The gaps hold whole sums of a warp or none of them, so its place tells the others.
  template <int kTokenTiles>
  __device__ __forceinline__ void load(float (&d)[kTokenTiles][4], uint32_t offset, int lane) const {
    const uint32_t upper = place_of(offset), lower = upper + bytes_to_lower(offset);
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      if (!has_columns(n, lane)) continue;
      const float2 of_upper = in_memory(upper + n * 32), of_lower = in_memory(lower + n * 32);
      d[n][0] = of_upper.x, d[n][1] = of_upper.y, d[n][2] = of_lower.x, d[n][3] = of_lower.y;
    }
  }

  template <int kTokenTiles>
  __device__ __forceinline__ void store(const float (&d)[kTokenTiles][4], uint32_t offset, int lane) const {
    const uint32_t upper = place_of(offset), lower = upper + bytes_to_lower(offset);
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      if (!has_columns(n, lane)) continue;
      in_memory(upper + n * 32) = make_float2(d[n][0], d[n][1]);
      in_memory(lower + n * 32) = make_float2(d[n][2], d[n][3]);
    }
  }

  __device__ __forceinline__ void clear(int tiles) const {
    const int bytes = tiles * warps * bytes_of_warp();
    for (int offset = threadIdx.x * 8; offset < bytes; offset += blockDim.x * 8) at(offset) = make_float2(0.0f, 0.0f);
  }

  // Adds up the warps' sums, in their order, and writes `rows` rows of the results.
  __device__ __forceinline__ void write_results(const DecodeOperands& operands, int64_t out_features, int first_row,
                                                int rows) const {
    const int log_pairs = log_columns - 1;
    for (int pair = threadIdx.x; pair < rows << log_pairs; pair += blockDim.x) {
      const int row = pair >> log_pairs, column = (pair & ((1 << log_pairs) - 1)) * 2, token = column / kColumns;
      float bias = 0.0f;
      if (operands.bias != nullptr) bias = lowbit::load(operands.bias, operands.bias_dtype, first_row + row);
      const float2 sum = sum_of_warps(row, column);
      T* out = static_cast<T*>(operands.out) + token * out_features + first_row + row;
      if constexpr (kColumns == 2) {
        if (token < operands.tokens) out[0] = from_float<T>(sum.x + sum.y + bias);
      } else {
        if (token < operands.tokens) out[0] = from_float<T>(sum.x + bias);
        if (token + 1 < operands.tokens) out[out_features] = from_float<T>(sum.y + bias);
      }
    }
  }

 private:
  __device__ __forceinline__ float2& in_memory(uint32_t place) const {
    return *reinterpret_cast<float2*>(memory + place);
  }

  static __device__ __forceinline__ bool is_in_gap(uint32_t offset) { return kSumsInGaps > 0 && offset < kSumsInGaps; }

  __device__ __forceinline__ uint32_t place_of(uint32_t offset) const {
    return is_in_gap(offset) ? kGap + offset + (offset & ~(kGap - 1u)) : spare + offset - kSumsInGaps;
  }

  // From row g to row g + 8: half of a warp's sums, which are either half a gap or whole gaps.
  __device__ __forceinline__ uint32_t bytes_to_lower(uint32_t offset) const {
    const uint32_t half = bytes_of_warp() / 2;
    return is_in_gap(offset) && half >= kGap ? 2 * half : half;
  }

  // Of `column` and the next one.
  __device__ __forceinline__ float2 sum_of_warps(int row, int column) const {
    float2 sum = make_float2(0.0f, 0.0f);
    uint32_t offset = row / kTileRows * warps * bytes_of_warp() + ((row % kTileRows << log_columns) + column) * 4;
#pragma unroll 4
    for (int warp = 0; warp < warps; ++warp, offset += bytes_of_warp()) {
      const float2 of_warp = at(offset);
      sum.x += of_warp.x;
      sum.y += of_warp.y;
    }
    return sum;
  }

  __device__ __forceinline__ bool has_columns(int token_tile, int lane) const {
    return token_tile * kTokenTile + lane % 4 * 2 < 1 << log_columns;
  }
};

}  // namespace lowbit
