// How linear_batch is shared out: tiles of the result, steps along the in-features, and a range of steps for each CTA.
//
// A tile is 128 rows of the weight times kTokens tokens. All steps of all tiles stand in one line, tile after tile, and
// every CTA takes as many consecutive ones as the others. So a CTA may begin in the middle of a tile and end in the
// middle of another: what it has of them goes to the workspace, and the CTA that comes last adds the parts up, in the
// order of the CTAs.
#pragma once

#include "dtype.cuh"
#include "weight.cuh"
#include "wgmma.cuh"

namespace lowbit {

// Rows of a tile.
constexpr int kBatchRows = 128;

// The sizes of a kernel: tokens of a tile, and steps of one or two panels of 64 in-features, 128 bytes of a token.
template <int kTokens_, int kPanels_>
struct BatchShape {
  static constexpr int kTokens = kTokens_;
  static constexpr int kPanels = kPanels_;
  // Four warps copy activations and codes, four bring scales. With wgmma sixteen multiply where their registers suffice:
  // they wait in turns.
  static constexpr int kCopiers = 128;
  static constexpr int kScalers = 128;
#if defined(LOWBIT_HAS_WGMMA)
  static constexpr int kConsumers = kTokens <= 96 ? 512 : 256;
#else
  static constexpr int kConsumers = 256;
#endif
  static constexpr int kThreads = kConsumers + kCopiers + kScalers;
  static constexpr int kPanelBytes = 128 * kTokens;
  static constexpr int kCols = 64 * kPanels;  // of a step
  static constexpr int kChunks = kCols / 8;   // of 16 bytes, of a token
  static constexpr int kSixteenths = kCols / 16;
  static constexpr int kMaxBlocks = kCols / 16;  // of a row in a step
};

// One call, mirrored by the host.
struct BatchOperands {
  const void* x;       // [tokens, cols] of T, rows x_stride elements apart; 16-byte aligned, x_stride a multiple of 8
  const void* bias;    // [rows] of bias_dtype, or null
  void* out;           // [tokens, rows] of T
  float* partials;     // two tiles of [kTokens][kBatchRows] for every CTA, where tiles are shared
  uint32_t* arrivals;  // a counter for each tile: 0, and 0 again when the kernel is done
  uint32_t x_stride;
  int32_t tokens;
  Dtype bias_dtype;
  int32_t token_tiles;
  int32_t steps;       // of a tile
  int32_t steps_each;  // steps of a CTA
  int32_t steps_rest;  // this many CTAs take one step more
  int32_t stages;      // of the ring in shared memory
  int32_t log_blocks;  // log2 of the blocks of scales of a row in a step
  int32_t reserved;
};
static_assert(sizeof(BatchOperands) == 80, "as the host lays it out");

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

  __device__ __forceinline__ BatchTile(const Weight& w, const BatchOperands& operands, int tile_tokens, int index) {
    const int row_tile = index / operands.token_tiles;
    row = row_tile * kBatchRows;
    token = (index - row_tile * operands.token_tiles) * tile_tokens;
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

// A stage of the ring: activations [panel][kTokens][128 bytes], codes [128 rows][32 or 64 bytes a panel], then scales
// [blocks][128 rows][8 bytes] and, where there are any, shifts likewise. Chunks of 16 bytes of a token's panel change places
// as the tensor cores want them ("128-byte swizzle"): stages begin where 1024 bytes do.
struct BatchStage {
  uint32_t codes, scales, shifts, bytes;

  template <typename Shape>
  static __device__ __forceinline__ BatchStage of(const Weight& w, const BatchOperands& operands, Shape) {
    const uint32_t codes = Shape::kPanels * Shape::kPanelBytes, scales = codes + kBatchRows * Shape::kCols / 8 * w.bits;
    const uint32_t numbers = kBatchRows * 8 << operands.log_blocks;
    const uint32_t end = scales + (w.shifts == nullptr ? numbers : 2 * numbers);
    return {codes, scales, scales + numbers, (end + 1023) & ~1023u};
  }
};

// The place of a chunk of 16 bytes of codes in its row of 2, 4 or 8 chunks: chunks of 8 rows meet no bank twice.
__device__ __forceinline__ int code_place(int row, int chunk, int chunks) {
  return chunk ^ (chunks == 2 ? row >> 2 & 1 : chunks == 4 ? row >> 1 & 3 : row & 7);
}

}  // namespace lowbit
