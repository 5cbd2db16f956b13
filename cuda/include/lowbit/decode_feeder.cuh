// The way of codes, scales and shifts from global to shared memory: each warp has a stage of its own, and no other
// waits for it.
//
// A stage is free again as soon as its codes are in registers, before the arithmetic on them begins. So as many visits a
// warp as it has stages are under way at any time. The faster the memory, the more of them it takes to keep it busy; more
// than that wait in its queues, start the warps less evenly, and who starts late ends late.
#pragma once

#include "decode_plan.cuh"
#include "ptx.cuh"

namespace lowbit {

// A 16-byte chunk of row `row` of a unit lies at this place of the row: neither copies nor the reads of fragments, 4 or
// 8 bytes a lane, meet a bank twice.
__device__ __forceinline__ int swizzled(int row, int chunk) { return chunk ^ ((row & 3) << 1 | (row >> 2 & 1)); }

// The row of a lane that has nothing to copy: past every tile.
constexpr int kNoRow = 1 << 30;

// Copies the codes of 16 rows of a unit, tile after tile: 8 lanes a row, 4 rows at once.
template <typename Shape>
struct CodeCopier {
  static constexpr int kChunks = kUnitBytes / 16, kRowsAtOnce = kLanes / kChunks;
  const uint8_t* from;
  uint32_t step;  // bytes from a lane's row to its next
  uint32_t to;    // in a stage, for the first rows; later ones have the same swizzle or that of the row 4 further
  int row;        // of the tile; past every tile where the unit has no such columns

  __device__ __forceinline__ void enter(const Weight& w, int unit, int first_row, int lane) {
    const int chunk = lane % kChunks, lane_row = lane / kChunks;
    const uint32_t row_bytes = static_cast<uint32_t>(w.row_codes) * Shape::kBits / 8;
    const uint32_t column = unit * kUnitBytes + chunk * 16;
    from = w.codes + column + static_cast<uint64_t>(first_row + lane_row) * row_bytes;
    step = kRowsAtOnce * row_bytes;
    to = lane_row * kUnitBytes + swizzled(lane_row, chunk) * 16;
    row = column < static_cast<uint32_t>(w.cols) * Shape::kBits / 8 ? lane_row : kNoRow;
  }

  __device__ __forceinline__ void copy(uint32_t stage, int rows_left) {
#pragma unroll
    for (int i = 0; i < kTileRows / kRowsAtOnce; ++i) {
      const uint32_t place = i % 2 == 0 ? stage + to : stage + (to ^ 16);
      copy_16_async(place + i * kRowsAtOnce * kUnitBytes, from, row + i * kRowsAtOnce < rows_left);
      from += step;
    }
  }
};

// Copies scales or shifts, tile after tile: kWords 4-byte words a row, of which long blocks leave some unused.
template <int kWords, int kStride>
struct NumberCopier {
  static constexpr int kRowsAtOnce = kLanes / kWords < kTileRows ? kLanes / kWords : kTileRows;
  const uint8_t* from;
  uint32_t step;
  uint32_t to;
  int row;

  // The numbers have 2^log_bytes bytes, and 2^log_share groups of the row share one; `first` is the unit's first.
  // Numbers of a word each are copied for every group; of smaller ones, the words that hold them. Past the end of a row
  // they become 0.
  __device__ __forceinline__ void enter(const void* numbers, int log_bytes, int log_share, uint32_t per_row,
                                        uint32_t first, int first_row, int lane) {
    const int lane_row = lane / kWords, word = lane % kWords;
    const int number = log_bytes == 2 ? word >> log_share : word << (2 - log_bytes);
    const uint64_t byte = (static_cast<uint64_t>(first_row + lane_row) * per_row + first) << log_bytes;
    from = static_cast<const uint8_t*>(numbers) + ((byte & ~uint64_t{3}) + (number << log_bytes));
    step = kRowsAtOnce * per_row << log_bytes;
    to = lane_row * kStride + word * 4;
    // Of numbers smaller than a word, a unit has at least one, and no more than its groups share.
    const bool is_used = log_bytes == 2 || number == 0 || number << log_share < kWords << (2 - log_bytes);
    row = is_used && first + number < per_row ? lane_row : kNoRow;
  }

  __device__ __forceinline__ void copy(uint32_t stage, int rows_left, int lane) {
#pragma unroll
    for (int i = 0; i < kTileRows / kRowsAtOnce; ++i) {
      if (kRowsAtOnce * kWords == kLanes || lane < kRowsAtOnce * kWords) {
        copy_4_async(stage + to + i * kRowsAtOnce * kStride, from, row + i * kRowsAtOnce < rows_left);
      }
      from += step;
    }
  }
};

// Fills a warp's stage, visit after visit, in the order in which the sums are built: for each pass over as many tiles
// as have room, for each round, for each tile.
template <typename Shape>
struct Feeder {
  const Weight& w;
  const RowShare& rows;
  const UnitShare& share;
  int tiles_a_pass;
  uint32_t stages;           // the first of the warp's stages
  uint32_t end;              // and the bytes of all
  uint32_t place = 0;        // of the oldest: it is read, and filled again, before the next one is
  int lane;
  // The next visit.
  int pass_begin = 0, pass_end, round = 0, tile, tile_end, rows_left;
  CodeCopier<Shape> codes;
  NumberCopier<Shape::kScaleWords, Shape::kScaleBytes> scales;
  NumberCopier<Shape::kShiftWords, Shape::kScaleBytes> shifts;
  uint64_t scale_row;  // of a double-quantized weight: the number of the lane's row's first scale

