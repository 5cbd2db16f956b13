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
      : w(w_), operands(operands_), memory(memory_), rows(static_cast<int>(w_.rows)),
        share(static_cast<int>((w_.cols + Shape::kUnit - 1) / Shape::kUnit), warp, warps),
        sums(memory_, warps, operands_.tokens) {}

  __device__ __forceinline__ void run() {
    allow_next_kernel();
    // What all wait for is asked for before the weights fill the queues of the memory; in a dependent launch, the activations
    // are not there yet.
    const float code = Shape::kBits == 4 ? codebook_value() : 0.0f;
    const float map_value = kHasMap && threadIdx.x < 256 ? lowbit_dynamic_map[threadIdx.x] : 0.0f;
    if (kHasMap) scale_offset = *w.scale_offset;
    Unit unit;
    if (!operands.is_dependent && share.rounds > 0) load_unit(unit, share.unit(0));

    const int passes = max((rows.tiles + sums.place.tiles - 1) / sums.place.tiles, 1);
    const int tiles_a_pass = (rows.tiles + passes - 1) / passes;
    Ring<Shape> ring(w, rows, share, tiles_a_pass,
                     shared_address(memory) + Shape::kRings + warp * (kSlots * Shape::kStageBytes), lane);
#pragma unroll 1
    for (int i = 0; i < kSlots; ++i) ring.refill();

    if (Shape::kBits == 4) write_pair_table<T>(memory, code, warp, warps, lane);
    if (kHasMap) write_scale_map(map_value);
    if (operands.is_dependent) {
      wait_for_previous_kernel();
      if (share.rounds > 0) load_unit(unit, share.unit(0));
    }
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
  __device__ __forceinline__ float codebook_value() const {
    const int code = lane % kCodebookLength;
    if (w.codebook == nullptr) return w.table[code];
    return code < w.codebook_length ? w.codebook[code] : 0.0f;
  }

  __device__ __forceinline__ float* scale_map() const { return reinterpret_cast<float*>(memory + Shape::kScaleMap); }

  // Thread i has value i. A block has at least 256 threads, or fewer and the loop makes up for it.
  __device__ __forceinline__ void write_scale_map(float value) const {
    for (int code = threadIdx.x; code < 256; code += blockDim.x) {
      if (code >= static_cast<int>(blockDim.x)) value = lowbit_dynamic_map[code];
      float4* copies = reinterpret_cast<float4*>(scale_map() + code * kScaleMapCopies);
      copies[0] = copies[1] = make_float4(value, value, value, value);
    }
  }

  __device__ __forceinline__ void load_unit(Unit& unit, int index) const {
    unit.x.load(operands, w.cols, index, lane);
  }

  // Derived from the activations: apart from their load, which nobody has to wait for until then.
  __device__ __forceinline__ void prepare_unit(Unit& unit, int index, const Ring<Shape>& ring) const {
    unit.scale_bits_below = ring.scales.bits_below(rows.first + g, index);
    unit.shift_bits_below = Shape::kShift ? ring.shifts.bits_below(rows.first + g, index) : 0;
    if constexpr (Shape::kShift) {
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
      if (round > 0 || (begin > 0 && share.rounds > 1)) load_unit(unit, index);
      prepare_unit(unit, index, ring);
      const int end_tile = share.end_tile(round, begin, end);
#pragma unroll 1
      for (int tile = share.first_tile(round, begin, end); tile < end_tile; ++tile) {
        float d[kTokenTiles][4] = {};
        if (round > 0 || share.full_rounds == 0) sums.load(d, tile - begin, warp, lane);
        visit(unit, ring, d);
        sums.store(d, tile - begin, warp, lane);
      }
    }
  }

  __device__ __forceinline__ void visit(const Unit& unit, Ring<Shape>& ring, float (&d)[kTokenTiles][4]) const {
    wait_for_copies<kSlots - 1>();
    __syncwarp();
    const uint8_t* stage = memory + Shape::kRings + (warp * kSlots + ring.slot) * Shape::kStageBytes;
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
    const int log_share = max(w.block_shift < 0 ? 31 : w.block_shift, kLogGroup) - kLogGroup;
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
      spread(scale[half], log_share);
      if constexpr (Shape::kShift) {
        const Dtype dtype = Shape::kScales == Scales::k32 ? Dtype::kFloat32 : w.scale_dtype;
        shift[half] = read_numbers(row + kTileRows * Shape::kScaleBytes, kQuad, dtype, unit.shift_bits_below);
        spread(shift[half], log_share);
      }
    }
  }
  static constexpr int kLogGroup = Shape::kGroup == 64 ? 6 : 5;

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
