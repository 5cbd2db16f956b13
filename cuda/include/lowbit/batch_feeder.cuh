// The way of activations, codes, scales and shifts into the ring of linear_batch: what its producers do.
#pragma once

#include "batch_decode.cuh"
#include "batch_plan.cuh"
#include "mbarrier.cuh"
#include "ptx.cuh"
#include "tensor_map.cuh"

namespace lowbit {

#if defined(LOWBIT_HAS_WGMMA)

// Asks the copy engine for the activations and codes of a step after the other. One thread.
template <typename Shape>
struct BatchTiles {
  const BatchMaps& maps;
  const BatchOperands& operands;
  StepCursor next;
  int row, token;  // of the tile of `next`
  int step_bytes;  // of codes in a row
  uint32_t codes, bytes;  // place and size in a stage

  __device__ __forceinline__ BatchTiles(const Weight& w, const BatchOperands& operands_, const BatchMaps& maps_,
                                        const BatchStage& layout, int begin)
      : maps(maps_),
        operands(operands_),
        next(begin, operands_.steps),
        step_bytes(Shape::kCols / 8 * w.bits),
        codes(layout.codes),
        bytes(layout.codes + Shape::kRows * step_bytes) {
    prefetch_map(maps.x);
    prefetch_map(maps.codes);
    enter_tile();
  }

  __device__ __forceinline__ void copy_step(uint32_t stage, uint32_t barrier) {
    expect_bytes(barrier, bytes);
#pragma unroll
    for (int panel = 0; panel < Shape::kPanels; ++panel) {
      copy_box_async(stage + panel * Shape::kPanelBytes, maps.x, next.in_tile * Shape::kCols + panel * 64, token, barrier);
    }
    copy_box_async(stage + codes, maps.codes, next.in_tile * step_bytes, row, barrier);
    if (next.advance(operands.steps)) enter_tile();
  }

 private:
  __device__ __forceinline__ void enter_tile() {
    row = next.tile / operands.token_tiles * Shape::kRows;
    token = next.tile % operands.token_tiles * Shape::kTokens;
  }
};

#endif

// Activations and codes, some steps ahead of the arithmetic. What a thread copies lies one step of columns further each
// time, until a tile ends.
template <typename Shape>
struct BatchCopier {
  static constexpr int kTokensAtOnce = Shape::kProducers / Shape::kChunks;
  static constexpr int kTokenRounds = (Shape::kTokens + kTokensAtOnce - 1) / kTokensAtOnce;
  static constexpr int kMaxCodeRounds = Shape::kRows * Shape::kCols / 16 / Shape::kProducers;
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
    const BatchTile tile(w, operands, Shape{}, next.tile);
    x_from = static_cast<const uint8_t*>(operands.x) +
             (static_cast<uint64_t>(tile.token + token()) * operands.x_stride + next.in_tile * Shape::kCols + x_column) * 2;
    x_rounds = (tile.tokens_left - token() + kTokensAtOnce - 1) / kTokensAtOnce;
    codes_from = w.codes + (static_cast<uint64_t>(tile.row + code_row()) * w.row_codes + next.in_tile * Shape::kCols +
                            codes_column) * w.bits / 8;
    const int rows_at_once = Shape::kProducers / code_chunks();
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
      copy_16_async_128(to + i * Shape::kProducers * 16, codes_from + i * (Shape::kRows / kRounds) * row_bytes, i < rounds);
    }
  }
};

// A scale and a shift on their way: what was loaded, before its meaning.
struct StoredNumbers {
  uint32_t scale, shift;
  float scale_2;
};

// Steps whose numbers are loaded together, among as many as a group has at most.
struct StepGroup {
  static constexpr int kMost = 4;
  int begin, end;
};

// How scales are loaded: one at a time, whatever they are, or those of a group of steps at once.
enum class ScaleLoads { kSingle, kFloat32Pieces, kDoubleQuantizedPieces };

// Pieces are aligned: a block for each panel, no shifts, rows of whole groups of steps.
template <typename Shape>
__device__ __forceinline__ ScaleLoads scale_loads(const Weight& w) {
  constexpr int kLogPanel = 6;
  const bool has_pieces = w.block_shift == kLogPanel && w.shifts == nullptr &&
                          w.blocks_per_row % (StepGroup::kMost * Shape::kPanels) == 0 &&
                          reinterpret_cast<uintptr_t>(w.scales) % 16 == 0;
  if (!has_pieces || (w.scale_2 == nullptr && w.scale_dtype != Dtype::kFloat32)) return ScaleLoads::kSingle;
  return w.scale_2 == nullptr ? ScaleLoads::kFloat32Pieces : ScaleLoads::kDoubleQuantizedPieces;
}

