// The product of int8 rows with int8 weights by row on Hopper's matrix units.
//
// A block has a tile of 128 tokens and kN outputs at a time. Of its three warp groups the first feeds the others: one
// thread copies tiles of 128 bytes of the sum by tensor maps into a ring in shared memory, three warps gather what else
// a tile needs. The other two multiply, 64 tokens each, sums in registers. Blocks that lie above each other do not share
// their copies of the weight: waiting for each other's stages took longer than the L2 cache takes to read them twice.
//
// Columns of outliers: sums in int32 become fp32 and meet the scale of their row; then what x is beyond its codes, in
// 16 bits, times the codes of the weight is added by the same units. Most come through the ring as well, from where
// `int8_gather` put them side by side; what that has no room for is gathered here, 64 bytes at a time, unless the host has
// linear_batch multiply all of x as it is then. The scale of a weight's row and the bias follow, in fp32, and the one
// rounding.
#pragma once

#include "int8_rows.cuh"
#include "int8_units.cuh"
#include "tensor_map.cuh"

namespace lowbit {

// Of the codes of activations and of the weight, and of the columns of outliers of both; as in
// rust/core/src/cuda/int8.rs.
struct ProductMaps {
  TensorMap x, w, x_side, w_side;
};

// Mirrored by `ProductOperands` in rust/core/src/cuda/int8.rs.
struct ProductOperands {
  const void* x;
  const int8_t* codes;
  const float* scales;
  int32_t* outliers;        // null where there is no threshold
  const int8_t* weights;    // rows of `cols` bytes
  const void* weight_scales;
  const void* bias;  // null for none
  void* out;
  int64_t x_stride;
  int64_t codes_stride;
  int32_t cols;
  int32_t rows;
  int32_t tokens;
  Dtype weight_scale_dtype;
  Dtype bias_dtype;
  int32_t is_aligned;  // whether rows of `out` begin where 16 bytes may be stored
  int32_t most_outliers;  // with more columns of them nothing is done: another kernel multiplies
};
static_assert(sizeof(ProductOperands) == 112, "as ProductOperands of int8.rs");

constexpr int kProductThreads = 3 * 128;
constexpr int kTileTokens = 128;
// Bytes of a row of a stage, and of outliers.
constexpr int kStageRow = 128;
constexpr int kSideRow = 64;
// 16-bit numbers in that.
constexpr int kSideColumns = kSideRow / 2;
constexpr int kStageColumns = kStageRow / 2;
constexpr int kGatherers = 96;
// Tiles of tokens that are worked on side by side, so that what is read of either operand stays in the L2 cache.
constexpr int kGroup = 32;

template <typename T, int kN>
class Product {
  using Number = typename Side<T>::Number;
  static constexpr int kParts = Side<T>::kParts;
  static constexpr int kChunk = kSideColumns / kParts;  // columns of outliers at a time
  static constexpr int kStageBytes = (kTileTokens + kN) * kStageRow;
  static constexpr int kSideBytes = (kTileTokens + kN) * kSideRow;
  static constexpr int kColumnBytes = 2 * kN * sizeof(float);
  static constexpr int kStages = (196608) / kStageBytes < 8 ? 196608 / kStageBytes : 8;

 public:
  // What the host asks for: the ring, the side, scales and biases of columns, barriers, and room to align.
  static constexpr int kSharedBytes = kStages * kStageBytes + kSideBytes + kColumnBytes + 256 + 1024;

