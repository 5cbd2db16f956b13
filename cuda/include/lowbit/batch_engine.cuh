// The tensor cores of linear_batch: wgmma on compute capability 9.0, mma.sync elsewhere. Either way a warp has 16 rows
// of the weight for each of its row tiles, as operand A in registers, and all tokens of the tile as operand B from
// shared memory; warps that have the same rows share a step's in-features, and their sums are added at the end.
#pragma once

#include "batch_decode.cuh"
#include "batch_plan.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace lowbit {

#if defined(LOWBIT_HAS_WGMMA)

// Consumers need more registers than a thread has where all have the same number: producers leave them theirs.
template <typename Shape>
__device__ __forceinline__ void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
}
template <typename Shape>
__device__ __forceinline__ void take_registers() {
  if constexpr (Shape::kConsumers == 512) asm volatile("setmaxnreg.inc.sync.aligned.u32 96;");
  else asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
}

template <typename T, typename Shape>
struct BatchEngine {
  static constexpr int kTokens = Shape::kTokens;
  static constexpr int kSlices = Shape::kConsumers / 256;  // of the in-features of a step, 8 warps each
  static constexpr int kRowTiles = 1;
  static constexpr int kSixteenths = Shape::kSixteenths / kSlices;
  static constexpr int kChunk = kSixteenths;  // 16 in-features each, that are decoded together
  float d[kRowTiles][kTokens / 8][4];
  uint32_t described;  // operand B of the slice, from the start of a stage

  __device__ __forceinline__ explicit BatchEngine(int slice)
      : described(kept(describe_operand(slice / 4 * Shape::kPanelBytes + slice % 4 * 32))) {}

  static __device__ __forceinline__ int slice(int warp) { return warp / 8; }
  static __device__ __forceinline__ int row(int warp, int) { return warp % 8 * 16; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
      d[0][n][0] = d[0][n][1] = d[0][n][2] = d[0][n][3] = 0.0f;
      keep_in_registers(d[0][n]);
    }
  }

  // Other warps decode while this one waits: registers of products that are under way must not be written, and the
  // compiler does not see to it.
  __device__ __forceinline__ void multiply(const uint32_t (&a)[kRowTiles][kChunk][4], uint32_t stage, int) {
    const uint32_t x = described + (stage >> 4);
    begin_products();
#pragma unroll
    for (int j = 0; j < kSixteenths; ++j) {
      multiply_tokens<T, kTokens>(d[0], a[0][j], x + (j / 4 * Shape::kPanelBytes + j % 4 * 32) / 16);
    }
    end_products();
    wait_for_products<0>();
  }

  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) keep_in_registers(d[0][n]);
  }
};

#else

template <typename Shape>
__device__ __forceinline__ void leave_registers() {}
template <typename Shape>
__device__ __forceinline__ void take_registers() {}

template <typename T, typename Shape>
struct BatchEngine {
  static constexpr int kTokens = Shape::kTokens;
  static constexpr int kSlices = 2;  // of the in-features of a step, 4 warps each
  static constexpr int kRowTiles = 2;
  static constexpr int kSixteenths = Shape::kSixteenths / kSlices;
  static constexpr int kChunk = 2;  // 16 in-features each, that are decoded together
  float d[kRowTiles][kTokens / 8][4];
  int slice_first;

  __device__ __forceinline__ explicit BatchEngine(int slice) : slice_first(slice) {}

  static __device__ __forceinline__ int slice(int warp) { return warp / 4; }
  static __device__ __forceinline__ int row(int warp, int tile) { return warp % 4 * 32 + tile * 16; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) d[i][n][0] = d[i][n][1] = d[i][n][2] = d[i][n][3] = 0.0f;
    }
  }

  // 16 tokens at once: lane l gives the address of a row of matrix l / 8, which are tokens 0..7 and 8..15, each with
  // its lower and its upper 8 in-features.
  __device__ __forceinline__ void multiply(const uint32_t (&a)[kRowTiles][kChunk][4], uint32_t x, int first) {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) multiply_sixteenth(a, x, slice_first + first, j);
  }

  __device__ __forceinline__ void finish() {}

 private:
  __device__ __forceinline__ void multiply_sixteenth(const uint32_t (&a)[kRowTiles][kChunk][4], uint32_t x, int first,
                                                     int j) {
    const int lane = threadIdx.x % 32, token = lane / 16 * 8 + lane % 8, chunk = (first + j) % 4 * 2 + lane / 8 % 2;
    const uint32_t from = x + (first + j) / 4 * Shape::kPanelBytes + token * 128 + (chunk ^ token % 8) * 16;
#pragma unroll
    for (int n = 0; n < kTokens / 16; ++n) {
      uint32_t b[4];
      load_matrices(b, from + n * 16 * 128);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        float(&low)[4] = d[i][2 * n], (&high)[4] = d[i][2 * n + 1];
        multiply_tile<T>(low, a[i][j], b[0], b[1], low[0], low[1], low[2], low[3]);
        multiply_tile<T>(high, a[i][j], b[2], b[3], high[0], high[1], high[2], high[3]);
      }
    }
  }
};

#endif

}  // namespace lowbit
