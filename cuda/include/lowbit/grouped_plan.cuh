// Which work there is in a product of rows, sorted by expert, with the matrices of a stack, and how a CTA finds its own.
#pragma once

#include <cstdint>

namespace lowbit {

// Mirrored by Operands in rust/core/src/cuda/grouped.rs.
struct GroupedOperands {
  const void* x;          // [rows, cols], rows 16-byte aligned
  const int64_t* counts;  // rows of each expert, one behind the other
  void* out;              // [rows, outputs]; rows beyond the sum of counts become zero
  int32_t rows;
  int32_t x_stride;       // elements from one row of x to the next
  int32_t experts;
  int32_t outputs;        // rows of a matrix
};
static_assert(sizeof(GroupedOperands) == 40, "as grouped.rs has it");

// Where an expert begins: counted in tiles of its rows of x, and in rows.
struct GroupedStart {
  int32_t tile;
  int32_t row;
};

// A tile of one expert's rows of x.
struct GroupedTile {
  int32_t expert;
  int32_t first_row;  // of x
  int32_t rows;
};

// Fills starts[0 .. experts] from the counts. One warp does it; rows beyond those of x count as none.
template <int kTokens>
__device__ __forceinline__ void find_starts(const GroupedOperands& operands, GroupedStart* starts) {
  const int lane = threadIdx.x % 32;
  int tiles_before = 0;
  int rows_before = 0;
  for (int base = 0; base < operands.experts; base += 32) {
    const bool is_inside = base + lane < operands.experts;
    const int64_t asked = is_inside ? operands.counts[base + lane] : 0;
    const int count = static_cast<int>(min(max(asked, int64_t{0}), static_cast<int64_t>(operands.rows)));
    int rows = count;
    int tiles = (count + kTokens - 1) / kTokens;
    for (int step = 1; step < 32; step *= 2) {
      const int more_rows = __shfl_up_sync(0xffffffff, rows, step);
      const int more_tiles = __shfl_up_sync(0xffffffff, tiles, step);
      if (lane >= step) {
        rows += more_rows;
        tiles += more_tiles;
      }
    }
    if (is_inside) starts[base + lane + 1] = {tiles_before + tiles, min(rows_before + rows, operands.rows)};
    tiles_before += __shfl_sync(0xffffffff, tiles, 31);
    rows_before = min(rows_before + __shfl_sync(0xffffffff, rows, 31), operands.rows);
  }
  if (lane == 0) starts[0] = {0, 0};
}

// The tile of this number.
template <int kTokens>
__device__ __forceinline__ GroupedTile find_tile(const GroupedStart* starts, int experts, int tile) {
  int low = 0;
  int high = experts;  // starts[low].tile <= tile < starts[high].tile
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (starts[middle].tile <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int first = starts[low].row + (tile - starts[low].tile) * kTokens;
  return {low, first, min(kTokens, starts[low + 1].row - first)};
}

}  // namespace lowbit
