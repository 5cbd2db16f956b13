// The way of activations, codes, scales and shifts into the ring of linear_batch: what its producers do: copiers and scalers.
#pragma once

#include "batch_decode.cuh"
#include "batch_plan.cuh"
#include "mbarrier.cuh"
#include "ptx.cuh"

namespace lowbit {

// Activations and codes, some steps ahead of the arithmetic. What a thread copies lies one step of columns further each
// time, until a tile ends.
template <typename Shape>
struct BatchCopier {
  static constexpr int kTokensAtOnce = Shape::kCopiers / Shape::kChunks;
  static constexpr int kTokenRounds = (Shape::kTokens + kTokensAtOnce - 1) / kTokensAtOnce;
  static constexpr int kMaxCodeRounds = kBatchRows * Shape::kCols / 16 / Shape::kCopiers;
  const Weight& w;
  const BatchOperands& operands;
  int thread;
  StepCursor next;
  uint32_t x_to, codes_to;  // places in a stage
  int x_column, codes_column;
  // Of the tile of `next`: from where, and how many rounds have a token or a row.
  const uint8_t* x_from;
  const uint8_t* codes_from;
  int x_rounds, code_rounds;

  __device__ __forceinline__ BatchCopier(const Weight& w_, const BatchOperands& operands_, const BatchStage& layout,
                                         int begin, int thread_)
      : w(w_), operands(operands_), thread(thread_), next(begin, operands_.steps) {
    const int x_chunk = thread % Shape::kChunks;
    x_to = x_chunk / 8 * Shape::kPanelBytes + token() * 128 + ((x_chunk ^ token()) & 7) * 16;
    x_column = x_chunk * 8;
    const int chunk = thread % code_chunks();
    codes_to = layout.codes + (code_row() * code_chunks() + code_place(code_row(), chunk, code_chunks())) * 16;
    codes_column = chunk * (128 / w.bits);
    enter_tile();
  }

  // Starts the copies of the next step into `stage`.
  __device__ __forceinline__ void copy_step(uint32_t stage) {
    const int columns = static_cast<int>(w.cols) - next.in_tile * Shape::kCols;
    copy_activations(stage + x_to, x_column < columns ? x_rounds : 0);
    copy_codes(stage + codes_to, codes_column < columns ? code_rounds : 0);
    if (next.advance(operands.steps)) enter_tile();
  }

 private:
  __device__ __forceinline__ int token() const { return thread / Shape::kChunks; }
  __device__ __forceinline__ uint32_t code_chunks() const { return w.bits == 4 ? Shape::kCols / 32 : Shape::kCols / 16; }
  __device__ __forceinline__ int code_row() const { return thread / code_chunks(); }

  __device__ __forceinline__ void enter_tile() {
    const BatchTile tile(w, operands, Shape::kTokens, next.tile);
    x_from = static_cast<const uint8_t*>(operands.x) +
             (static_cast<uint64_t>(tile.token + token()) * operands.x_stride + next.in_tile * Shape::kCols + x_column) * 2;
    x_rounds = (tile.tokens_left - token() + kTokensAtOnce - 1) / kTokensAtOnce;
    codes_from = w.codes + (static_cast<uint64_t>(tile.row + code_row()) * w.row_codes + next.in_tile * Shape::kCols +
                            codes_column) * w.bits / 8;
    const int rows_at_once = Shape::kCopiers / code_chunks();
    code_rounds = (tile.rows_left - code_row() + rows_at_once - 1) / rows_at_once;
  }

  __device__ __forceinline__ void copy_activations(uint32_t to, int rounds) {
    const uint64_t stride = static_cast<uint64_t>(kTokensAtOnce * 2) * operands.x_stride;
#pragma unroll
    for (int i = 0; i < kTokenRounds; ++i) {
      if (Shape::kTokens % kTokensAtOnce != 0 && token() + i * kTokensAtOnce >= Shape::kTokens) continue;
      copy_16_async(to + i * kTokensAtOnce * 128, x_from + i * stride, i < rounds);
    }
    x_from += Shape::kCols * 2;
  }

