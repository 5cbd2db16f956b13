// The sums of linear_decode: every warp has its own for each tile of a pass, in shared memory, until all units are in.
#pragma once

#include "decode_plan.cuh"

namespace lowbit {

// Where the sums of a CTA lie: [tile of the pass][warp][row of the tile][columns], columns = 2^log_columns tokens.
template <typename Shape>
struct Sums {
  uint8_t* memory;
  DecodeMemory<Shape> place;
  int warps;
  int log_columns;

  static __device__ __forceinline__ int log_columns_of(int tokens) {
    return tokens > 8 ? 4 : tokens > 4 ? 3 : tokens > 2 ? 2 : 1;
  }

  __device__ __forceinline__ Sums(uint8_t* memory_, int warps_, int tokens)
      : memory(memory_), place(warps_, warps_ * kTileRows * 4 << log_columns_of(tokens)), warps(warps_),
        log_columns(log_columns_of(tokens)) {}

  __device__ __forceinline__ float2& at(int tile, int warp, int number) const {
    const uint32_t bytes_of_warp = kTileRows * 4 << log_columns;
    return *reinterpret_cast<float2*>(memory + place.sums((tile * warps + warp) * bytes_of_warp + number * 4));
  }

  // What a lane holds of operand D: rows g and g + 8, columns 2 t and 2 t + 1 of each tile of tokens.
  template <int kTokenTiles>
  __device__ __forceinline__ void load(float (&d)[kTokenTiles][4], int tile, int warp, int lane) const {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      if (!has_columns(n, lane)) continue;
      const float2 upper = at(tile, warp, number_of(n, lane)), lower = at(tile, warp, number_of(n, lane) + (8 << log_columns));
      d[n][0] = upper.x, d[n][1] = upper.y, d[n][2] = lower.x, d[n][3] = lower.y;
    }
  }

  template <int kTokenTiles>
  __device__ __forceinline__ void store(const float (&d)[kTokenTiles][4], int tile, int warp, int lane) const {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      if (!has_columns(n, lane)) continue;
      at(tile, warp, number_of(n, lane)) = make_float2(d[n][0], d[n][1]);
      at(tile, warp, number_of(n, lane) + (8 << log_columns)) = make_float2(d[n][2], d[n][3]);
    }
  }

  __device__ __forceinline__ void clear(int tiles) const {
    const int pairs = (kTileRows << log_columns) / 2;
    for (int i = threadIdx.x; i < tiles * warps * pairs; i += blockDim.x) at(0, 0, 2 * i) = make_float2(0.0f, 0.0f);
  }

  // Adds up the warps' sums, in their order, and writes `rows` rows of the results.
  template <typename T>
  __device__ __forceinline__ void write_results(const DecodeOperands& operands, int64_t out_features, int64_t first_row,
                                                int rows) const {
    const int log_pairs = log_columns - 1;
    const int pairs = (rows + kTileRows - 1) / kTileRows * kTileRows << log_pairs;
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
      const int row = i >> log_pairs, token = (i & ((1 << log_pairs) - 1)) * 2;
      const int tile = row / kTileRows, number = (row % kTileRows << log_columns) + token;
      float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 8
      for (int warp = 0; warp < warps; ++warp) {
        const float2 part = at(tile, warp, number);
        sum.x += part.x;
        sum.y += part.y;
      }
      if (row >= rows) continue;
      const float bias =
          operands.bias == nullptr ? 0.0f : lowbit::load(operands.bias, operands.bias_dtype, first_row + row);
      T* out = static_cast<T*>(operands.out) + first_row + row;
      if (token < operands.tokens) out[token * out_features] = from_float<T>(sum.x + bias);
      if (token + 1 < operands.tokens) out[(token + 1) * out_features] = from_float<T>(sum.y + bias);
    }
  }

 private:
  __device__ __forceinline__ bool has_columns(int token_tile, int lane) const {
    return token_tile * kTokenTile + lane % 4 * 2 < 1 << log_columns;
  }
  __device__ __forceinline__ int number_of(int token_tile, int lane) const {
    return (lane / 4 << log_columns) + token_tile * kTokenTile + lane % 4 * 2;
  }
};

}  // namespace lowbit