// Scales and shifts, in groups of some steps of a tile: those of a group are loaded while those of the group before are
// stored, so that nobody waits for memory. A thread has one row, or none. A piece begins with a multiple of kGroup steps; its
// scales one at a time would ask the L1 cache for the same lines up to 8 times.
template <typename T, typename Shape, ScaleLoads kLoads>
struct BatchScaler {
  static constexpr bool kInPieces = kLoads != ScaleLoads::kSingle;
  static_assert(Shape::kRows <= Shape::kProducers, "a thread for each row");
  static constexpr int kGroup = StepGroup::kMost;
  // Of the first blocks of a step; small blocks have more, which are loaded when they are stored.
  static constexpr int kLoaded = Shape::kPanels;
  const Weight& w;
  const BatchOperands& operands;
  int thread;
  int end;
  float multiplier;  // what the table of code values was divided by
  float offset;
  int log_bytes;          // of a scale and of a shift
  StepCursor loading;     // the first step of the group that is loaded
  int64_t first_block;    // of the row, in the tile of `loading`
  int cols;               // of the row: 0 where the thread or the tile has no such row
  StoredNumbers numbers[kGroup][kLoaded];  // of a piece its words, one after the other in place of scales
  StepCursor storing;     // the next step
  float scales[kGroup][kLoaded];
  uint32_t shifts[kGroup][kLoaded];

  __device__ __forceinline__ BatchScaler(const Weight& w_, const BatchOperands& operands_, int begin, int end_,
                                         float multiplier_, int thread_)
      : w(w_),
        operands(operands_),
        thread(thread_),
        end(end_),
        multiplier(multiplier_),
        offset(w_.scale_2 == nullptr ? 0.0f : *w_.scale_offset),
        log_bytes(w_.scale_2 != nullptr ? 0 : w_.scale_dtype == Dtype::kFloat32 ? 2 : 1),
        loading(begin, operands_.steps),
        storing(loading) {
    enter_tile();
    load();
  }

  // The next group; asks for the numbers of the one after it.
  __device__ __forceinline__ StepGroup next_group() {
    const int first = kInPieces ? loading.in_tile % kGroup : 0;
    const int count = min(min(kGroup - first, operands.steps - loading.in_tile), end - loading.step);
#pragma unroll
    for (int step = 0; step < kGroup; ++step) {
#pragma unroll
      for (int i = 0; i < kLoaded; ++i) {
        scales[step][i] = (kInPieces ? scale_of_piece(step * kLoaded + i) : scale_of_stored(numbers[step][i])) * multiplier;
        if (!Shape::kScalesSums) shifts[step][i] = numbers[step][i].shift;
      }
    }
    storing = loading;
    loading.step += count, loading.in_tile += count;
    if (loading.in_tile == operands.steps) {
      loading.in_tile = 0, ++loading.tile;
      if (loading.step < end) enter_tile();
    }
    if (loading.step < end) load();
    return {first, first + count};
  }

  // Stores the numbers of step `step` of the group.
  __device__ __forceinline__ void store(int step, uint32_t stage, const BatchStage& layout) const {
    if (thread >= Shape::kRows) return;
#pragma unroll
    for (int now = 0; now < kGroup; ++now) {
#pragma unroll
      for (int i = 0; i < kLoaded; ++i) {
        if (now != step || (!kInPieces && i > 0 && i >> operands.log_blocks > 0)) continue;
        store_number(stage, layout, i, scales[now][i], shifts[now][i]);
      }
    }
    if (!Shape::kScalesSums) store_more(step, stage, layout);
  }

 private:
  __device__ __forceinline__ void enter_tile() {
    const BatchTile tile(w, operands, Shape{}, loading.tile);
    cols = thread < min(tile.rows_left, Shape::kRows) ? static_cast<int>(w.cols) : 0;
    first_block = (tile.row + thread) * w.blocks_per_row;
  }

  __device__ __forceinline__ void load() {
    if constexpr (kInPieces) load_piece();
    else load_blocks();
  }

