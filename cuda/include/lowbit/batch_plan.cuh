// How linear_batch is shared out: tiles of the result, steps along the in-features, and a range of steps for each CTA.
//
// A tile is 128 rows of the weight times kTokens tokens. All steps of all tiles stand in one line, tile after tile, and
// every CTA takes as many consecutive ones as the others. So a CTA may begin in the middle of a tile and end in the
// middle of another: what it has of them goes to the workspace, and the CTA that comes last adds the parts up, in the
// order of the CTAs.
#pragma once

#include "dtype.cuh"
#include "weight.cuh"

namespace lowbit {

// Rows of a tile, and in-features of a step: 128 bytes of a token.
constexpr int kBatchRows = 128;
constexpr int kStepCols = 64;
constexpr int kStepChunks = kStepCols * 2 / 16;
// Blocks of at least 16 weights: at most 4 of a row in a step.
constexpr int kMaxStepBlocks = 4;

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

  __device__ __forceinline__ BatchTile(const Weight& w, const BatchOperands& operands, int kTokens, int index) {
    const int row_tile = index / operands.token_tiles;
    row = row_tile * kBatchRows;
    token = (index - row_tile * operands.token_tiles) * kTokens;
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

// A stage of the ring: activations [kTokens][128 bytes], codes [128 rows][32 or 64 bytes], then scales in fp32
// [blocks][128 rows] and, where there are any, shifts likewise. Chunks of 16 bytes of activations change places as the
// tensor cores want them ("128-byte swizzle"): stages begin where 1024 bytes do.
struct BatchStage {
  uint32_t codes, scales, shifts, bytes;

  __device__ __forceinline__ BatchStage(const Weight& w, const BatchOperands& operands, int kTokens)
      : codes(kTokens * kStepCols * 2),
        scales(codes + kBatchRows * kStepCols / 8 * w.bits),
        shifts(scales + (kBatchRows * 4 << operands.log_blocks)),
        bytes(((w.shifts == nullptr ? shifts : shifts + (shifts - scales)) + 1023) & ~1023u) {}
};

}  // namespace lowbit
