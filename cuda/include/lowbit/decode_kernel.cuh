// The body of linear_decode.
#pragma once

#include "decode_math.cuh"
#include "decode_scales.cuh"
#include "decode_sums.cuh"

namespace lowbit {

// One warp at work.
template <typename T, typename Shape, int kTokenTiles>
struct Decoder {
  const Weight& w;
  const DecodeOperands& operands;
  uint8_t* memory;
  // The shuffle tells the compiler that a warp has one value.
  int warp = __shfl_sync(kWholeWarp, threadIdx.x / kLanes, 0);
  int warps = blockDim.x / kLanes;
  int lane = threadIdx.x % kLanes;
  // The lane's place in fragments.
  int g = lane / 4, t = lane % 4;
  int cols;
  RowShare rows;
  UnitShare share;
  Sums<Shape> sums;
  float scale_offset = 0.0f;

  static constexpr bool kHasMap = Shape::kScales == Scales::kDouble;

  // A unit's part of a visit: activations, their sums, and how far below a word's start its numbers lie.
  struct Unit {
    Activations<T, Shape, kTokenTiles> x;
    float2 x_sums[Shape::kShift ? kTokenTiles : 1][Shape::kShift ? Shape::kGroups : 1];
    int scale_bits_below, shift_bits_below;
  };

  __device__ __forceinline__ Decoder(const Weight& w_, const DecodeOperands& operands_, uint8_t* memory_)
      : w(w_), operands(operands_), memory(memory_), cols(static_cast<int>(w_.cols)), rows(operands_), share(operands_, warp, warps),
        sums(memory_, warps, operands_.tokens) {}

  __device__ __forceinline__ void run() {
    // The lines of the parameters, all asked for at once.
    asm volatile("" ::"l"(w.codes), "l"(w.cols), "r"(w.block_shift), "l"(operands.x), "r"(operands.tiles_a_pass));
    allow_next_kernel();
    if (kHasMap) scale_offset = *w.scale_offset;
    // Activations are asked for before the weights fill the queues of the memory, unless they may still be results of the
    // previous kernel; weights are not.
    Unit unit;
    const bool has_unit = share.rounds > 0;
    if (has_unit && !operands.is_dependent) unit.x.load(operands, cols, share.unit(0), lane);

    const int tiles_a_pass = operands.tiles_a_pass;
    Ring<Shape> ring(w, rows, share, tiles_a_pass,
                     shared_address(memory) + Shape::kRings + warp * (Shape::kSlots * Shape::kStageBytes), lane);
    copy_tables_async();
    // One visit of each warp first, of all SMs. Who gets its first weights late stays late to the end.
    ring.refill();

    if (operands.is_dependent) {
      wait_for_previous_kernel();
      if (has_unit) unit.x.load(operands, cols, share.unit(0), lane);
    }
    wait_for_copies<1>();
    __syncwarp();
    if (Shape::kBits == 4) write_pair_table<T>(memory, codebook_copy()[lane % kCodebookLength], warp, warps, lane);
#pragma unroll 1
    for (int i = 1; i < Shape::kSlots; ++i) ring.refill();
    for (int begin = 0; begin < rows.tiles; begin += tiles_a_pass) {
      const int end = min(begin + tiles_a_pass, rows.tiles);
      __syncthreads();
      if (share.full_rounds == 0) {
        sums.clear(end - begin);
        __syncthreads();
      }
      visit_tiles(unit, ring, begin, end);
      __syncthreads();
      sums.template write_results<T>(operands, w.rows, rows.first + begin * kTileRows,
                                     min(rows.count - begin * kTileRows, (end - begin) * kTileRows));
    }
  }

 private:
  __device__ __forceinline__ float* scale_map() const { return reinterpret_cast<float*>(memory + Shape::kScaleMap); }

  // A warp's own copy of the codebook, in a gap of the pair table that sums take later.
  __device__ __forceinline__ float* codebook_copy() const {
    return reinterpret_cast<float*>(memory + warp * kTableStride + kGap);
  }

  // Starts the copies of what the tables are made of, as one group.
  __device__ __forceinline__ void copy_tables_async() const {
    if (Shape::kBits == 4 && lane < kCodebookLength) {
      if (w.codebook == nullptr) codebook_copy()[lane] = w.table[lane];
      else copy_4_async(shared_address(codebook_copy() + lane), w.codebook + lane, lane < w.codebook_length);
    }
    if (kHasMap) {
      for (int i = threadIdx.x; i < 256 * kScaleMapCopies; i += blockDim.x) {
        copy_4_async(shared_address(scale_map() + i), lowbit_dynamic_map + i / kScaleMapCopies, true);
      }
    }
    commit_copies();
  }

