// The body of linear_decode.
#pragma once

#include "decode_feeder.cuh"
#include "decode_math.cuh"
#include "decode_scales.cuh"
#include "decode_shifts.cuh"
#include "decode_sums.cuh"

namespace lowbit {

// One warp at work.
template <typename T, typename Shape, int kTokenTiles>
struct Decoder {
  using Number = typename Operand<T>::Number;
  // Whether activations, and the values of a codebook, are sums of two parts.
  static constexpr bool kIsSplit = Operand<T>::kColumns == 2;
  // Operands A of a product: int8 codes are float16 as they are.
  static constexpr int kParts = kIsSplit && Shape::kBits == 4 ? 2 : 1;
  static constexpr int kQuads = Shape::kGroups / 4;
  static constexpr bool kHasMap = Shape::kScales == Scales::kDouble;

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
  Sums<T, Shape> sums;
  float scale_offset = 0.0f;
  float codebook_factor = 1.0f;  // of sums of products with a codebook's parts

  // A unit's part of a visit: activations, their sums, and how far below a word's start its numbers lie.
  struct Unit {
    Activations<T, Shape, kTokenTiles> x;
    GroupSums x_sums[kTokenTiles][kQuads];  // with shifts
    int scale_bits_below, shift_bits_below;
  };

  __device__ __forceinline__ Decoder(const Weight& w_, const DecodeOperands& operands_, uint8_t* memory_)
      : w(w_),
        operands(operands_),
        memory(memory_),
        cols(static_cast<int>(w_.cols)),
        rows(operands_),
        share(operands_, warp, warps),
        sums(memory_, warps, operands_.depth, operands_.tokens) {}

  __device__ __forceinline__ void run() {
    // The lines of the parameters, all asked for at once.
    asm volatile("" ::"l"(w.codes), "l"(w.cols), "r"(w.block_shift), "l"(operands.x), "r"(operands.tiles_a_pass));
    allow_next_kernel();
    copy_tables_async();
    if (kHasMap) scale_offset = *w.scale_offset;
    // Activations are asked for before the weights fill the queues of the memory, unless they may still be results of
    // the previous kernel; weights are not.
    Unit unit;
    const bool has_unit = share.rounds > 0;
    if (has_unit && !operands.is_dependent) unit.x.load(operands, cols, share.unit(0), lane);

    const int tiles_a_pass = operands.tiles_a_pass;
    Feeder<Shape> feeder(w, rows, share, tiles_a_pass, shared_address(stages()), operands.depth, lane);
    for (int stage = 0; stage < operands.depth; ++stage) feeder.refill();

    if (operands.is_dependent) {
      wait_for_previous_kernel();
      if (has_unit) unit.x.load(operands, cols, share.unit(0), lane);
    }
    write_pairs();
    for (int begin = 0; begin < rows.tiles; begin += tiles_a_pass) {
      const int end = min(begin + tiles_a_pass, rows.tiles);
      __syncthreads();
      if (share.full_rounds == 0) {
        sums.clear(end - begin);
        __syncthreads();
      }
      visit_tiles(unit, feeder, begin, end);
      __syncthreads();
      sums.write_results(operands, w.rows, rows.first + begin * kTileRows,
                         min(rows.count - begin * kTileRows, (end - begin) * kTileRows));
    }
  }

 private:
  __device__ __forceinline__ uint8_t* stages() const {
    return memory + Shape::kStages + warp * operands.depth * Shape::kStageBytes;
  }
  __device__ __forceinline__ float* scale_map() const { return reinterpret_cast<float*>(memory + Shape::kScaleMap); }

  // A warp's own copy of the codebook, where sums lie later.
  __device__ __forceinline__ float* codebook_copy() const {
    return reinterpret_cast<float*>(&sums.at(warp * static_cast<int>(kCodebookLength * sizeof(float))));
  }

  // Starts the copies of the codebook, for each warp, and of the map of scales, as one group.
  __device__ __forceinline__ void copy_tables_async() const {
    if (Shape::kBits == 4 && lane < kCodebookLength) {
      if (w.codebook == nullptr) codebook_copy()[lane] = w.table[lane];
      else copy_4_async(shared_address(codebook_copy() + lane), w.codebook + lane, lane < w.codebook_length);
    }
    for (int code = threadIdx.x; kHasMap && code < 256; code += blockDim.x) {
      copy_4_async(shared_address(scale_map() + code), lowbit_dynamic_map + code, true);
    }
    commit_copies();
  }

  // The group of copies before the first visits' is what the pair table is made of, and the map of scales.
  __device__ __forceinline__ void write_pairs() {
    if (w.codebook != nullptr) wait_for_copies_but(operands.depth);
    __syncwarp();
    if (Shape::kBits == 4) {
      const float value = codebook_copy()[lane % kCodebookLength];
      if constexpr (kIsSplit) {
        write_parts(value);
      } else {
        write_pair_table<T>(memory, value, warp, warps, lane);
      }
    }
    if (kHasMap) wait_for_copies_but(operands.depth);
  }

