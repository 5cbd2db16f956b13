// The way of codes, scales and shifts from global to shared memory: each warp has a ring of its own, and no other waits for it.
#pragma once

#include "decode_plan.cuh"
#include "ptx.cuh"

namespace lowbit {

// A 16-byte chunk of row `row` of a unit lies at this place of the row: neither copies nor the reads of fragments, 4 or 8 bytes
// a lane, meet a bank twice.
__device__ __forceinline__ int swizzled(int row, int chunk) { return chunk ^ ((row & 3) << 1 | (row >> 2 & 1)); }

// Scales or shifts as they are stored: `blocks_per_row` numbers of 1, 2 or 4 bytes a row.
struct BlockNumbers {
  const uint8_t* base;
  int64_t per_row;
  int log_bytes;      // log2 of a number's bytes
  int log_words;      // log2 of the 4-byte words that hold a row's numbers of a unit
  int block_shift;    // log2(block_size); 31 where a row is a block
  int unit_shift;     // log2 of a unit's in-features

  __device__ __forceinline__ BlockNumbers(const Weight& w, const void* base_, int log_bytes_, int unit_shift_)
      : base(static_cast<const uint8_t*>(base_)), per_row(w.blocks_per_row), log_bytes(log_bytes_),
        block_shift(w.block_shift < 0 ? 31 : w.block_shift), unit_shift(unit_shift_) {
    log_words = max(max(unit_shift - block_shift, 0) + log_bytes - 2, 0);
  }

  __device__ __forceinline__ int first_block(int unit) const {
    return static_cast<int>((static_cast<int64_t>(unit) << unit_shift) >> block_shift);
  }
  // Bits below a row's first number of a unit in the word that holds it. Rows 4 apart have the same.
  __device__ __forceinline__ int bits_below(int row, int unit) const {
    return ((row * static_cast<int>(per_row) + first_block(unit)) << log_bytes & 3) * 8;
  }

  // Copies the words of 16 rows; numbers past the end of a row become 0.
  __device__ __forceinline__ void copy_async(uint32_t to, int stride, int row, int rows, int unit, int lane) const {
    const int block = first_block(unit);
#pragma unroll 1
    for (int i = lane; i < kTileRows << log_words; i += kLanes) {
      const int tile_row = i >> log_words, word = i & ((1 << log_words) - 1);
      const int64_t number = (row + tile_row) * per_row + block;
      const uint8_t* from = base + ((number << log_bytes & ~int64_t{3}) + word * 4);
      const bool is_inside = tile_row < rows && block + (word << 2 >> log_bytes) < per_row;
      copy_4_async(to + tile_row * stride + word * 4, from, is_inside);
    }
  }
};

__device__ __forceinline__ int log_bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 2 : 1; }

// Fills a warp's ring with visit after visit.
template <typename Shape>
struct Ring {
  const Weight& w;
  const RowShare& rows;
  const UnitShare& share;
  int tiles_a_pass;
  uint32_t base;
  int lane;
  BlockNumbers scales, shifts;
  Cursor next;
  int slot = 0;

  static constexpr int kLogScaleBytes = Shape::kScales == Scales::k32 ? 2 : Shape::kScales == Scales::k16 ? 1 : 0;
  static constexpr int kUnitShift = Shape::kBits == 4 ? 8 : 7;

  __device__ __forceinline__ Ring(const Weight& w_, const RowShare& rows_, const UnitShare& share_, int tiles_a_pass_,
                                  uint32_t base_, int lane_)
      : w(w_), rows(rows_), share(share_), tiles_a_pass(tiles_a_pass_), base(base_), lane(lane_),
        scales(w_, w_.scales, kLogScaleBytes, kUnitShift),
        shifts(w_, w_.shifts, log_bytes_of(w_.scale_dtype), kUnitShift) {
    next.start(share, rows.tiles, tiles_a_pass);
  }

  // Starts the copies of the next visit, if there is one, into the slot that was read last.
  __device__ __forceinline__ void refill() {
    if (!next.is_done()) {
      copy_visit(share.unit(next.round), rows.first + next.tile * kTileRows, rows.count - next.tile * kTileRows);
      next.advance(share, rows.tiles, tiles_a_pass);
    }
    commit_copies();
    slot = slot + 1 == kSlots ? 0 : slot + 1;
  }

 private:
  __device__ __forceinline__ void copy_visit(int unit, int row, int rows_left) const {
    const uint32_t stage = base + slot * Shape::kStageBytes;
    copy_codes(stage, unit, row, rows_left);
    scales.copy_async(stage + Shape::kCodesBytes, Shape::kScaleBytes, row, rows_left, unit, lane);
    if (Shape::kScales == Scales::kDouble) copy_scale_2(stage + Shape::kCodesBytes, unit, row, rows_left);
    if (Shape::kShift) shifts.copy_async(stage + Shape::kShiftOffset, Shape::kScaleBytes, row, rows_left, unit, lane);
  }

  // 8 lanes copy the 128 bytes of a row.
  __device__ __forceinline__ void copy_codes(uint32_t stage, int unit, int row, int rows_left) const {
    constexpr int kChunks = kUnitBytes / 16, kRowsAtOnce = kLanes / kChunks;
    const int chunk = lane % kChunks, lane_row = lane / kChunks;
    const int64_t row_bytes = w.row_codes * Shape::kBits / 8;
    const int64_t column = static_cast<int64_t>(unit) * kUnitBytes + chunk * 16;
    const bool is_column = column < w.cols * Shape::kBits / 8;
    const uint8_t* from = w.codes + ((row + lane_row) * row_bytes + column);
#pragma unroll
    for (int i = 0; i < kTileRows / kRowsAtOnce; ++i) {
      const int tile_row = lane_row + i * kRowsAtOnce;
      const bool is_inside = is_column && tile_row < rows_left;
      copy_16_async(stage + tile_row * kUnitBytes + swizzled(tile_row, chunk) * 16, from, is_inside);
      from += kRowsAtOnce * row_bytes;
    }
  }

  // All numbers of a unit and a row share one entry: the host admits no others.
  __device__ __forceinline__ void copy_scale_2(uint32_t to, int unit, int row, int rows_left) const {
    if (lane >= kTileRows) return;
    const bool is_inside = lane < rows_left;
    const int64_t number = (row + lane) * scales.per_row + scales.first_block(unit);
    const float* from = w.scale_2 + (is_inside ? number / kScalesPerScale2 : 0);
    copy_4_async(to + lane * Shape::kScaleBytes + Shape::kScale2Offset, from, is_inside);
  }
};

}  // namespace lowbit
