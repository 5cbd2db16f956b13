// The way of activations, codes, scales and shifts into the ring of linear_batch: all threads copy.
#pragma once

#include "batch_plan.cuh"
#include "ptx.cuh"

namespace lowbit {

// Activations and codes, some steps ahead of the arithmetic. What a thread copies lies one step of columns further each
// time, until a tile ends.
template <int kTokens, int kThreads>
struct BatchCopier {
  static constexpr int kTokensAtOnce = kThreads / kStepChunks;
  static constexpr int kTokenRounds = (kTokens + kTokensAtOnce - 1) / kTokensAtOnce;
  static constexpr int kMaxCodeRounds = kBatchRows * kStepCols / 16 / kThreads;
  const Weight& w;
  const BatchOperands& operands;
  StepCursor next;
  int end;
  uint32_t x_to, codes_to;  // places in a stage
  int x_column, codes_column;
  // Of the tile of `next`: from where, and how many rounds have a token or a row.
  const uint8_t* x_from;
  const uint8_t* codes_from;
  int x_rounds, code_rounds;

  __device__ __forceinline__ BatchCopier(const Weight& w_, const BatchOperands& operands_, const BatchStage& layout,
                                         int begin, int end_)
      : w(w_), operands(operands_), next(begin, operands_.steps), end(end_) {
    x_to = token() * kStepBytes + (threadIdx.x % kStepChunks ^ token() % 8) * 16;
    x_column = threadIdx.x % kStepChunks * 8;
    // A 4-bit row has two chunks a step; those of every other four rows change places, so that 8 rows meet no bank twice.
    const int chunk = threadIdx.x & (code_chunks() - 1), place = w.bits == 4 ? chunk ^ (code_row() >> 2 & 1) : chunk;
    codes_to = layout.codes + (code_row() * code_chunks() + place) * 16;
    codes_column = chunk * (128 / w.bits);
    if (begin < end) enter_tile();
  }

  // Starts the copies of the next step into `stage`; a group of copies even where there is none.
  __device__ __forceinline__ void copy_step(uint32_t stage) {
    if (next.step < end) {
      const int columns = static_cast<int>(w.cols) - next.in_tile * kStepCols;
      copy_activations(stage + x_to, x_column < columns ? x_rounds : 0);
      copy_codes(stage + codes_to, codes_column < columns ? code_rounds : 0);
      if (next.advance(operands.steps)) enter_tile();
    }
    commit_copies();
  }

 private:
  static constexpr int kStepBytes = kStepCols * 2;

  __device__ __forceinline__ int token() const { return threadIdx.x / kStepChunks; }
  __device__ __forceinline__ int code_chunks() const { return w.bits == 4 ? 2 : 4; }
  __device__ __forceinline__ int code_row() const { return threadIdx.x / (w.bits == 4 ? 2 : 4); }

  __device__ __forceinline__ void enter_tile() {
    const BatchTile tile(w, operands, kTokens, next.tile);
    x_from = static_cast<const uint8_t*>(operands.x) +
             (static_cast<uint64_t>(tile.token + token()) * operands.x_stride + next.in_tile * kStepCols + x_column) * 2;
    x_rounds = (tile.tokens_left - token() + kTokensAtOnce - 1) / kTokensAtOnce;
    codes_from = w.codes + (static_cast<uint64_t>(tile.row + code_row()) * w.row_codes + next.in_tile * kStepCols +
                            codes_column) * w.bits / 8;
    const int rows_at_once = kThreads / code_chunks();
    code_rounds = (tile.rows_left - code_row() + rows_at_once - 1) / rows_at_once;
  }

  __device__ __forceinline__ void copy_activations(uint32_t to, int rounds) {
    const uint64_t stride = static_cast<uint64_t>(kTokensAtOnce * 2) * operands.x_stride;
#pragma unroll
    for (int i = 0; i < kTokenRounds; ++i) {
      if (kTokens % kTokensAtOnce != 0 && token() + i * kTokensAtOnce >= kTokens) continue;
      copy_16_async(to + i * kTokensAtOnce * kStepBytes, x_from + i * stride, i < rounds);
    }
    x_from += kStepBytes;
  }

  __device__ __forceinline__ void copy_codes(uint32_t to, int rounds) {
    if (w.bits == 4) {
      copy_code_rounds<kMaxCodeRounds / 2>(to, rounds, w.row_codes / 2);
      codes_from += kStepCols / 2;
    } else {
      copy_code_rounds<kMaxCodeRounds>(to, rounds, w.row_codes);
      codes_from += kStepCols;
    }
  }