  // The table of parts, of values that are brought to where float16 is most exact.
  __device__ __forceinline__ void write_parts(float value) {
    float largest = fabsf(value);
#pragma unroll
    for (int step = kCodebookLength / 2; step > 0; step /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, step));
    }
    const Magnitude magnitude(largest);
    codebook_factor = magnitude.down;
    write_parts_table(memory, value * magnitude.up, warp, warps, lane);
  }

  // What follows from a unit's activations.
  __device__ __forceinline__ void prepare(Unit& unit, int index) const {
    const int row = rows.first + g;
    unit.scale_bits_below = Feeder<Shape>::bits_below(w, Shape::kLogScaleBytes, row, index);
    if constexpr (Shape::kShift) {
      unit.shift_bits_below = Feeder<Shape>::bits_below(w, Feeder<Shape>::log_shift_bytes(w), row, index);
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) unit.x_sums[n][quad].set(unit.x.group_sum(n, quad, lane));
      }
    }
  }

  __device__ __forceinline__ void visit_tiles(Unit& unit, Feeder<Shape>& feeder, int begin, int end) const {
    for (int round = 0; round < share.rounds; ++round) {
      const int index = share.unit(round);
      if (round > 0 || (begin > 0 && share.rounds > 1)) unit.x.load(operands, cols, index, lane);
      prepare(unit, index);
      const int first_tile = share.first_tile(round, begin, end), end_tile = share.end_tile(round, begin, end);
      uint32_t offset = sums.offset_of_lane(first_tile - begin, warp, lane);
#pragma unroll 1
      for (int tile = first_tile; tile < end_tile; ++tile, offset += warps * sums.bytes_of_warp()) {
        float d[kTokenTiles][4] = {};
        if (round > 0 || share.full_rounds == 0) sums.load(d, offset, lane);
        if constexpr (kIsSplit) {
          float products[kTokenTiles][4] = {};
          visit(unit, feeder, products);
#pragma unroll
          for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
            for (int j = 0; j < 4; ++j) d[n][j] = fmaf(products[n][j] * codebook_factor, unit.x.factor(n), d[n][j]);
          }
        } else {
          visit(unit, feeder, d);
        }
        sums.store(d, offset, lane);
      }
    }
  }

  __device__ __forceinline__ void visit(const Unit& unit, Feeder<Shape>& feeder, float (&d)[kTokenTiles][4]) const {
    if (operands.depth == 1) wait_for_copies<0>();
    else wait_for_copies<1>();
    __syncwarp();
    const uint8_t* stage = stages() + feeder.place;
    Codes<Shape> codes;
    codes.read(stage, g * kUnitBytes + place_in_row());
    StoredScales<Shape::kScales> scales[kQuads][2];
    float shifts[kQuads][2];
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scales[quad][half].read(stage + Shape::kCodesBytes + (g + half * 8) * Shape::kScaleBytes, quad);
      }
      if constexpr (Shape::kShift) read_shifts(shifts[quad], stage, quad, unit);
    }
    // All is in registers: the stage is free before the arithmetic begins.
    __syncwarp();
    feeder.refill();
    const ScaleMeaning meaning = {w.scale_dtype, Feeder<Shape>::log_share(w), unit.scale_bits_below, scale_map(),
                                  scale_offset, lane};
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      const FourNumbers scale[2] = {scales[quad][0].decode(meaning), scales[quad][1].decode(meaning)};
      multiply_quad(codes, quad, scale, unit, d);
#pragma unroll
      for (int n = 0; Shape::kShift && n < kTokenTiles; ++n) {
        add_shifts(d[n], shifts[quad][0], shifts[quad][1], unit.x_sums[n][quad]);
      }
    }
  }

  // The offset in row g of this lane's codes of group 0.
  __device__ __forceinline__ uint32_t place_in_row() const {
    const int byte = t * Shape::kLaneBytes;
    return swizzled(g, byte / 16) * 16 + byte % 16;
  }

  // Of rows g and g + 8, group t of the four.
  __device__ __forceinline__ void read_shifts(float (&shift)[2], const uint8_t* stage, int quad, const Unit& unit) const {
    const int group = quad * 4 + t;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint8_t* row = stage + Shape::kShiftOffset + (g + half * 8) * Shape::kScaleBytes;
      const int place = (group >> Feeder<Shape>::log_share(w)) * 2 + unit.shift_bits_below / 8;
      shift[half] = Shape::kScales != Scales::k16 && Feeder<Shape>::log_shift_bytes(w) == 2
                        ? reinterpret_cast<const float*>(row)[group]
                        : float_of_16_bits(*reinterpret_cast<const uint16_t*>(row + place), w.scale_dtype);
    }
  }

  __device__ __forceinline__ void multiply_quad(const Codes<Shape>& codes, int quad, const FourNumbers (&scale)[2],
                                                const Unit& unit, float (&d)[kTokenTiles][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float product[kTokenTiles][4];
      multiply_group(codes, 4 * quad + i, unit, product);
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) d[n][j] = fmaf(scale[j / 2].of[i], product[n][j], d[n][j]);
      }
    }
  }

  __device__ __forceinline__ void multiply_group(const Codes<Shape>& codes, int group, const Unit& unit,
                                                 float (&product)[kTokenTiles][4]) const {
#pragma unroll
    for (int i = 0; i < Shape::kProducts; ++i) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        uint32_t a[4];
        codes.template fragment<Number>(a, memory + part * kGap, lane * 4, group, i);
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          const uint32_t b0 = unit.x.words[n][group][2 * i], b1 = unit.x.words[n][group][2 * i + 1];
          float (&p)[4] = product[n];
          if (i == 0 && part == 0) multiply_tile<Number>(p, a, b0, b1, 0.0f, 0.0f, 0.0f, 0.0f);
          else multiply_tile<Number>(p, a, b0, b1, p[0], p[1], p[2], p[3]);
        }
      }
    }
  }
};

}  // namespace lowbit