  __device__ __forceinline__ Product(const ProductMaps& maps, const ProductOperands& o) : maps_(maps), o_(o) {
    extern __shared__ uint8_t memory[];
    const uint32_t start = (shared_address(memory) + 1023) / 1024 * 1024;
    generic_ = memory + (start - shared_address(memory));
    ring_ = start;
    side_ = kStages * kStageBytes;
    columns_ = side_ + kSideBytes;
    barriers_ = start + columns_ + kColumnBytes;
    steps_ = (o.cols + kStageRow - 1) / kStageRow;
    token_tiles_ = (o.tokens + kTileTokens - 1) / kTileTokens;
    output_tiles_ = (o.rows + kN - 1) / kN;
  }

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        init_barrier(full(stage), 1);
        init_barrier(empty(stage), 2);
      }
      init_barrier(side_full(), kGatherers);
      init_barrier(side_empty(), 2);
      barrier_init_done();
    }
    __syncthreads();
    wait_for_previous_kernel();
    const int all = o_.outliers == nullptr ? 0 : *Outliers{o_.outliers, Outliers::words_of(o_.cols)}.count();
    if (all > o_.most_outliers) return;
    in_side_ = min(all, kSideCapacity / kParts);
    side_steps_ = (in_side_ * kParts + kStageColumns - 1) / kStageColumns;
    outliers_ = all - in_side_;
    const int group = threadIdx.x / 128;
    if (group == 0) {
      give_up_registers<56>();
      if (threadIdx.x == 0) {
        copy_tiles();
      } else if (threadIdx.x >= 32) {
        gather();
      }
    } else {
      take_registers<224>();
      multiply(group - 1);
    }
  }

 private:
  struct Tile {
    int token, output;
  };

  __device__ __forceinline__ uint32_t full(int stage) const { return barriers_ + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return barriers_ + 8 * (kStages + stage); }
  __device__ __forceinline__ uint32_t side_full() const { return barriers_ + 16 * kStages; }
  __device__ __forceinline__ uint32_t side_empty() const { return barriers_ + 16 * kStages + 8; }
  __device__ __forceinline__ int first() const { return blockIdx.x; }
  __device__ __forceinline__ int step() const { return gridDim.x; }
  __device__ __forceinline__ int count() const { return token_tiles_ * output_tiles_; }

  // Tiles in groups of rows of them, within a group one column after the other.
  __device__ __forceinline__ Tile tile(int index) const {
    const int per_group = kGroup * output_tiles_;
    const int group = index / per_group, in_group = index % per_group;
    const int height = min(kGroup, token_tiles_ - group * kGroup);
    const int row = group * kGroup + in_group % height;
    return {row * kTileTokens, in_group / height * kN};
  }

  // How many times the side is filled for a tile: once at least, for the scales of its columns.
  __device__ __forceinline__ int fillings() const { return max(1, (outliers_ + kChunk - 1) / kChunk); }

  __device__ __forceinline__ void copy_tiles() {
    int stage = 0;
    uint32_t parity = 1;
    for (int index = first(); index < count(); index += step()) {
      const Tile t = tile(index);
      for (int i = 0; i < steps_ + side_steps_; ++i) {
        barrier_wait(empty(stage), parity);
        barrier_expect(full(stage), kStageBytes);
        if (i < steps_) {
          copy_stage(t, stage, maps_.x, maps_.w, i * kStageRow);
        } else {
          copy_stage(t, stage, maps_.x_side, maps_.w_side, (i - steps_) * kStageColumns);
        }
        if (++stage == kStages) stage = 0, parity ^= 1;
      }
    }
  }

  // 128 bytes of every row of the tile, from `column` of either matrix on.
  __device__ __forceinline__ void copy_stage(const Tile& t, int stage, const TensorMap& x, const TensorMap& w,
                                             int column) const {
    const uint32_t to = ring_ + stage * kStageBytes;
    copy_box_async(to, x, column, t.token, full(stage));
    copy_box_async(to + kTileTokens * kStageRow, w, column, t.output, full(stage));
  }

  // ---- the side: scales and biases of columns, and outliers beyond those that are in the ring

  __device__ __forceinline__ void gather() {
    const int thread = threadIdx.x - 32;
    uint32_t parity = 1;
    for (int index = first(); index < count(); index += step()) {
      const Tile t = tile(index);
      for (int filling = 0; filling < fillings(); ++filling, parity ^= 1) {
        barrier_wait(side_empty(), parity);
        if (filling == 0) gather_columns(t, thread);
        if (outliers_ > 0) gather_outliers(t, filling * kChunk, thread);
        publish_to_products();
        arrive(side_full());
      }
    }
  }

  __device__ __forceinline__ void gather_columns(const Tile& t, int thread) const {
    float* columns = reinterpret_cast<float*>(generic_ + columns_);
    for (int i = thread; i < kN; i += kGatherers) {
      const int output = t.output + i;
      const bool is_inside = output < o_.rows;
      columns[i] = is_inside ? load(o_.weight_scales, o_.weight_scale_dtype, output) : 0.0f;
      columns[kN + i] = is_inside && o_.bias != nullptr ? load(o_.bias, o_.bias_dtype, output) : 0.0f;
    }
  }

  // A lane has a column, a warp every third row.
  __device__ __forceinline__ void gather_outliers(const Tile& t, int first, int thread) const {
    const int lane = thread % 32, warp = thread / 32;
    const int outlier = in_side_ + first + lane / kParts;
    const bool is_some = outlier < in_side_ + outliers_;
    const int column = is_some ? Outliers{o_.outliers, Outliers::words_of(o_.cols)}.columns()[outlier] : 0;
    constexpr int kAtOnce = 8;
#pragma unroll 1
    for (int row = warp; row < kTileTokens; row += 3 * kAtOnce) {
      float x[kAtOnce], scale[kAtOnce];
      int8_t code[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t token = t.token + row + 3 * i;
        const bool is_inside = is_some && token < o_.tokens;
        x[i] = is_inside ? to_float(static_cast<const T*>(o_.x)[token * o_.x_stride + column]) : 0.0f;
        code[i] = is_inside ? o_.codes[token * o_.codes_stride + column] : 0;
        scale[i] = is_inside ? o_.scales[token] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (row + 3 * i < kTileTokens) put(row + 3 * i, lane, beyond_code<T>(x[i], code[i], scale[i], lane % kParts));
      }
    }
#pragma unroll 1
    for (int row = warp; row < kN; row += 3 * 2 * kAtOnce) {
      int code[2 * kAtOnce];
#pragma unroll
      for (int i = 0; i < 2 * kAtOnce; ++i) {
        const int64_t output = t.output + row + 3 * i;
        code[i] = is_some && output < o_.rows ? o_.weights[output * o_.cols + column] : 0;
      }
#pragma unroll
      for (int i = 0; i < 2 * kAtOnce; ++i) {
        if (row + 3 * i < kN) put(kTileTokens + row + 3 * i, lane, from_float<Number>(static_cast<float>(code[i])));
      }
    }
  }

  __device__ __forceinline__ void put(int row, int column, Number number) const {
    const int chunk = (column / 8) ^ (row / 2 % 4);
    reinterpret_cast<Number*>(generic_ + side_)[row * kSideColumns + 8 * chunk + column % 8] = number;
  }

  // ---- products

  __device__ __forceinline__ void multiply(int group) {
    const int thread = threadIdx.x % 128;
    int stage = 0;
    uint32_t parity = 0, side_parity = 0;
    for (int index = first(); index < count(); index += step()) {
      const Tile t = tile(index);
      const int token = t.token + 64 * group + thread / 32 * 16 + thread % 32 / 4;
      int32_t sums[kN / 2];
      barrier_wait(full(stage), parity);
      add_stage(stage, group, sums, false);
      int last = stage;
      if (++stage == kStages) stage = 0, parity ^= 1;
      for (int i = 1; i < steps_; ++i) {
        barrier_wait(full(stage), parity);
        add_stage(stage, group, sums, true);
        wait_for_products<1>();
        release(last, thread);
        last = stage;
        if (++stage == kStages) stage = 0, parity ^= 1;
      }
      wait_for_products<0>();
      release(last, thread);
      scale_rows(token, sums);
      for (int i = 0; i < side_steps_; ++i) {
        barrier_wait(full(stage), parity);
        add_side(stage, group, in_side_ * kParts - i * kStageColumns, sums);
        release(stage, thread);
        if (++stage == kStages) stage = 0, parity ^= 1;
      }
      finish(t, token, group, thread, sums, side_parity);
    }
  }

  __device__ __forceinline__ void add_stage(int stage, int group, int32_t (&sums)[kN / 2], bool is_sum) const {
    const uint32_t from = ring_ + stage * kStageBytes;
    const uint64_t x = operand_of_128(from + 64 * group * kStageRow);
    const uint64_t w = operand_of_128(from + kTileTokens * kStageRow);
    begin_products();
#pragma unroll
    for (int k = 0; k < kStageRow / 32; ++k) Products<kN>::add(sums, x + 2 * k, w + 2 * k, is_sum || k > 0);
    end_products();
  }

  // Adds so many columns of outliers at most.
  __device__ __forceinline__ void add_side(int stage, int group, int columns, int32_t (&y)[kN / 2]) const {
    const uint32_t from = ring_ + stage * kStageBytes;
    const uint64_t x = operand_of_128(from + 64 * group * kStageRow);
    const uint64_t w = operand_of_128(from + kTileTokens * kStageRow);
    const int count = min((columns + 15) / 16, kStageColumns / 16);
    begin_products();
#pragma unroll 1
    for (int k = 0; k < count; ++k) Products<kN>::add(y, x + 2 * k, w + 2 * k, Number());
    end_products();
    wait_for_products<0>();
  }

  // int32 to fp32, times the scales of rows. In place: two sets of sums would not fit the registers.
  __device__ __forceinline__ void scale_rows(int token, int32_t (&y)[kN / 2]) const {
    const float upper = token < o_.tokens ? o_.scales[token] : 0.0f;
    const float lower = token + 8 < o_.tokens ? o_.scales[token + 8] : 0.0f;
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      y[i] = __float_as_int(static_cast<float>(y[i]) * (i / 2 % 2 == 0 ? upper : lower));
    }
  }

  // The stage may be filled again, as far as this warp group is concerned.
  __device__ __forceinline__ void release(int stage, int thread) const {
    if (thread == 0) arrive(empty(stage));
  }

  __device__ __forceinline__ void finish(const Tile& t, int token, int group, int thread, int32_t (&y)[kN / 2],
                                         uint32_t& side_parity) const {
    const int all = fillings();
    for (int filling = 0; filling < all; ++filling, side_parity ^= 1) {
      barrier_wait(side_full(), side_parity);
      if (outliers_ > 0) {
        const uint32_t from = ring_ + side_;
        const uint64_t x = operand_of_64(from + 64 * group * kSideRow);
        const uint64_t w = operand_of_64(from + kTileTokens * kSideRow);
        begin_products();
        Products<kN>::add(y, x, w, Number());
        Products<kN>::add(y, x + 2, w + 2, Number());
        end_products();
        wait_for_products<0>();
      }
      if (filling + 1 < all && thread == 0) arrive(side_empty());
    }
    const float* columns = reinterpret_cast<const float*>(generic_ + columns_) + thread % 4 * 2;
#pragma unroll
    for (int i = 0; i < kN / 8; ++i) {
      const float2 scale = *reinterpret_cast<const float2*>(columns + 8 * i);
      const float2 bias = *reinterpret_cast<const float2*>(columns + kN + 8 * i);
#pragma unroll
      for (int j = 4 * i; j < 4 * i + 4; ++j) {
        const bool is_even = j % 2 == 0;
        y[j] = __float_as_int(fmaf(__int_as_float(y[j]), is_even ? scale.x : scale.y, is_even ? bias.x : bias.y));
      }
    }
    // All threads of the group have read the columns.
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
    if (thread == 0) arrive(side_empty());
    store_rows(t, token, thread, y);
  }

  // ---- results: a thread has two columns of every eight, of two rows

  static __device__ __forceinline__ float value(const int32_t (&y)[kN / 2], int eight, int half, int column) {
    return __int_as_float(y[4 * eight + 2 * half + column]);
  }

  __device__ __forceinline__ void store_rows(const Tile& t, int token, int thread, const int32_t (&y)[kN / 2]) const {
    const bool is_whole = o_.is_aligned && t.output + kN <= o_.rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool is_inside = token + 8 * half < o_.tokens;
      T* row = static_cast<T*>(o_.out) + static_cast<int64_t>(token + 8 * half) * o_.rows + t.output;
      if (!is_whole) {
        if (is_inside) store_elements(t, thread, half, y, row);
      } else if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < kN / 8; ++i) {
          const float2 pair = make_float2(value(y, i, half, 0), value(y, i, half, 1));
          if (is_inside) *reinterpret_cast<float2*>(row + 8 * i + thread % 4 * 2) = pair;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kN / 8; i += 4) store_quads(i, thread, half, y, row, is_inside);
      }
    }
  }

  // Four lanes have 32 columns between them; each gets 8 neighbours.
  static __device__ __forceinline__ void store_quads(int i, int thread, int half, const int32_t (&y)[kN / 2], T* row,
                                                     bool is_inside) {
    uint32_t v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const T pair[2] = {from_float<T>(value(y, i + j, half, 0)), from_float<T>(value(y, i + j, half, 1))};
      memcpy(&v[j], pair, sizeof(pair));
    }
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      const bool is_upper = (thread & distance) != 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if ((j & distance) != 0) continue;
        uint32_t& low = v[j];
        uint32_t& high = v[j + distance];
        const uint32_t got = __shfl_xor_sync(~0u, is_upper ? low : high, distance);
        if (is_upper) {
          low = got;
        } else {
          high = got;
        }
      }
    }
    if (is_inside) *reinterpret_cast<uint4*>(row + 8 * (i + thread % 4)) = make_uint4(v[0], v[1], v[2], v[3]);
  }

  __device__ __forceinline__ void store_elements(const Tile& t, int thread, int half, const int32_t (&y)[kN / 2],
                                                 T* row) const {
#pragma unroll
    for (int i = 0; i < kN / 8; ++i) {
      const int column = 8 * i + thread % 4 * 2;
      if (t.output + column < o_.rows) row[column] = from_float<T>(value(y, i, half, 0));
      if (t.output + column + 1 < o_.rows) row[column + 1] = from_float<T>(value(y, i, half, 1));
    }
  }

  const ProductMaps& maps_;
  const ProductOperands& o_;
  uint8_t* generic_;
  uint32_t ring_, side_, columns_, barriers_;
  int steps_, token_tiles_, output_tiles_;
  // Columns of outliers that come through the ring, its steps for them, and the other columns.
  int in_side_, side_steps_, outliers_;
};

}  // namespace lowbit