  // What follows from a unit's activations.
  __device__ __forceinline__ void prepare(Unit& unit, int index) const {
    const int row = rows.first + g;
    unit.scale_bits_below = Ring<Shape>::bits_below(w, Shape::kLogScaleBytes, row, index);
    if constexpr (Shape::kShift) {
      unit.shift_bits_below = Ring<Shape>::bits_below(w, Ring<Shape>::log_shift_bytes(w), row, index);
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int group = 0; group < Shape::kGroups; ++group) unit.x_sums[n][group] = unit.x.sum(n, group);
      }
    }
  }

  __device__ __forceinline__ void visit_tiles(Unit& unit, Ring<Shape>& ring, int begin, int end) const {
    for (int round = 0; round < share.rounds; ++round) {
      const int index = share.unit(round);
      if (round > 0 || (begin > 0 && share.rounds > 1)) unit.x.load(operands, cols, index, lane);
      prepare(unit, index);
      if (round + 1 < share.rounds) {
        Activations<T, Shape, kTokenTiles>::prefetch(operands, cols, share.unit(round + 1), lane);
      }
      const int first_tile = share.first_tile(round, begin, end), end_tile = share.end_tile(round, begin, end);
      uint32_t offset = sums.offset_of_lane(first_tile - begin, warp, lane);
#pragma unroll 1
      for (int tile = first_tile; tile < end_tile; ++tile, offset += warps * sums.bytes_of_warp()) {
        float d[kTokenTiles][4] = {};
        if (round > 0 || share.full_rounds == 0) sums.load(d, offset, lane);
        visit(unit, ring, d);
        sums.store(d, offset, lane);
      }
    }
  }

  __device__ __forceinline__ void visit(const Unit& unit, Ring<Shape>& ring, float (&d)[kTokenTiles][4]) const {
    wait_for_copies<Shape::kSlots - 1>();
    __syncwarp();
    const uint8_t* stage = memory + Shape::kRings + (warp * Shape::kSlots + ring.slot) * Shape::kStageBytes;
    Codes<Shape> codes;
    codes.read(stage, g * kUnitBytes + place_in_row());
    // Where all fits into registers, the slot is free before the arithmetic begins.
    FourNumbers scale[2], shift[2];
    read_quad<0>(stage, unit, scale, shift);
    if constexpr (Shape::kGroups == 4) {
      __syncwarp();
      ring.refill();
      multiply_quad<0>(codes, scale, shift, unit, d);
    } else {
      FourNumbers second_scale[2], second_shift[2];
      read_quad<1>(stage, unit, second_scale, second_shift);
      __syncwarp();
      ring.refill();
      multiply_quad<0>(codes, scale, shift, unit, d);
      multiply_quad<1>(codes, second_scale, second_shift, unit, d);
    }
  }

  // The offset in row g of this lane's codes of group 0.
  __device__ __forceinline__ uint32_t place_in_row() const {
    const int byte = t * Shape::kLaneBytes;
    return swizzled(g, byte / 16) * 16 + byte % 16;
  }

  template <int kQuad>
  __device__ __forceinline__ void read_quad(const uint8_t* stage, const Unit& unit, FourNumbers (&scale)[2],
                                            FourNumbers (&shift)[2]) const {
    const int log_share = Ring<Shape>::log_share(w);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint8_t* row = stage + Shape::kCodesBytes + (g + half * 8) * Shape::kScaleBytes;
      if constexpr (Shape::kScales == Scales::kDouble) {
        scale[half] = read_double_quantized(row, kQuad, Shape::kScale2Offset, scale_map() + g, scale_offset,
                                            unit.scale_bits_below);
      } else {
        const Dtype dtype = Shape::kScales == Scales::k32 ? Dtype::kFloat32 : w.scale_dtype;
        scale[half] = read_numbers(row, kQuad, dtype, unit.scale_bits_below);
      }
      if (Shape::kScales != Scales::k32) spread(scale[half], log_share);
      if constexpr (Shape::kShift) {
        const Dtype dtype = Shape::kScales == Scales::k32 ? Dtype::kFloat32 : w.scale_dtype;
        shift[half] = read_numbers(row + kTileRows * Shape::kScaleBytes, kQuad, dtype, unit.shift_bits_below);
        if (dtype != Dtype::kFloat32) spread(shift[half], log_share);
      }
    }
  }

  template <int kQuad>
  __device__ __forceinline__ void multiply_quad(const Codes<Shape>& codes, const FourNumbers (&scale)[2],
                                                const FourNumbers (&shift)[2], const Unit& unit,
                                                float (&d)[kTokenTiles][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int group = 4 * kQuad + i;
      float product[kTokenTiles][4];
      multiply_group(codes, group, unit, product);
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          d[n][j] = fmaf(scale[j / 2].of[i], product[n][j], d[n][j]);
          if constexpr (Shape::kShift) {
            const float2 x = unit.x_sums[n][group];
            d[n][j] = fmaf(shift[j / 2].of[i], j % 2 == 0 ? x.x : x.y, d[n][j]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void multiply_group(const Codes<Shape>& codes, int group, const Unit& unit,
                                                 float (&product)[kTokenTiles][4]) const {
#pragma unroll
    for (int i = 0; i < Shape::kProducts; ++i) {
      uint32_t a[4];
      codes.template fragment<T>(a, memory, lane * 4, group, i);
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        const uint32_t b0 = unit.x.words[n][group][2 * i], b1 = unit.x.words[n][group][2 * i + 1];
        float (&p)[4] = product[n];
        if (i == 0) multiply_tile<T>(p, a, b0, b1, 0.0f, 0.0f, 0.0f, 0.0f);
        else multiply_tile<T>(p, a, b0, b1, p[0], p[1], p[2], p[3]);
      }
    }
  }
};

}  // namespace lowbit
