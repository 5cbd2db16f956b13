// How linear_batch is shared out: tiles of the result, steps along the in-features, and a range of steps for each CTA.
//
// A tile is kRows rows of the weight times kTokens tokens. All steps of all tiles stand in one line, tile after tile, and
// every CTA takes as many consecutive ones as the others. So a CTA may begin in the middle of a tile and end in the
// middle of another: what it has of them goes to the workspace, and the CTA that comes last adds the parts up, in the
// order of the CTAs.
#pragma once

#include "dtype.cuh"
#include "weight.cuh"
#include "tensor_map.cuh"
#include "wgmma.cuh"

namespace lowbit {

// The sizes of a kernel: tokens of a tile, and steps of one or two panels of 64 in-features, 128 bytes of a token. Scales are
// applied to the weights, or with `kScalesSums` to the fp32 sums over a panel: that is less work for few tokens, but takes
// registers for two sums, blocks of at least a panel and no shifts. kChunk: 16 in-features each that are decoded at a time.
template <int kTokens_, int kPanels_, bool kScalesSums_ = false, int kChunk_ = 4>
struct BatchShape {
  static constexpr int kRows = 128;  // of a tile
  static constexpr int kTokens = kTokens_;
  static constexpr int kPanels = kPanels_;
  static constexpr bool kScalesSums = kScalesSums_;
  static constexpr int kChunk = kChunk_;
  static constexpr int kConsumers = 256;  // threads that multiply
#if defined(LOWBIT_HAS_WGMMA)
  // A thread for each row brings scales, and the first one asks the copy engine for the rest.
  static constexpr int kProducers = kRows;
#else
  static constexpr int kProducers = 256;
#endif
  static constexpr int kThreads = kConsumers + kProducers;
  static constexpr int kPanelBytes = 128 * kTokens;
  static constexpr int kCols = 64 * kPanels;  // of a step
  static constexpr int kChunks = kCols / 8;   // of 16 bytes, of a token
  static constexpr int kSixteenths = kCols / 16;
  // Of a scale or a shift in a stage: fp32, or two parts, each of them twice.
  static constexpr int kNumberBytes = kScalesSums ? 4 : 8;
};

// One call, mirrored by the host.
struct BatchOperands {
  const void* x;       // [tokens, cols] of T, rows x_stride elements apart; 16-byte aligned, x_stride a multiple of 8
  const void* bias;    // [rows] of bias_dtype, or null
  void* out;           // [tokens, rows] of T
  float* partials;     // two tiles of [kTokens][kRows] for every CTA, where tiles are shared
  uint32_t* arrivals;  // a counter for each tile: 0, and 0 again when the kernel is done
  const int32_t* gate; // unless null, nothing is done where what it has is not above `gate_above`
  uint32_t x_stride;
  int32_t tokens;
  Dtype bias_dtype;
  int32_t token_tiles;
  int32_t steps;       // of a tile
  int32_t steps_each;  // steps of a CTA
  int32_t steps_rest;  // this many CTAs take one step more
  int32_t stages;      // of the ring in shared memory
  int32_t log_blocks;  // log2 of the blocks of scales of a row in a step
  int32_t stage_bytes;
  int32_t gate_above;
};
static_assert(sizeof(BatchOperands) == 96, "as the host lays it out");

// For the copy engine of compute capability 9.0: x in boxes of kTokens tokens and a panel, swizzled by 128 bytes, and codes in
// boxes of kRows rows and the bytes of a step, swizzled by as many bytes. What is outside reads as 0.
struct BatchMaps {
  TensorMap x, codes;
};

// A range of steps for each CTA.
struct StepShare {
  int each, rest;

  __device__ __forceinline__ int begin(int cta) const { return cta * each + min(cta, rest); }
  // The CTA that a step belongs to.
  __device__ __forceinline__ int owner(int step) const {
    const int of_longer = rest * (each + 1);
    return step < of_longer ? step / (each + 1) : rest + (step - of_longer) / each;
  }
};

// Where a tile lies, and how much of it there is. A grouped product would find its weight and its tokens here.
struct BatchTile {
  int row, rows_left;
  int token, tokens_left;

  template <typename Shape>
  __device__ __forceinline__ BatchTile(const Weight& w, const BatchOperands& operands, Shape, int index) {
    const int row_tile = index / operands.token_tiles;
    row = row_tile * Shape::kRows;
    token = (index - row_tile * operands.token_tiles) * Shape::kTokens;
    rows_left = static_cast<int>(w.rows) - row;
    tokens_left = operands.tokens - token;
  }
};

// Walks steps in their line.
struct StepCursor {
  int step;  // of the line
  int tile, in_tile;

  __device__ __forceinline__ StepCursor(int step_, int steps)
      : step(step_), tile(step_ / steps), in_tile(step_ - tile * steps) {}
  // Returns whether it enters a tile.
  __device__ __forceinline__ bool advance(int steps) {
    ++step;
    if (++in_tile < steps) return false;
    in_tile = 0;
    ++tile;
    return true;
  }
};

// A stage of the ring: activations [panel][kTokens][128 bytes], codes [kRows][32 or 64 bytes a panel], then scales
// [blocks][kRows][kNumberBytes] and, where there are any, shifts likewise. Chunks of 16 bytes of a token's panel change places
// as the tensor cores want them ("128-byte swizzle"): stages begin where 1024 bytes do.
struct BatchStage {
  uint32_t codes, scales, shifts;

  template <typename Shape>
  static __device__ __forceinline__ BatchStage of(const Weight& w, const BatchOperands& operands, Shape) {
    const uint32_t codes = Shape::kPanels * Shape::kPanelBytes, scales = codes + Shape::kRows * Shape::kCols / 8 * w.bits;
    return {codes, scales, scales + (Shape::kRows * Shape::kNumberBytes << operands.log_blocks)};
  }
};

// The place of a chunk of 16 bytes of codes in its row of 2, 4 or 8 chunks: chunks of 8 rows meet no bank twice.
__device__ __forceinline__ int code_place(int row, int chunk, int chunks) {
  return chunk ^ (chunks == 2 ? row >> 2 & 1 : chunks == 4 ? row >> 1 & 3 : row & 7);
}

}  // namespace lowbit