  __device__ __forceinline__ void copy_codes(uint32_t to, int rounds) {
    if (w.bits == 4) {
      copy_code_rounds<kMaxCodeRounds / 2>(to, rounds, w.row_codes / 2);
      codes_from += Shape::kCols / 2;
    } else {
      copy_code_rounds<kMaxCodeRounds>(to, rounds, w.row_codes);
      codes_from += Shape::kCols;
    }
  }

  template <int kRounds>
  __device__ __forceinline__ void copy_code_rounds(uint32_t to, int rounds, int64_t row_bytes) {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      copy_16_async_128(to + i * Shape::kCopiers * 16, codes_from + i * (kBatchRows / kRounds) * row_bytes, i < rounds);
    }
  }
};

// A scale and a shift on their way: what was loaded, before its meaning.
struct StoredNumbers {
  uint32_t scale, shift;
  float scale_2;
};

// Scales and shifts, split: loaded a step before they are stored. A thread has one row.
template <typename T, typename Shape>
struct BatchScaler {
  static_assert(Shape::kScalers == kBatchRows, "a thread for each row");
  const Weight& w;
  const BatchOperands& operands;
  int thread;
  StepCursor next;
  int end;
  float multiplier;  // what the table of code values was divided by
  float offset;
  int64_t row_block;  // the row's first, or -1 where the tile has no such row
  // Of the first blocks of a step; small blocks have more, which are loaded when they are stored.
  static constexpr int kLoaded = Shape::kPanels;
  StoredNumbers numbers[kLoaded];

  __device__ __forceinline__ BatchScaler(const Weight& w_, const BatchOperands& operands_, int begin, int end_,
                                         float multiplier_, int thread_)
      : w(w_),
        operands(operands_),
        thread(thread_),
        next(begin, operands_.steps),
        end(end_),
        multiplier(multiplier_),
        offset(w_.scale_2 == nullptr ? 0.0f : *w_.scale_offset) {
    enter_tile();
    load();
  }

  // Stores the numbers of the next step into its stage, and asks for those of the one after it.
  __device__ __forceinline__ void store(uint8_t* stage, const BatchStage& layout) {
#pragma unroll
    for (int i = 0; i < kLoaded; ++i) {
      if (i >> operands.log_blocks == 0) store_numbers(stage, layout, i, numbers[i]);
    }
#pragma unroll 1
    for (int i = kLoaded; i >> operands.log_blocks == 0; ++i) {
      StoredNumbers more;
      load_block(more, i);
      store_numbers(stage, layout, i, more);
    }
    if (next.advance(operands.steps)) enter_tile();
    if (next.step < end) load();
  }

 private:
  __device__ __forceinline__ void enter_tile() {
    const BatchTile tile(w, operands, Shape::kTokens, next.tile);
    row_block = thread < tile.rows_left ? (tile.row + thread) * w.blocks_per_row : -1;
  }

  __device__ __forceinline__ void load() {
#pragma unroll
    for (int i = 0; i < kLoaded; ++i) {
      if (i >> operands.log_blocks == 0) load_block(numbers[i], i);
    }
  }

  // The numbers of block `i` of the next step; 0 past the end of the weight.
  __device__ __forceinline__ void load_block(StoredNumbers& number, int i) const {
    const int col = next.in_tile * Shape::kCols + i * (Shape::kCols >> operands.log_blocks);
    number = {0, 0, 0.0f};
    if (row_block >= 0 && col < w.cols) {
      load_numbers(number, row_block + (w.block_shift < 0 ? 0 : col >> w.block_shift));
    }
  }

  __device__ __forceinline__ void store_numbers(uint8_t* stage, const BatchStage& layout, int i,
                                                const StoredNumbers& number) const {
    const int entry = i * kBatchRows + thread;
    reinterpret_cast<uint2*>(stage + layout.scales)[entry] = split_number<T>(scale_of_stored(number) * multiplier);
    if (w.shifts != nullptr) {
      reinterpret_cast<uint2*>(stage + layout.shifts)[entry] = split_number<T>(float_of_stored(number.shift));
    }
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