  __device__ __forceinline__ Feeder(const Weight& w_, const RowShare& rows_, const UnitShare& share_, int tiles_a_pass_,
                                    uint32_t stages_, int depth, int lane_)
      : w(w_),
        rows(rows_),
        share(share_),
        tiles_a_pass(tiles_a_pass_),
        stages(stages_),
        end(depth * Shape::kStageBytes),
        lane(lane_) {
    pass_end = share.rounds > 0 ? min(tiles_a_pass, rows.tiles) : 0;
    if (pass_end > 0) enter_round();
  }

  // Starts the copies of the next visit, if there is one, to the oldest stage.
  __device__ __forceinline__ void refill() {
    if (pass_begin < pass_end) {
      copy_visit();
      rows_left -= kTileRows;
      if (++tile == tile_end) {
        ++round;
        enter_round();
      }
    }
    commit_copies();
    place += Shape::kStageBytes;
    if (place == end) place = 0;
  }

 private:
  __device__ __forceinline__ void copy_visit() {
    const uint32_t stage = stages + place;
    codes.copy(stage, rows_left);
    scales.copy(stage + Shape::kCodesBytes, rows_left, lane);
    if constexpr (Shape::kScales == Scales::kDouble) copy_scale_2(stage + Shape::kCodesBytes + kScale2Offset);
    if constexpr (Shape::kShift) shifts.copy(stage + Shape::kShiftOffset, rows_left, lane);
  }

  // All numbers of a unit and a row share one entry: the host admits no others.
  __device__ __forceinline__ void copy_scale_2(uint32_t to) {
    if (lane < kTileRows) {
      const bool is_inside = lane < rows_left;
      copy_4_async(to + lane * Shape::kScaleBytes, w.scale_2 + (is_inside ? scale_row / kScalesPerScale2 : 0),
                   is_inside);
    }
    scale_row += kTileRows * static_cast<uint32_t>(w.blocks_per_row);
  }

  // Moves on to the next round in which this warp has a tile.
  __device__ __forceinline__ void enter_round() {
    while (true) {
      if (round == share.rounds) {
        round = 0;
        pass_begin = pass_end;
        pass_end = min(pass_end + tiles_a_pass, rows.tiles);
      }
      if (pass_begin >= pass_end) return;
      tile = share.first_tile(round, pass_begin, pass_end);
      tile_end = share.end_tile(round, pass_begin, pass_end);
      if (tile < tile_end) break;
      ++round;
    }
    enter_unit(share.unit(round), rows.first + tile * kTileRows);
  }

  __device__ __forceinline__ void enter_unit(int unit, int row) {
    rows_left = rows.count - tile * kTileRows;
    codes.enter(w, unit, row, lane);
    const uint32_t per_row = static_cast<uint32_t>(w.blocks_per_row), first = first_block(w, unit);
    scales.enter(w.scales, Shape::kLogScaleBytes, log_share(w), per_row, first, row, lane);
    if constexpr (Shape::kScales == Scales::kDouble) scale_row = static_cast<uint64_t>(row + lane) * per_row + first;
    if constexpr (Shape::kShift) shifts.enter(w.shifts, log_shift_bytes(w), log_share(w), per_row, first, row, lane);
  }

 public:
  static __device__ __forceinline__ int log_block(const Weight& w) { return w.block_shift < 0 ? 31 : w.block_shift; }
  static __device__ __forceinline__ int log_share(const Weight& w) { return max(log_block(w) - Shape::kLogGroup, 0); }
  static __device__ __forceinline__ uint32_t first_block(const Weight& w, int unit) {
    return static_cast<uint32_t>(unit << Shape::kLogUnit) >> log_block(w);
  }
  static __device__ __forceinline__ int log_shift_bytes(const Weight& w) {
    return Shape::kScales == Scales::k32 || w.scale_dtype == Dtype::kFloat32 ? 2 : 1;
  }
  // Bits below a row's first number of a unit in the word that holds it. Rows 4 apart have the same.
  static __device__ __forceinline__ int bits_below(const Weight& w, int log_bytes, int row, int unit) {
    return ((row * static_cast<uint32_t>(w.blocks_per_row) + first_block(w, unit)) << log_bytes & 3) * 8;
  }
};

}  // namespace lowbit