  template <int kRounds>
  __device__ __forceinline__ void copy_code_rounds(uint32_t to, int rounds, int64_t row_bytes) {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      copy_16_async_128(to + i * kThreads * 16, codes_from + i * (kBatchRows / kRounds) * row_bytes, i < rounds);
    }
  }
};

// A scale and a shift on their way: what was loaded, before its meaning.
struct StoredNumbers {
  uint32_t scale, shift;
  float scale_2;
};

// Scales and shifts as fp32: loaded a step before they are stored, two before they are read. A thread has one row.
template <int kTokens, int kThreads>
struct BatchScaler {
  static constexpr int kBlocksAtOnce = kThreads / kBatchRows;
  static constexpr int kRounds = kMaxStepBlocks / kBlocksAtOnce;
  const Weight& w;
  const BatchOperands& operands;
  StepCursor next;
  int end;
  float multiplier;  // what the table of code values was divided by
  float offset;
  int first_block;   // in a step
  int64_t row_block; // the row's first, or -1 where the tile has no such row
  StoredNumbers numbers[kRounds];

  __device__ __forceinline__ BatchScaler(const Weight& w_, const BatchOperands& operands_, int begin, int end_,
                                         float multiplier_)
      : w(w_),
        operands(operands_),
        next(begin, operands_.steps),
        end(end_),
        multiplier(multiplier_),
        offset(w_.scale_2 == nullptr ? 0.0f : *w_.scale_offset),
        first_block(threadIdx.x / kBatchRows) {
    if (begin < end) enter_tile();
  }

  // Asks for the numbers of the next step.
  __device__ __forceinline__ void load() {
    if (next.step >= end) return;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int block = first_block + i * kBlocksAtOnce;
      if (block >> operands.log_blocks != 0) break;
      const int col = next.in_tile * kStepCols + block * (kStepCols >> operands.log_blocks);
      numbers[i] = {0, 0, 0.0f};
      if (row_block >= 0 && col < w.cols) load_numbers(numbers[i], row_block + (w.block_shift < 0 ? 0 : col >> w.block_shift));
    }
  }

  // Stores them into their stage, and moves on.
  __device__ __forceinline__ void store(uint8_t* stage, const BatchStage& layout) {
    if (next.step >= end) return;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      if ((first_block + i * kBlocksAtOnce) >> operands.log_blocks != 0) break;
      const int entry = i * kThreads + threadIdx.x;
      reinterpret_cast<float*>(stage + layout.scales)[entry] = scale_of_stored(numbers[i]) * multiplier;
      if (w.shifts != nullptr) {
        reinterpret_cast<float*>(stage + layout.shifts)[entry] = float_of_stored(numbers[i].shift);
      }
    }
    if (next.advance(operands.steps)) enter_tile();
  }

 private:
  __device__ __forceinline__ void enter_tile() {
    const BatchTile tile(w, operands, kTokens, next.tile);
    const int row = threadIdx.x % kBatchRows;
    row_block = row < tile.rows_left ? (tile.row + row) * w.blocks_per_row : -1;
  }

  __device__ __forceinline__ uint32_t load_bits(const void* buffer, int64_t index) const {
    return w.scale_dtype == Dtype::kFloat32 ? static_cast<const uint32_t*>(buffer)[index]
                                            : static_cast<const uint16_t*>(buffer)[index];
  }

  __device__ __forceinline__ void load_numbers(StoredNumbers& number, int64_t block) const {
    if (w.scale_2 != nullptr) {
      number.scale = static_cast<const uint8_t*>(w.scales)[block];
      number.scale_2 = w.scale_2[block / kScalesPerScale2];
    } else {
      number.scale = load_bits(w.scales, block);
    }
    if (w.shifts != nullptr) number.shift = load_bits(w.shifts, block);
  }

  __device__ __forceinline__ float float_of_stored(uint32_t bits) const {
    const float of_float16 = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    return w.scale_dtype == Dtype::kFloat32    ? __uint_as_float(bits)
           : w.scale_dtype == Dtype::kBfloat16 ? __uint_as_float(bits << 16)
                                               : of_float16;
  }

  __device__ __forceinline__ float scale_of_stored(const StoredNumbers& number) const {
    if (w.scale_2 == nullptr) return float_of_stored(number.scale);
    // Two roundings, by definition. Past the end of the weight the product is 0, whatever this is.
    return __fadd_rn(__fmul_rn(lowbit_dynamic_map[number.scale], number.scale_2), offset);
  }
};

}  // namespace lowbit