  __device__ __forceinline__ void load_blocks() {
#pragma unroll
    for (int step = 0; step < kGroup; ++step) {
#pragma unroll
      for (int i = 0; i < kLoaded; ++i) {
        if (i == 0 || i >> operands.log_blocks == 0) load_block(numbers[step][i], loading.in_tile + step, i, cols);
      }
    }
  }

  __device__ __forceinline__ void load_piece() {
    const int64_t block = first_block + loading.in_tile / kGroup * kGroup * kLoaded;
    constexpr int kCount = kGroup * kLoaded;
    uint32_t words[kCount] = {};
    float scale_2 = 0.0f;
    if (cols > 0) {
      if constexpr (kLoads == ScaleLoads::kFloat32Pieces) {
        const uint4* from = reinterpret_cast<const uint4*>(static_cast<const float*>(w.scales) + block);
#pragma unroll
        for (int i = 0; i < kCount; ++i) words[i] = word_of(from[i / 4], i % 4);
      } else {
        const uint32_t* from = reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(w.scales) + block);
#pragma unroll
        for (int i = 0; i < kCount / 4; ++i) words[i] = from[i];
        scale_2 = w.scale_2[block / kScalesPerScale2];
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) numbers[i / kLoaded][i % kLoaded].scale = words[i];
    numbers[0][0].scale_2 = scale_2;
  }

  // Of scale `index` of a piece.
  __device__ __forceinline__ float scale_of_piece(int index) const {
    const auto word = [this](int i) { return numbers[i / kLoaded][i % kLoaded].scale; };
    if constexpr (kLoads == ScaleLoads::kFloat32Pieces) return __uint_as_float(word(index));
    return scale_of_stored({word(index / 4) >> index % 4 * 8 & 0xff, 0, numbers[0][0].scale_2});
  }

  // The numbers of block `i` of a step, 0 past the end of a row of `cols`.
  __device__ __forceinline__ void load_block(StoredNumbers& number, int in_tile, int i, int cols) const {
    const int col = in_tile * Shape::kCols + i * (Shape::kCols >> operands.log_blocks);
    number = {0, 0, 0.0f};
    if (col >= cols) return;
    const int64_t block = first_block + (w.block_shift < 0 ? 0 : col >> w.block_shift);
    const uint8_t* from = static_cast<const uint8_t*>(w.scales) + (block << log_bytes);
    if (log_bytes == 2) {
      number.scale = *reinterpret_cast<const uint32_t*>(from);
    } else if (log_bytes == 1) {
      number.scale = *reinterpret_cast<const uint16_t*>(from);
    } else {
      number.scale = *from;
      number.scale_2 = w.scale_2[block / kScalesPerScale2];
    }
    if (!Shape::kScalesSums && w.shifts != nullptr) number.shift = load_shift(block);
  }

  __device__ __forceinline__ uint32_t load_shift(int64_t block) const {
    return w.scale_dtype == Dtype::kFloat32 ? static_cast<const uint32_t*>(w.shifts)[block]
                                            : static_cast<const uint16_t*>(w.shifts)[block];
  }

  // Blocks smaller than a panel.
  __device__ __forceinline__ void store_more(int step, uint32_t stage, const BatchStage& layout) const {
    if (kInPieces || kLoaded >> operands.log_blocks != 0) return;
    const BatchTile tile(w, operands, Shape{}, storing.tile);
    BatchScaler row = *this;
    row.first_block = (tile.row + thread) * w.blocks_per_row;
#pragma unroll 1
    for (int i = kLoaded; i >> operands.log_blocks == 0; ++i) {
      StoredNumbers more;
      row.load_block(more, storing.in_tile + step, i, thread < tile.rows_left ? static_cast<int>(w.cols) : 0);
      store_number(stage, layout, i, scale_of_stored(more) * multiplier, more.shift);
    }
  }

  __device__ __forceinline__ void store_number(uint32_t stage, const BatchStage& layout, int i, float scale,
                                               uint32_t shift) const {
    const uint32_t place = stage + (i * Shape::kRows + thread) * Shape::kNumberBytes;
    if constexpr (Shape::kScalesSums) {
      store_shared_4(place + layout.scales, __float_as_uint(scale));
    } else {
      store_shared_8(place + layout.scales, split_number<T>(scale));
      if (!kInPieces && w.shifts != nullptr) store_shared_8(place + layout.shifts, split_number<T>(float_of_stored(shift)));
    }
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
